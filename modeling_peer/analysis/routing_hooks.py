# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Hooks for tools that read or change the routing of a model: which experts each token uses, with which gates.

    with observe_routing(model, lambda layer, routing: print(layer.name, routing.expert_ids)):
        model(tokens)

    with scale_experts(model, layer=5, expert_ids=[17], factor=0.0):     # without expert 17 of layer 5
        model(tokens)

They work for PEER and product-key memory, for `top_k_moe` and `expert_choice_moe`, and for mixtures of Transformers
whose experts are one module (Mixtral and most others of its layout). A model may be wrapped, as PEFT does. Modules are
found by class name and by signature, because a model loaded with a checkpoint's own code has other class objects.

A hook on a layer's experts is seen by the layer: PEER's single call for decoding is then not taken
(`one_call_peer.is_unobserved`).
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from modeling_peer.query_norms_peer import is_recomputation

# The arguments of coarse experts in Transformers' layout, after the hidden states.
COARSE_ARGUMENTS = ("top_k_index", "top_k_weights")


class Routing(NamedTuple):
    """The routing of one forward of one layer.

    Args:
        hidden_states: what the layer's experts read, `(num_tokens, hidden_size)`; all sequences in one row of tokens.
        expert_ids: `(num_tokens, num_heads, num_active)`, int64. Coarse experts have one head.
        gates: same shape, any float dtype. An expert with a gate of 0 was not retrieved.
    """

    hidden_states: torch.Tensor
    expert_ids: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """A layer that sends each token to a few of its experts.

    Args:
        name: such as `layer_5`.
        index: the number of the decoder layer, or the position among the routed layers if the path has none.
        path: of `experts` in the model.
        experts: the module that computes the experts: called with hidden states, expert ids and gates.
        num_experts, num_heads: size of the pool, and retrieval heads (1 for coarse experts).
        parent: the module that owns `experts`.
    """

    name: str
    index: int
    path: str
    experts: nn.Module
    num_experts: int
    num_heads: int
    parent: nn.Module

    @property
    def has_single_neurons(self) -> bool:
        """Whether an expert is a row of each table, rather than a whole MLP."""
        return _is_named(self.experts, "PeerExperts")

    @property
    def chooses_tokens(self) -> bool:
        """Whether experts choose tokens, so that tokens have unequal numbers of experts."""
        return _is_named(self.parent, "PeerExpertChoiceMoe")


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The layers of `model` with experts to route to, in the order of the model; empty if there are none."""
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        # PEFT's `modules_to_save` keeps the module it replaced, which is not called.
        if "original_module" in path.split(".") or not _has_experts(module):
            continue
        number = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", path)
        index = int(number[1]) if number else len(found)
        parent = modules.get(path.rpartition(".")[0], model)
        # Each expert of a Soft MoE reads mixtures of all tokens. A hashed memory's rows follow from the tokens.
        if _is_named(parent, "PeerSoftMoe") or _is_named(parent, "PeerHashedMemory"):
            continue
        fine = _is_named(module, "PeerExperts")
        num_experts = module.num_peer_experts if fine else module.num_experts
        num_heads = module.config.num_retrieval_heads if fine else 1
        name = f"layer_{index}{grown_suffix(path)}" if number else path.replace(".", "_")
        found.append(RoutedLayer(name, index, path, module, num_experts, num_heads, parent))
    return found


def grown_suffix(path: str) -> str:
    """`_grown_0` in the name of a pool that was grown beside the first one of its layer; empty for the first one."""
    grown = re.search(r"\.grown_pools\.(\d+)\.", path)
    return f"_grown_{grown[1]}" if grown else ""


def find_routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """As `routed_layers`, of a model that must have some.

    Raises:
        ValueError: there are none; the message has the kinds that are supported.
    """
    found = routed_layers(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer that routes tokens to experts. Supported: PEER, product_key_memory, "
            "top_k_moe, expert_choice_moe, and Transformers' mixtures whose experts are one module. soft_moe and "
            "multilinear_moe use every expert for every token, and hashed_memory has no router."
        )
    return found


def find_routed_layer(model: nn.Module, layer: int | str) -> RoutedLayer:
    """The routed layer with this number (of the decoder layer) or name, such as `layer_5`.

    Raises:
        ValueError: there is no such layer; the message has those that exist.
    """
    layers = find_routed_layers(model)
    for found in layers:
        if layer in (found.index, found.name):
            return found
    raise ValueError(f"layer {layer!r} routes no tokens; these do: {', '.join(found.name for found in layers)}.")


@contextmanager
def observe_routing(model: nn.Module, observer: Callable[[RoutedLayer, Routing], None]) -> Iterator[list[RoutedLayer]]:
    """Call `observer(layer, routing)` at each forward of each routed layer, until the block ends.

    Forwards that gradient checkpointing recomputes are not observed again. Tensors are those of the forward: detach or
    copy what you keep.
    """
    layers = find_routed_layers(model)

    def hook_of(layer):
        def hook(module, args):
            if not is_recomputation():
                observer(layer, read_routing(layer, args))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = layer.parent if layer.chooses_tokens else layer.experts
            stack.enter_context(_removed_at_end(module.register_forward_pre_hook(hook_of(layer))))
        yield layers


@contextmanager
def change_gates(
    model: nn.Module, layer: int | str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[RoutedLayer]:
    """Replace the gates of one layer by `change(expert_ids, gates)`, until the block ends.

    Both have the shape in which the experts get them, `(num_tokens, num_active)`, a token's heads side by side. The
    gates need not sum to 1. An observer that was registered before sees the old gates, a later one the new gates.
    """
    found = find_routed_layer(model, layer)

    def hook(module, args):
        hidden_states, expert_ids, gates, *others = args
        return (hidden_states, expert_ids, change(expert_ids, gates), *others)

    with _removed_at_end(found.experts.register_forward_pre_hook(hook)):
        yield found


@contextmanager
def scale_experts(
    model: nn.Module, layer: int | str, expert_ids: Sequence[int] | torch.Tensor, factor: float = 0.0
) -> Iterator[RoutedLayer]:
    """Multiply the gates of some experts by `factor` until the block ends; 0 switches them off.

    The other gates stay as they are: a softmax over a head's experts is not normalised again.

    Args:
        layer: the number of the decoder layer, or its name.
        expert_ids: experts of that layer.
        factor: any finite number.

    Raises:
        ValueError: no such layer or expert, or a factor that is not finite.
    """
    found = find_routed_layer(model, layer)
    chosen = checked_experts(found, expert_ids)
    if not torch.isfinite(torch.tensor(float(factor))):
        raise ValueError(f"factor ({factor}) must be finite.")
    factors = torch.ones(found.num_experts).index_fill(0, chosen, float(factor))
    by_device = {}

    def change(ids, gates):
        if ids.device not in by_device:
            by_device[ids.device] = factors.to(ids.device)
        # An id beyond the pool stands for no expert in some of Transformers' mixtures.
        scale = by_device[ids.device][ids.clamp(max=found.num_experts - 1)]
        return gates * scale.to(gates.dtype)

    with change_gates(model, layer, change):
        yield found


@contextmanager
def keep_experts(
    model: nn.Module, kept: Mapping[int | str, Sequence[int] | torch.Tensor]
) -> Iterator[list[RoutedLayer]]:
    """Switch off all other experts of some layers until the block ends.

    This computes what a slice of the model does, without changing the tables (`adaptation.slicing.slice_experts`).

    Args:
        kept: ids of the experts to keep, by number or name of the layer. Layers without an entry keep all.

    Raises:
        ValueError: no such layer or expert.
    """
    with ExitStack() as stack:
        layers = []
        for layer, expert_ids in kept.items():
            found = find_routed_layer(model, layer)
            chosen = checked_experts(found, expert_ids)
            others = torch.ones(found.num_experts, dtype=torch.bool).index_fill(0, chosen, False).nonzero().squeeze(1)
            layers.append(stack.enter_context(scale_experts(model, layer, others)))
        yield layers


def checked_experts(layer: RoutedLayer, expert_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The ids as a tensor `(num_chosen,)`, int64, on the CPU.

    Raises:
        ValueError: the layer has no such expert.
    """
    chosen = torch.as_tensor(expert_ids, dtype=torch.int64).flatten().cpu()
    wrong = chosen[(chosen < 0) | (chosen >= layer.num_experts)]
    if len(wrong):
        raise ValueError(f"{layer.name} has experts 0 to {layer.num_experts - 1}; got {wrong[:5].tolist()}.")
    return chosen


def read_routing(layer: RoutedLayer, args: tuple) -> Routing:
    """The routing in the arguments of a layer's experts (or of the layer, where experts choose tokens)."""
    if layer.chooses_tokens:
        return _routing_by_thresholds(layer, args[0])
    hidden_states, expert_ids, gates = args[:3]
    shape = (len(hidden_states), layer.num_heads, -1)
    return Routing(hidden_states, expert_ids.reshape(shape), gates.reshape(shape))


def _routing_by_thresholds(layer: RoutedLayer, hidden_states: torch.Tensor) -> Routing:
    """The rule of evaluation of `expert_choice_moe`, with all experts, those not chosen with a gate of 0."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores = F.linear(tokens.float(), layer.parent.router.float()).softmax(dim=-1)
    gates = scores.masked_fill(scores <= layer.parent.thresholds.running_mean, 0.0)
    gates, expert_ids = gates.sort(dim=-1, descending=True)
    return Routing(tokens, expert_ids.unsqueeze(1), gates.unsqueeze(1))


def _has_experts(module: nn.Module) -> bool:
    if _is_named(module, "PeerExperts"):
        return True
    if not hasattr(module, "num_experts"):
        return False
    names = tuple(inspect.signature(type(module).forward).parameters)[2:4]
    return names == COARSE_ARGUMENTS


def _is_named(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


@contextmanager
def _removed_at_end(handle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()

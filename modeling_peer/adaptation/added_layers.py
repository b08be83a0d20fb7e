# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""New PEER layers beside the MLPs of trained models: where they go, and what they start from.

The writers, `up_embed`, start at zero. The layer then adds zero to the output of the MLP, and the model computes what
it did. The first steps train the writers alone, because every other gradient is a product with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_peer.adaptation.mlp_inputs import root_of_covariance
from modeling_peer.configuration_peer import PeerConfig
from modeling_peer.layer_peer import PeerLayer
from modeling_peer.row_formats_peer import row_chunks

READERS = ("random", "neurons", "inputs")
# Fields of PeerConfig that describe one new layer, beside num_sub_keys.
LAYER_FIELDS = (
    "num_retrieval_heads",
    "num_experts_per_head",
    "query_dim",
    "share_sub_keys",
    "query_norm",
    "gate_activation",
    "expert_act",
    "gated_experts",
    "expert_dropout",
    "expert_init_gain",
    "row_sparse_gradients",
)
# What models of Transformers call the projections whose rows read a token, and the gates among them.
READING_PROJECTIONS = ("up_proj", "gate_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3")
GATES = ("gate_proj", "w1")
# A neuron that is repeated is turned by noise of this length, relative to its own.
NOISE = 0.5


@dataclass(frozen=True)
class DecoderMlp:
    """The MLP of one decoder layer: the layer's number, and the module with its name and its parent."""

    layer: int
    name: str
    module: nn.Module
    parent: nn.Module


def find_decoder_mlps(model: nn.Module, name: str = "mlp") -> list[DecoderMlp]:
    """The MLPs of the decoder layers, by number.

    Decoder layers are the entries of the model's longest `nn.ModuleList` whose entries have a module `name`.

    Raises:
        ValueError: there is none, some entries have none, or entries share one.
    """
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    with_mlps = {
        path: stack for path, stack in stacks.items() if any(_has_module(entry, name) for entry in stack.children())
    }
    if not with_mlps:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers with a module {name!r}. Give the name that its layers have "
            f"(mlp_name=...): {', '.join(_names_in_stacks(stacks.values())) or 'it has no list of layers'}."
        )
    path, stack = max(with_mlps.items(), key=lambda item: len(item[1]))
    missing = [str(number) for number, entry in enumerate(stack) if not _has_module(entry, name)]
    if missing:
        raise ValueError(f"layers {', '.join(missing)} of {type(model).__name__} have no module {name!r}.")
    found = [
        DecoderMlp(number, f"{path}.{number}.{name}", entry._modules[name], entry)
        for number, entry in enumerate(stack)
    ]
    first: dict[int, int] = {}
    for mlp in found:
        other = first.setdefault(id(mlp.module), mlp.layer)
        if other != mlp.layer:
            raise ValueError(
                f"layers {other} and {mlp.layer} of {type(model).__name__} share one {name}, and a PEER layer beside "
                "it would be in both. This is not supported."
            )
    return found


def _has_module(entry: nn.Module, name: str) -> bool:
    return isinstance(entry._modules.get(name), nn.Module)


def _names_in_stacks(stacks: Iterable[nn.ModuleList]) -> list[str]:
    return sorted({name for stack in stacks for entry in stack.children() for name in entry._modules})


def chosen_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    """Sorted numbers of decoder layers; with `None` the middle one, as in `PeerConfig`.

    Raises:
        ValueError: there is no such layer, or none was chosen.
    """
    if layers is None:
        return [(num_layers - 1) // 2]
    chosen = sorted(set(layers))
    wrong = [layer for layer in chosen if not isinstance(layer, int) or not 0 <= layer < num_layers]
    if wrong or not chosen:
        raise ValueError(
            f"layers must name one or more of the decoder layers 0 to {num_layers - 1}; got {wrong or chosen}. Unset, "
            "it is the middle one."
        )
    return chosen


def checked_config(**fields: Any) -> PeerConfig:
    """`PeerConfig(**fields)`; a ValueError says which fields do not fit together."""
    try:
        return PeerConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def build_layer(
    config: PeerConfig, mlp: nn.Module, readers: str = "random", covariance: torch.Tensor | None = None
) -> PeerLayer:
    """A PEER layer that adds zero: its writers are zero, and its readers start as `readers` says.

    It is float32, on the device of `mlp`.

    Args:
        readers: `"random"`, the MLP's own `"neurons"`, or `"inputs"`.
        covariance: of what the MLP reads (`input_covariances`), for `"inputs"`.

    Raises:
        ValueError: `readers` is unknown, or `mlp` has no projections whose rows are neurons.
    """
    check_readers(readers, mlp, config.hidden_size)
    parameter = next(mlp.parameters(), None)
    device = "cpu" if parameter is None or parameter.is_meta else parameter.device
    layer = PeerLayer(config)
    if layer.experts.up_embed.is_meta:  # to be loaded: PEFT's low_cpu_mem_usage
        return layer
    layer.to(device, torch.float32)
    with torch.no_grad():
        layer.experts.up_embed.zero_()
        if readers == "neurons":
            _read_as_neurons(layer, neurons_of(mlp, config.hidden_size))
        elif readers == "inputs":
            read_as_inputs(layer, covariance)
    return layer


def check_readers(readers: str, mlp: nn.Module, hidden_size: int) -> None:
    """Raise ValueError if `readers` is unknown or `mlp` has no neurons to start from."""
    if readers not in READERS:
        raise ValueError(f"readers must be one of {', '.join(READERS)}; got {readers!r}.")
    if readers == "neurons":
        neurons_of(mlp, hidden_size)


def neurons_of(mlp: nn.Module, hidden_size: int) -> dict[str, torch.Tensor]:
    """Reading vectors of the neurons of an MLP by the name of the projection, `(num_neurons, hidden_size)` each.

    Raises:
        ValueError: it has no projection of a known name that is a plain linear layer.
    """
    found = {}
    for name, module in mlp.named_modules():
        leaf = name.rpartition(".")[2]
        if (
            leaf in READING_PROJECTIONS
            and isinstance(module, (nn.Linear, Conv1D))
            and module.weight.is_floating_point()
        ):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            if weight.dim() == 2 and weight.shape[1] == hidden_size:
                found[name] = weight.detach()
    if not found:
        raise ValueError(
            f"readers='neurons': {type(mlp).__name__} has no linear layer from {hidden_size} features named "
            f"{', '.join(READING_PROJECTIONS)}, whose rows are neurons. Use readers='random'."
        )
    return found


def _read_as_neurons(layer: PeerLayer, neurons: dict[str, torch.Tensor]) -> None:
    """Fill the reading tables with neurons, each repeated until the pool is full, in random order.

    Repeats are turned by noise. Every row has the length of a random one, so the pre-activations have the scale of
    `expert_init_gain`. Gated experts take both vectors of a neuron, if the MLP has gates.
    """
    gates = [name for name in neurons if name.rpartition(".")[2] in GATES]
    others = [name for name in neurons if name not in gates]
    experts = layer.experts
    if experts.gate_embed is None or not (gates and others):
        sources = {"down_embed": list(neurons), "gate_embed": list(neurons)}
    else:
        sources = {"down_embed": others, "gate_embed": gates}
    shared_order: dict[int, torch.Tensor] = {}
    for table_name in ("down_embed", "gate_embed"):
        table = experts._parameters[table_name]
        if table is None:
            continue
        pool = torch.cat([neurons[name] for name in sources[table_name]])
        if len(pool) not in shared_order:  # both vectors of a gated neuron go to one expert
            shared_order[len(pool)] = torch.randperm(len(table), device=table.device) % len(pool)
        rows = shared_order[len(pool)]
        length = experts.config.expert_init_gain
        for chunk in row_chunks(table):
            drawn = nn.functional.normalize(pool[rows[chunk].to(pool.device)].to(table), dim=-1)
            drawn = drawn + torch.randn_like(drawn) * (NOISE * table.shape[1] ** -0.5)
            table[chunk] = length * nn.functional.normalize(drawn, dim=-1)


@torch.no_grad()
def read_as_inputs(layer: PeerLayer, covariance: torch.Tensor) -> None:
    """Draw the reading vectors from the Gaussian with the covariance of what the MLP reads, and a mean of zero.

    A token's pre-activations then differ from another's mostly along the directions in which the inputs vary. The mean
    of the inputs is left out, because all tokens share it. Every row has the length of a random one.

    Args:
        covariance: `(hidden_size, hidden_size)`.
    """
    root = root_of_covariance(covariance)
    for table_name in ("down_embed", "gate_embed"):
        table = layer.experts._parameters[table_name]
        if table is None:
            continue
        for chunk in row_chunks(table):
            drawn = torch.randn_like(table[chunk], dtype=torch.float32) @ root.T.to(table.device, torch.float32)
            table[chunk] = layer.experts.config.expert_init_gain * nn.functional.normalize(drawn, dim=-1)

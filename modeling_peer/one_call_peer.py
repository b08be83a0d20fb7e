# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A PEER layer in one call: whether its modules can be skipped, and the arguments of the call.

With one or a few tokens and no gradients, a layer's time is the overhead of its dozen calls. One compiled call gives
the same output. If a hook, a replaced `forward` or another class must be called, the parts are called instead.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from transformers.activations import GELUActivation, SiLUActivation

from .backends_peer import choose_layer_of_few, one_call
from .experts_peer import PeerExperts
from .query_norms_peer import PeerBatchNorm, PeerLayerNorm, PeerRMSNorm
from .retrieval_peer import PeerRetrieval

# The tensors of each norm that the call supports.
_NORM_TENSORS = {
    PeerBatchNorm: ("running_mean", "running_var", "weight", "bias"),
    PeerLayerNorm: ("weight", "bias"),
    PeerRMSNorm: ("weight",),
    nn.Identity: (),
}
_ACTIVATION_NAMES = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", SiLUActivation: "silu"}
_GELU = F.gelu
_CALL = nn.Module.__call__
_forwards: dict[type, Callable] = {}


def remember_forwards(*classes: type[nn.Module]) -> None:
    """Record the `forward` of these classes, so that `is_unobserved` detects a later replacement.

    A `forward` that was replaced before is not recorded: its modules count as observed.
    """
    for cls in classes:
        forward = cls.forward
        if forward.__module__ in {base.__module__ for base in cls.__mro__} and not hasattr(forward, "__wrapped__"):
            _forwards[cls] = forward


remember_forwards(PeerRetrieval, PeerExperts, nn.Linear, GELUActivation, *_NORM_TENSORS, *_ACTIVATION_NAMES)


def is_unobserved(module: nn.Module) -> bool:
    """Whether calling `module` does only what its class defines.

    It has no hook and no `forward` of its own, its class's `forward` was not replaced, and the class was passed to
    `remember_forwards`.
    """
    cls, own = type(module), vars(module)
    return (
        cls.forward is _forwards.get(cls, own)
        and cls.__call__ is _CALL
        and "forward" not in own
        and "_compiled_call_impl" not in own
        and not (module._forward_hooks or module._forward_pre_hooks or has_any_global_hook())
    )


def run_in_one_call(retrieval: nn.Module, experts: nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """Output of a layer in evaluation, for decoding.

    Args:
        tokens: `(num_tokens, hidden_size)`.

    Returns:
        `(num_tokens, hidden_size)`. None if the implementation has no such call, there are too many tokens for it, or
        the parts have to be called.
    """
    if torch.compiler.is_compiling():
        return None
    if type(retrieval) is not PeerRetrieval or not isinstance(experts, PeerExperts):
        return None
    sub_keys, tables = retrieval._parameters.get("sub_keys"), experts.tables()
    # Offloaded tables are loaded, and sharded ones become this rank's rows, when the parts are called.
    if retrieval.training or sub_keys is None or tables is None or tables[1].is_meta:
        return None
    if experts._buffers.get("row_of_expert") is not None or experts.overlay is not None:  # the call takes ids as rows
        return None
    if type(tables[1]) not in (nn.Parameter, torch.Tensor):
        return None
    mapped = experts.mapped_tables
    if mapped is not None and tables[1].device != tokens.device:
        return None
    run = choose_layer_of_few(retrieval.config._experts_implementation, tables[1])
    network = None if run is None else _query_network(retrieval)
    if network is None or torch.is_autocast_enabled("cpu"):
        return None
    activation = experts._modules.get("activation")
    name = None if activation is None else _activation_name(activation)
    modules = (retrieval, retrieval._modules["query_proj"], retrieval._modules["query_norm"], experts, activation)
    if name is None or not all(map(is_unobserved, modules)):
        return None
    sizes = (retrieval.num_heads, retrieval.top_k)
    request = mapped.request if mapped is not None and mapped.waits_for_disk() else None
    options = {**experts.scales(), "before_reading": request}
    return run(tokens, network, sub_keys, *sizes, retrieval.gate_activation, tables, name, **options)


def _query_network(retrieval: PeerRetrieval) -> "one_call.QueryNetwork | None":
    """Weights of the query network; None if it is of another kind, or its norm still learns."""
    projection, norm = retrieval._modules["query_proj"], retrieval._modules["query_norm"]
    names = _NORM_TENSORS.get(type(norm))
    if type(projection) is not nn.Linear or names is None or norm.training:
        return None
    # Looked up in the modules' registries, which takes a fifth of the time of attributes. FSDP registers others.
    weight, bias = map(projection._parameters.get, ("weight", "bias"))
    tensors = {**norm._parameters, **norm._buffers}
    eps = getattr(norm, "eps", 0.0)
    if weight is None or bias is None or eps is None or any(tensors.get(name) is None for name in names):
        return None
    return one_call.QueryNetwork(weight, bias, *map(tensors.get, _NORM_TENSORS[PeerBatchNorm]), eps)


def _activation_name(activation: nn.Module) -> str | None:
    """The call's name for an activation; None if it does not support it."""
    if type(activation) is GELUActivation and activation.act is _GELU is F.gelu:
        return "gelu"
    return _ACTIVATION_NAMES.get(type(activation))

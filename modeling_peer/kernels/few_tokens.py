# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""When a token or a few, without gradients, are retrieved or mixed in one call: where that is faster and nobody can
tell. On CPU so far (`cpu_few_tokens`). Each function returns None where the parts are to be called one by one, which
also say what is wrong with their arguments."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, SiLUActivation

from .observers import are_ordinary, is_unobserved, somebody_looks

_ACTIVATION_NAMES = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", SiLUActivation: "silu"}


@cache
def _kernels():
    return import_module(f"{__package__}.cpu_few_tokens")  # compiled by what may not be installed


def retrieve_few(
    tokens: torch.Tensor,
    modules: tuple[nn.Module, ...],
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm: tuple[torch.Tensor | None, ...],
    eps: float,
    sub_keys: torch.Tensor,
    num_heads: int,
    top_k: int,
    gate_activation: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All of retrieval.

        query = norm(tokens @ weight.T + bias);  scores, ids = product_key_top_k(query);  gates = softmax(scores)

    Args:
        tokens: `(num_tokens, hidden_size)`.
        modules: those that this takes the place of, so that their hooks, if they have any, are not passed over.
        weight, bias: the query network's, of all heads; `weight` `(num_heads * query_dim, hidden_size)`.
        norm: mean, variance, scale and shift of each feature. Without the first two each head's own are taken:
            LayerNorm, or, without a shift, RMSNorm; without a scale there is none.
        eps: added to the variance.
        gate_activation: `"softmax"` over the scores of a head, or `"sigmoid"`.

    Returns:
        gates and expert_ids, `(num_tokens, num_heads, top_k)` each, as from `PeerRetrieval`; or None.
    """
    if torch.compiler.is_compiling():
        return None
    num_searches = num_heads if sub_keys.dim() == 4 else 1
    if not 0 < tokens.shape[0] * num_heads // num_searches < _kernels().MIN_BLOCKED_ROWS:
        return None
    if not _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k) or eps is None:
        return None
    if not tokens.dtype == weight.dtype == bias.dtype or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not tokens.is_cpu or any(tensor is not None and tensor.dtype != torch.float32 for tensor in norm):
        return None
    if not are_ordinary(weight, bias, *norm, sub_keys) or somebody_looks((tokens,)):
        return None
    if torch.is_autocast_enabled(tokens.device.type) or not all(map(is_unobserved, modules)):
        return None
    return _kernels().retrieve(tokens, weight, bias, norm, eps, sub_keys, num_heads, top_k, gate_activation)


def _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k) -> bool:
    """Whether no compiled loop would leave a tensor: it looks at the sizes of some."""
    *codebooks, num_sub_keys, half = sub_keys.shape
    num_features = num_heads * 2 * half
    norm_shape = (2 * half if norm[0] is None else num_features,)
    return (
        weight.shape == (num_features, tokens.shape[1])
        and bias.shape == (num_features,)
        and codebooks in ([2], [num_heads, 2])
        and 0 < top_k <= num_sub_keys
        and all(tensor is None or tensor.shape == norm_shape for tensor in norm)
    )


def mix_few(
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """`operators.expert_mixture`, whose arguments they are; `tables` are `down_embed`, `up_embed` and `gate_embed`."""
    if torch.compiler.is_compiling():
        return None
    name = _name_of(activation)
    if name is None or not hidden_states.is_cpu or not 0 < expert_ids.numel() <= _kernels().MAX_ASSIGNMENTS:
        return None
    if not are_ordinary(*tables) or somebody_looks((hidden_states, expert_ids, gates)):
        return None
    output = _kernels().mix(hidden_states, expert_ids, gates, *tables, name)
    return output if output.dtype == hidden_states.dtype else output.to(hidden_states.dtype)


def _name_of(activation: Callable) -> str | None:
    """What `mix` calls an activation; None if it is none of its own, or somebody is to see it."""
    if activation in (F.gelu, F.relu, F.silu):
        return activation.__name__
    if not isinstance(activation, nn.Module) or not is_unobserved(activation):
        return None
    if type(activation) is GELUActivation and activation.act is F.gelu:
        return "gelu"
    return _ACTIVATION_NAMES.get(type(activation))

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""When a token or a few, without gradients, go through a whole layer in one call: where that is faster and nobody can
tell. On CPU so far (`cpu.few_tokens`)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, SiLUActivation

from .dispatch import are_ordinary, is_unobserved, remember_forwards, somebody_looks

_ACTIVATION_NAMES = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", SiLUActivation: "silu"}
_GELU = F.gelu
_DTYPES = (torch.float32, torch.bfloat16)
remember_forwards(GELUActivation, *_ACTIVATION_NAMES, nn.Linear)


@cache
def _kernels():
    return import_module(f"{__package__}.cpu.few_tokens")  # compiled by what may not be installed


def run_few(
    tokens: torch.Tensor,
    modules: tuple[nn.Module, ...],
    query_network: tuple,
    sub_keys: torch.Tensor,
    num_heads: int,
    top_k: int,
    gate_activation: str,
    tables: tuple[torch.Tensor | None, ...],
    activation: nn.Module | None,
) -> torch.Tensor | None:
    """All of a layer.

        query = norm(tokens @ weight.T + bias);  scores, ids = product_key_top_k(query);  gates = softmax(scores)
        output = expert_mixture(tokens, ids, gates, *tables)

    Args:
        tokens: `(num_tokens, hidden_size)`.
        modules: those that this takes the place of, `activation` apart, so that their hooks are not passed over.
        query_network: weight `(num_heads * query_dim, hidden_size)` and bias of all heads; a tuple of a norm's mean,
            variance, scale and shift of each feature; what is added to its variance. Without mean and variance each
            head's own are taken: LayerNorm, or, without a shift, RMSNorm; without a scale there is no norm.
        gate_activation: `"softmax"` over the scores of a head, or `"sigmoid"`.
        tables: `down_embed`, `up_embed` and `gate_embed`, `(num_peer_experts, hidden_size)`.

    Returns:
        `(num_tokens, hidden_size)`, dtype of `tokens`; or None where the parts are to be called one by one, which also
        say what is wrong with their arguments.
    """
    kernels = _kernels()
    weight, bias, norm, eps = query_network
    num_searches = num_heads if sub_keys.dim() == 4 else 1
    num_queries = tokens.shape[0] * num_heads
    if (
        not 0 < num_queries * top_k <= kernels.MAX_ASSIGNMENTS
        or num_queries // num_searches >= kernels.MIN_BLOCKED_ROWS
    ):
        return None
    if not _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k, tables) or eps is None:
        return None
    if not tokens.is_cpu or not tokens.dtype == weight.dtype == bias.dtype:
        return None
    if any(one is not None and one.dtype not in _DTYPES for one in (weight, sub_keys, *tables)):
        return None
    if any(one is not None and one.dtype != torch.float32 for one in norm):
        return None
    name = _name_of(activation)
    if name is None or not all(map(is_unobserved, modules)) or torch.is_autocast_enabled("cpu"):
        return None
    if somebody_looks((tokens,)) or not are_ordinary(weight, bias, *norm, sub_keys, *tables):
        return None
    output = kernels.run_layer(tokens, query_network, sub_keys, num_heads, top_k, gate_activation, tables, name)
    return output if output.dtype == tokens.dtype else output.to(tokens.dtype)


def _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k, tables) -> bool:
    """Whether no compiled loop would leave a tensor: it looks at the sizes of some."""
    *codebooks, num_sub_keys, half = sub_keys.shape
    hidden_size = tokens.shape[1]
    num_features = num_heads * 2 * half
    norm_shape = (2 * half if norm[0] is None else num_features,)
    table_shape = (num_sub_keys * num_sub_keys, hidden_size)
    return (
        weight.shape == (num_features, hidden_size)
        and bias.shape == (num_features,)
        and codebooks in ([2], [num_heads, 2])
        and 0 < top_k <= num_sub_keys
        and all(tensor is None or tensor.shape == norm_shape for tensor in norm)
        and all(table is None or table.shape == table_shape for table in tables)
    )


def _name_of(activation: Callable) -> str | None:
    """What `run_layer` calls an activation; None if it is none of its own, or somebody is to see it."""
    if activation is None or not is_unobserved(activation):
        return None
    if type(activation) is GELUActivation and activation.act is _GELU is F.gelu:
        return "gelu"
    return _ACTIVATION_NAMES.get(type(activation))

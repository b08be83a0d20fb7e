# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checks for running one or a few tokens, without gradients, through a whole layer in one call. On CPU so far."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch

from ..row_formats_peer import is_quantised, row_width
from .dispatch import are_ordinary, needs_dispatch

_DTYPES = (torch.float32, torch.bfloat16)


class QueryNetwork(NamedTuple):
    """`norm(tokens @ weight.T + bias)`.

    Without mean and variance, each head's own are used: LayerNorm or, without a shift, RMSNorm. Without a scale there
    is no norm.
    """

    weight: torch.Tensor  # (num_heads * query_dim, hidden_size)
    bias: torch.Tensor  # (num_heads * query_dim,)
    # for each feature, (num_heads * query_dim,), or for each feature of one head, (query_dim,)
    mean: torch.Tensor | None
    variance: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    eps: float  # added to the variance

    @property
    def norm(self) -> tuple[torch.Tensor | None, ...]:
        return self[2:6]


@cache
def _kernels():
    return import_module(f"{__package__}.cpu.few_tokens")  # needs a compiler that may not be installed


def run_few(
    tokens: torch.Tensor,
    query_network: QueryNetwork,
    sub_keys: torch.Tensor,
    num_heads: int,
    top_k: int,
    gate_activation: str,
    tables: tuple[torch.Tensor | None, ...],
    activation: str,
    down_scale: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    gate_scale: torch.Tensor | None = None,
    before_reading: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor | None:
    """Run a whole layer.

        query = query_network(tokens);  scores, ids = product_key_top_k(query);  gates = softmax(scores)
        output = expert_mixture(tokens, ids, gates, *tables)

    Args:
        tokens: `(num_tokens, hidden_size)`.
        gate_activation: `"softmax"` over the scores of a head, or `"sigmoid"`.
        tables: `down_embed`, `up_embed` and `gate_embed`, `(num_peer_experts, hidden_size)`.
        activation: `"identity"`, `"gelu"`, `"relu"` or `"silu"`.
        down_scale, up_scale, gate_scale: of quantised tables, `(num_peer_experts,)`.
        before_reading: called with the ids of the experts, `(num_tokens, num_active)`, before their rows are read.

    Returns:
        `(num_tokens, hidden_size)`, dtype of `tokens`. None if the parts must be called one by one; they also report
        errors in their arguments.
    """
    kernels = _kernels()
    weight, bias, norm = query_network.weight, query_network.bias, query_network.norm
    num_searches = num_heads if sub_keys.dim() == 4 else 1
    num_queries = tokens.shape[0] * num_heads
    if (
        not 0 < num_queries * top_k <= kernels.MAX_ASSIGNMENTS
        or num_queries // num_searches >= kernels.MIN_BLOCKED_ROWS
    ):
        return None
    scales = (down_scale, up_scale, gate_scale)
    if not _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k, tables, scales):
        return None
    if not tokens.is_cpu or not tokens.dtype == weight.dtype == bias.dtype:
        return None
    plain = (one for one in tables if one is not None and not is_quantised(one.dtype))
    if any(one.dtype not in _DTYPES for one in (weight, sub_keys, *plain)):
        return None
    if any(one is not None and one.dtype != torch.float32 for one in (*norm, *scales)):
        return None
    if needs_dispatch((tokens,)) or not are_ordinary(weight, bias, *norm, sub_keys, *tables, *scales):
        return None
    options = (gate_activation, tables, activation, scales, before_reading)
    output = kernels.run_layer(tokens, query_network, sub_keys, num_heads, top_k, *options)
    return output if output.dtype == tokens.dtype else output.to(tokens.dtype)


def _fit_together(tokens, weight, bias, norm, sub_keys, num_heads, top_k, tables, scales) -> bool:
    """Whether every compiled loop stays within its tensors. Such a loop reads the sizes of only some of them."""
    *codebooks, num_sub_keys, half = sub_keys.shape
    hidden_size = tokens.shape[1]
    num_features = num_heads * 2 * half
    norm_shape = (2 * half if norm[0] is None else num_features,)
    num_experts = num_sub_keys * num_sub_keys
    return (
        weight.shape == (num_features, hidden_size)
        and bias.shape == (num_features,)
        and codebooks in ([2], [num_heads, 2])
        and 0 < top_k <= num_sub_keys
        and all(tensor is None or tensor.shape == norm_shape for tensor in norm)
        and all(_fits(*pair, num_experts, hidden_size) for pair in zip(tables, scales, strict=True))
    )


def _fits(table, scale, num_experts, hidden_size) -> bool:
    if table is None:
        return scale is None
    return (
        table.dim() == 2
        and (table.shape[0], row_width(table)) == (num_experts, hidden_size)
        and (scale is not None) == is_quantised(table.dtype)
        and (scale is None or scale.shape == (num_experts,))
    )

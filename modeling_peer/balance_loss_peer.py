# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Losses that balance product keys: how unevenly tokens use the sub-keys."""

import math

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import maybe_autocast

from .product_keys_peer import sub_key_scores, token_tiles

# Scores of one tile of tokens and one codebook. On CPU they and their softmax stay in cache. Best of 2**17 to 2**22 on
# two Zen 4 cores, 1,024 tokens, 8 heads, 1,024 sub-keys, forward and backward, 2026-11-22.
MAX_TILE_SCORES = {"cpu": 2**19}
MAX_TILE_SCORES_ACCELERATOR = 2**24


def balance_loss(
    kind: str,
    query: torch.Tensor,
    sub_keys: torch.Tensor,
    expert_ids: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the tokens use the sub-keys, with gradients for queries and sub-keys.

    A softmax over all n² product keys is the product of one softmax per codebook, so no tensor has the pool's size.
    Both losses balance the rows and the columns of the grid of experts, not each expert. P is a sub-key's mean
    probability over tokens and heads. f is the share of the retrieved experts in its row or column.

        "switch"       n · Σ f · P, mean of both codebooks; 1 when even (Fedus et al. 2021, eqs. 4-6; arXiv:2101.03961)
        "uniformity"   KL(P ‖ uniform), natural logarithm, sum of both codebooks; 0 when even (after Monet's
                       uniformity loss, Park et al. 2024; arXiv:2412.04139)

    Args:
        kind: `"switch"` or `"uniformity"`.
        query, sub_keys: as in `product_key_top_k`.
        expert_ids: its result for them.
        token_mask: `(num_tokens,)`, true where a token is not padding.

    Returns:
        A scalar, float32 (float64 for float64 input).
    """
    num_sub_keys = sub_keys.shape[-2]
    weights = query.new_ones(query.shape[0]) if token_mask is None else token_mask.to(query.dtype)
    weights = weights / weights.sum().clamp(min=1.0)
    probabilities = mean_probabilities(query, sub_keys, weights)  # (2, n)
    if kind == "uniformity":
        # clamp: a probability may underflow, and 0 · log 0 has no gradient
        log_probabilities = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
        return 2 * math.log(num_sub_keys) + (probabilities * log_probabilities).sum()
    # Row and column of each retrieved expert, numbered through both codebooks.
    positions = torch.stack([expert_ids // num_sub_keys, num_sub_keys + expert_ids % num_sub_keys])  # (2, t, h, k)
    shares = (weights / (expert_ids.shape[-2] * expert_ids.shape[-1])).view(1, -1, 1, 1).expand_as(positions)
    used = weights.new_zeros(2 * num_sub_keys).index_add(0, positions.flatten(), shares.flatten())
    return num_sub_keys * (used.view(2, -1) * probabilities).sum() / 2


def mean_probabilities(query: torch.Tensor, sub_keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Softmax over each codebook's scores, averaged over heads and, with `weights` `(num_tokens,)`, over tokens.

    As in retrieval, only one tile of tokens has its scores in memory at a time, forward and backward.

    Returns:
        `(2, num_sub_keys)`.
    """
    tiles = token_tiles(query, sub_keys, MAX_TILE_SCORES.get(query.device.type, MAX_TILE_SCORES_ACCELERATOR))
    if len(tiles) == 1:
        return _mean_of_tile(query, sub_keys, weights)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(_mean_of_tile, query[tile], sub_keys, weights[tile], **options) for tile in tiles)


def _mean_of_tile(query, sub_keys, weights):
    probabilities = sub_key_scores(query, sub_keys).softmax(dim=-1)  # (2, t, h, n)
    num_heads = query.shape[1]
    with maybe_autocast(query.device.type, enabled=False):
        # A product with a vector: twice as fast, forward and backward, as an einsum over tokens and heads.
        return (weights / num_heads).repeat_interleave(num_heads) @ probabilities.flatten(1, 2)

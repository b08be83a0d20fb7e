# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary losses: how those of the sparse layers reach `loss`, and those that balance product keys."""

import math

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import maybe_autocast

from .product_keys_peer import sub_key_scores, token_tiles

# Scores of one tile of tokens and one codebook. On CPU they and their softmax stay in cache: best of 2**17 to 2**22 on
# two Zen 4 cores, 1,024 tokens, 8 heads, 1,024 sub-keys, forward and backward, 2026-11-22.
MAX_TILE_SCORES = {"cpu": 2**19}
MAX_TILE_SCORES_ACCELERATOR = 2**24


class AuxiliaryLosses:
    """Collects, in one forward, what the sparse layers add to the task's loss.

    A head hands one to the model, each layer another to its sparse MLP, and `None` says that nobody wants them. An
    object rather than a list, because hooks around modules (FSDP, Accelerate) copy the lists they pass on.
    """

    total: torch.Tensor | None = None  # float32 scalar

    def add(self, loss: torch.Tensor) -> None:
        """Add one layer's unweighted loss; layers may be on several devices."""
        self.total = loss if self.total is None else self.total + loss.to(self.total.device)


def share_of_step(
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | float:
    """This micro-batch's share of the tokens that an optimizer step predicts: the weight of its mean.

    Given `num_items_in_batch`, a causal model's loss is this share of the step's mean, and Trainer adds the shares of
    all micro-batches and processes: a mean added as it is would count as often as there are of them. Otherwise 1: the
    loss is a mean too. Takes the keywords of the model's `forward`.
    """
    if labels is None or num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum() / num_items_in_batch


def balance_loss(
    kind: str,
    query: torch.Tensor,
    sub_keys: torch.Tensor,
    expert_ids: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the tokens use the sub-keys, with gradients for queries and sub-keys.

    A softmax over all n² product keys is the product of one softmax per codebook, so nothing of the pool's size is
    formed: both losses balance the rows and the columns of the grid of experts, not each expert. With P the mean
    probability of each sub-key of a codebook over tokens and heads, and f the share of the retrieved experts that lie
    in its row or column:

        "switch"       n · Σ f · P, mean of both codebooks; 1 when even (Fedus et al. 2021, eqs. 4-6; arXiv:2101.03961)
        "uniformity"   KL(P ‖ uniform), natural logarithm, sum of both codebooks; 0 when even (after Monet's
                       uniformity loss, Park et al. 2024; arXiv:2412.04139)

    Args:
        kind: `"switch"` or `"uniformity"`.
        query, sub_keys: as in `product_key_top_k`.
        expert_ids: what it returned for them.
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

    As in retrieval, the scores of one tile of tokens are held at a time, forward and backward.

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

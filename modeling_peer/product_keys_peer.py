# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product keys: scores of sub-keys, and the best pairs of them without scoring every pair."""

import torch
from transformers.utils.generic import maybe_autocast

# Scores of one tile of tokens: 2**22 float32 values are 16 MiB for each codebook, whatever the number of tokens.
MAX_TILE_SCORES = 2**22


def product_key_top_k(query: torch.Tensor, sub_keys: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Retrieve the `top_k` best experts of every head without scoring them all.

    A product key joins one sub-key from each codebook, so its score is a sum of two. The best of `num_sub_keys**2`
    are thus among `top_k**2` candidates (He 2024, eq. 5; arXiv:2407.04153). Only the pairs whose ranks satisfy
    `(i + 1) * (j + 1) <= top_k` can win. Any other pair is beaten by `top_k` pairs that rank no lower in both lists.
    The result is exact.

    Tokens are scored tile by tile. Memory beyond the results is at most `MAX_TILE_SCORES` values per codebook, forward
    and backward (top-k saves ids, not scores).

    Args:
        query: `(num_tokens, num_heads, query_dim)`.
        sub_keys: both codebooks, `(2, num_sub_keys, query_dim // 2)` shared by all heads, or
            `(num_heads, 2, num_sub_keys, query_dim // 2)`.
        top_k: experts per head, at most `num_sub_keys`.

    Returns:
        scores: `(num_tokens, num_heads, top_k)`, float32 (float64 for float64 input), best first.
        expert_ids: same shape, int64: `row * num_sub_keys + column`.
    """
    tiles = token_tiles(query, sub_keys, MAX_TILE_SCORES)
    if len(tiles) == 1:
        return _top_k_of_tile(query, sub_keys, top_k)
    results = [_top_k_of_tile(query[tile], sub_keys, top_k) for tile in tiles]
    scores, expert_ids = zip(*results, strict=True)
    return torch.cat(scores), torch.cat(expert_ids)


def _top_k_of_tile(query: torch.Tensor, sub_keys: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_sub_keys = sub_keys.shape[-2]
    sub_scores = sub_key_scores(query, sub_keys)
    (row_scores, column_scores), (rows, columns) = sub_scores.topk(top_k, dim=-1)  # (2, t, h, k) each

    i, j = torch.tensor(_candidate_ranks(top_k), device=query.device).unbind(1)
    scores, best = (row_scores[..., i] + column_scores[..., j]).topk(top_k, dim=-1)
    expert_ids = (rows[..., i] * num_sub_keys + columns[..., j]).gather(-1, best)
    return scores, expert_ids


def token_tiles(query: torch.Tensor, sub_keys: torch.Tensor, max_scores: int) -> list[slice]:
    """Slices of tokens whose scores stay within `max_scores` values per codebook, with at least one token each."""
    num_tokens, num_heads, _ = query.shape
    size = max(1, max_scores // (num_heads * sub_keys.shape[-2]))
    # A compiler plans memory itself. It would unroll a Python loop over tokens and specialise it to their number;
    # `torch.jit.trace` would do so silently.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or num_tokens <= size:
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def sub_key_scores(query: torch.Tensor, sub_keys: torch.Tensor) -> torch.Tensor:
    """Scores of all sub-keys of both codebooks: `(2, num_tokens, num_heads, num_sub_keys)`, float32 or more.

    Arguments are those of `product_key_top_k`.
    """
    # float32: in bfloat16 most tokens have ties at the last rank, so the winning expert would be arbitrary.
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, sub_keys = query.to(dtype), sub_keys.to(dtype)
    codebooks = "hcnd" if sub_keys.dim() == 4 else "cnd"
    with maybe_autocast(query.device.type, enabled=False):
        halves = query.unflatten(-1, (2, -1))  # (t, h, 2, query_dim // 2)
        return torch.einsum(f"thcd,{codebooks}->cthn", halves, sub_keys)


def _candidate_ranks(top_k: int) -> list[tuple[int, int]]:
    """Pairs of ranks (row, column) that include the `top_k` best sums: 50 of 256 for `top_k` 16."""
    return [(i, j) for i in range(top_k) for j in range(top_k) if (i + 1) * (j + 1) <= top_k]

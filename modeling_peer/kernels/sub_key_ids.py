# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product keys as rows of one table: each half of a query is a token that reads or weights k rows of the codebooks."""

import torch


def sub_key_ids_of(expert_ids: torch.Tensor, sub_keys: torch.Tensor) -> torch.Tensor:
    """Rows of `sub_keys.view(-1, half)` that make up the product keys `expert_ids`.

    Args:
        expert_ids: `(num_tokens, num_heads, top_k)`.

    Returns:
        Rows for each half of each query, `(num_tokens * num_heads * 2, top_k)`.
    """
    num_sub_keys = sub_keys.shape[-2]
    columns = expert_ids % num_sub_keys + num_sub_keys  # the second codebook follows the first
    ids = torch.stack((expert_ids // num_sub_keys, columns), dim=2)  # (t, h, 2, k)
    if sub_keys.dim() == 4:
        first = torch.arange(sub_keys.shape[0], device=expert_ids.device) * (2 * num_sub_keys)
        ids = ids + first[:, None, None]
    return ids.flatten(0, 2)


def for_both_halves(of_queries: torch.Tensor) -> torch.Tensor:
    """Repeat values of the queries' experts for both halves of each query, dense in memory.

    For a single query PyTorch would accept a view of stride 0. Kernels would not, because they use only address and
    shape of a tensor.

    Args:
        of_queries: `(num_tokens, num_heads, top_k)`.

    Returns:
        `(num_tokens * num_heads * 2, top_k)`.
    """
    return of_queries.unsqueeze(2).expand(-1, -1, 2, -1).flatten(0, 2).contiguous()

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product keys as rows of one table: each half of a query is a token that reads or weighs k rows of the codebooks."""

import torch


def sub_key_ids_of(expert_ids: torch.Tensor, sub_keys: torch.Tensor) -> torch.Tensor:
    """Rows of `sub_keys.view(-1, half)` that make the product keys `expert_ids` `(num_tokens, num_heads, top_k)`: of
    each half of each query, `(num_tokens * num_heads * 2, top_k)`."""
    num_sub_keys = sub_keys.shape[-2]
    columns = expert_ids % num_sub_keys + num_sub_keys  # the second codebook follows the first
    ids = torch.stack((expert_ids // num_sub_keys, columns), dim=2)  # (t, h, 2, k)
    if sub_keys.dim() == 4:
        first = torch.arange(sub_keys.shape[0], device=expert_ids.device) * (2 * num_sub_keys)
        ids = ids + first[:, None, None]
    return ids.flatten(0, 2)


def for_both_halves(of_queries: torch.Tensor) -> torch.Tensor:
    """Values `(num_tokens, num_heads, top_k)` of the queries' experts for the halves of each, dense in memory:
    `(num_tokens * num_heads * 2, top_k)`. Of a single query a view of stride 0 would do for PyTorch, not for kernels,
    which know a tensor by its address and shape."""
    return of_queries.unsqueeze(2).expand(-1, -1, 2, -1).flatten(0, 2).contiguous()

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Exact product-key retrieval on CPU: scores and top-k together, one tile of queries at a time, in cache.

    scores of a tile      (TILE_ROWS, n) of one codebook: they never leave the L2 cache. For many queries they are
                          computed in integers first, then in float32 for the few sub-keys that can win (`cpu.filter`).
                          For a few queries, see `cpu.few_tokens`.
    best k of each row    and of the pairs of a row's and a column's scores (`cpu.top_k`)

A query is summed in the same order, whatever the other queries and the number of threads. So results are bit-identical
from run to run.
"""

import numpy as np
import torch

from ..checks import check_ids_exist
from . import filter as integer_filter
from . import threads
from .experts import all_below
from .few_tokens import MIN_BLOCKED_ROWS, search_few
from .filter import filtered_top_k
from .memory import array, borrowed
from .products import BLOCK_KEYS, BLOCK_ROWS, score_block
from .simd import GROUPS, compiled
from .top_k import PADDING, best_pairs, copy_finite, find_best, scratch_for

# A multiple of every BLOCK_ROWS. Best of 12 to 384 on two Zen 4 cores, 2026-11-22; 24 to 192 are equal on Zen 3.
TILE_ROWS = 192
MIN_ROWS_PER_THREAD = 64


def product_key_top_k(query: torch.Tensor, sub_keys: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `operators.product_key_top_k`; `query` is float32.

    If a row of scores is not finite (a NaN in the query or in a sub-key), its scores are NaN and its ids valid.
    """
    num_tokens, num_heads, query_dim = query.shape
    num_sub_keys = sub_keys.shape[-2]
    half = query_dim // 2
    scores = torch.empty(num_tokens, num_heads, top_k, dtype=torch.float32, device="cpu")
    expert_ids = torch.empty(num_tokens, num_heads, top_k, dtype=torch.int64, device="cpu")
    # Heads with their own codebooks search separately, each through every num_heads-th row of the queries.
    codebooks = sub_keys.to(torch.float32)
    num_rows, num_searches = num_tokens * num_heads, codebooks.numel() // (2 * num_sub_keys * half)
    arguments = (borrowed(query, num_rows, 2, half), borrowed(codebooks, num_searches, 2, num_sub_keys, half))
    results = (borrowed(scores, num_rows, top_k), borrowed(expert_ids, num_rows, top_k))
    if num_rows // num_searches < MIN_BLOCKED_ROWS:
        search_few(*arguments, *results)
    else:
        blocks, finite = _blocks(arguments[1])
        filtered = integer_filter.is_faster(num_rows // num_searches, num_sub_keys, half, top_k)
        rounded = integer_filter.round_sub_keys(arguments[1]) if filtered else None
        threads.run(_search, num_rows, TILE_ROWS, *arguments, blocks, rounded, finite, *results)
    return scores, expert_ids


@compiled
def _blocks(codebooks):
    """Sub-keys in blocks, feature by feature, as `score_block` reads them: (searches, 2, blocks, q / 2, BLOCK_KEYS).

    They are padded to whole groups. Also returns zero, or NaN if a sub-key is not finite.
    """
    num_searches, _, num_sub_keys, half = codebooks.shape
    num_blocks = -(-num_sub_keys // GROUPS) * GROUPS // BLOCK_KEYS
    blocks = np.zeros((num_searches, 2, num_blocks, half, BLOCK_KEYS), np.float32)
    finite = np.float32(0)
    for search in range(num_searches):
        for codebook in range(2):
            for key in range(num_sub_keys):
                finite += copy_finite(
                    codebooks[search, codebook, key], blocks[search, codebook, key // BLOCK_KEYS, :, key % BLOCK_KEYS]
                )
    return blocks, finite


@compiled
def _search(queries, codebooks, blocks, rounded, finite_keys, out_scores, out_ids, chunk, num_chunks):
    """Search codebooks (searches, 2, n, q / 2) for queries (rows, 2, q / 2), tile by tile.

    `blocks` has the sub-keys in the layout of `_blocks`. `rounded` has them in that of `cpu.filter.round_sub_keys`, or
    is None.
    """
    num_searches, _, num_sub_keys, half = codebooks.shape
    num_blocks = blocks.shape[2]
    top_k = out_scores.shape[1]
    rows_per_search = queries.shape[0] // num_searches
    tiles_per_search = -(-rows_per_search // TILE_ROWS)
    num_tiles = num_searches * tiles_per_search

    # Rows beyond the last query are computed too, and ignored.
    tile_queries = np.zeros((TILE_ROWS, half), np.float32)
    scores = np.empty((TILE_ROWS, num_blocks * BLOCK_KEYS), np.float32)
    best, best_keys = np.empty((2, TILE_ROWS, top_k), np.float32), np.empty((2, TILE_ROWS, top_k), np.int64)
    scratch = scratch_for(scores.shape[1])
    finite = np.empty(TILE_ROWS, np.float32)
    for tile in range(num_tiles * chunk // num_chunks, num_tiles * (chunk + 1) // num_chunks):
        search = tile // tiles_per_search
        start = (tile % tiles_per_search) * TILE_ROWS
        num_rows = min(TILE_ROWS, rows_per_search - start)
        finite[:] = finite_keys
        for codebook in range(2):
            for i in range(num_rows):
                finite[i] += copy_finite(queries[(start + i) * num_searches + search, codebook], tile_queries[i])
            rows = np.arange(num_rows)  # rows that need every score, and their queries
            if rounded is not None:
                rows = filtered_top_k(
                    tile_queries,
                    num_rows,
                    rounded[0][search, codebook],
                    rounded[1][search, codebook],
                    codebooks[search, codebook],
                    scores,
                    scratch,
                    best[codebook],
                    best_keys[codebook],
                )
                for i in range(len(rows)):
                    tile_queries[i] = tile_queries[rows[i]]
            for block in range(num_blocks):
                for i in range(0, len(rows), BLOCK_ROWS):
                    score_block(tile_queries, i, blocks[search, codebook, block], scores, block * BLOCK_KEYS)
            for i in range(len(rows)):
                scores[i, num_sub_keys:] = PADDING
                finite[rows[i]] += find_best(scores[i], scratch, best[codebook, rows[i]], best_keys[codebook, rows[i]])
        for i in range(num_rows):
            row = (start + i) * num_searches + search
            best_pairs(best[:, i], best_keys[:, i], num_sub_keys, finite[i], out_scores[row], out_ids[row])


def product_key_top_k_backward(
    grad_scores: torch.Tensor, expert_ids: torch.Tensor, query: torch.Tensor, sub_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `query` and `sub_keys`, float32. Bit-identical from run to run with the same number of threads."""
    num_tokens, num_heads, top_k = expert_ids.shape
    num_sub_keys, half = sub_keys.shape[-2:]
    if not all_below(array(expert_ids), num_sub_keys**2):
        check_ids_exist(expert_ids, num_sub_keys**2)
    codebooks = sub_keys.to(torch.float32).view(-1, 2, num_sub_keys, half)
    grad_query = torch.empty(num_tokens, num_heads, 2 * half, dtype=torch.float32, device="cpu")
    # Each thread sums its own gradients of sub-keys. They are small: as many values as the sub-keys have.
    grad_sub_keys = torch.zeros(torch.get_num_threads(), *codebooks.shape, dtype=torch.float32, device="cpu")
    threads.run(
        _search_backward,
        num_tokens * num_heads,
        MIN_ROWS_PER_THREAD,
        array(grad_scores.view(-1, top_k)),
        array(expert_ids.view(-1, top_k)),
        array(query.view(-1, 2, half)),
        array(codebooks),
        array(grad_query.view(-1, 2, half)),
        array(grad_sub_keys),
        chunks_per_thread=1,
    )
    return grad_query, grad_sub_keys.sum(0).view(sub_keys.shape)


@compiled
def _search_backward(grad_scores, expert_ids, queries, codebooks, grad_queries, grad_codebooks, chunk, num_chunks):
    num_rows, _, half = queries.shape
    num_searches, _, num_sub_keys, _ = codebooks.shape
    for row in range(num_rows * chunk // num_chunks, num_rows * (chunk + 1) // num_chunks):
        search = row % num_searches
        grad_queries[row] = 0
        for slot in range(expert_ids.shape[1]):
            grad = grad_scores[row, slot]
            keys = divmod(expert_ids[row, slot], num_sub_keys)
            for codebook in range(2):
                sub_key = codebooks[search, codebook, keys[codebook]]
                grad_sub_key = grad_codebooks[chunk, search, codebook, keys[codebook]]
                query, grad_query = queries[row, codebook], grad_queries[row, codebook]
                for feature in range(half):
                    grad_query[feature] += grad * sub_key[feature]
                    grad_sub_key[feature] += grad * query[feature]

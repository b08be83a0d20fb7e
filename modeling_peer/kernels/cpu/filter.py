# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The best sub-keys of many queries with few float32 scores: integer scores, at twice the rate, exclude most.

    query q and sub-key c, scaled, are integers and a rest: q = r + e, c = s + f
    q · c - r · s = e · c + r · f        in size at most |e| |c| + (|q| + |e|) |f|        (Cauchy-Schwarz)

The float32 score differs from q · c by its rounding, at most 2**-24 |q| |c| per feature. Add this to the bound above.
If a sub-key's integer score is more than twice that sum below the k-th best, it is below k others in float32 too. The
remaining sub-keys, 19 of 1024 at k = 16, are scored in float32, with the same bits as everywhere. So the result is
exact.
"""

import numpy as np

from .products import (
    BLOCK_KEYS,
    BLOCK_ROWS,
    HAS_VNNI,
    LISTED_FEATURES,
    LISTED_KEYS,
    score_integer_block,
    score_listed,
)
from .simd import GROUPS, compiled
from .top_k import MAX_COUNTED, PADDING, find_candidates, keep_best

# Below these the filter costs more than it saves. It breaks even at 32 (n = 512, k = 16) to 42 (1024, 24) sub-keys
# per expert, at 256 to 1,024 queries and at a width of 16 to 32 (one Zen 4 core, 2026-11-22).
MIN_SUB_KEYS_PER_EXPERT, MIN_QUERIES, MIN_WIDTH = 48, 1024, 32
MAX_WIDTH = 4096  # above, rounding in the sums that bound the error would need its own margin

# Outside this range, float32 scores might overflow, or lose bits as subnormal numbers.
MIN_SCALE, MAX_SCALE = np.float32(2.0**-48), np.float32(2.0**48)


def is_faster(num_queries: int, num_sub_keys: int, width: int, top_k: int) -> bool:
    """Whether to filter `num_queries` searches for the `top_k` of `num_sub_keys` with `width` features each."""
    return (
        HAS_VNNI
        and num_queries >= MIN_QUERIES
        and num_sub_keys >= MIN_SUB_KEYS_PER_EXPERT * top_k
        and top_k <= MAX_COUNTED // 2
        and MIN_WIDTH <= width <= MAX_WIDTH
        and width % LISTED_FEATURES == 0
    )


@compiled
def round_sub_keys(codebooks):
    """Sub-keys (searches, 2, n, q / 2) as integers, in blocks as `score_integer_block` reads them.

    The result is (searches, 2, blocks, q / 4, BLOCK_KEYS), padded to whole groups. Each 32 bits hold a pair of 16.
    Also returns the largest |c| and |f| of each codebook, (searches, 2, 2); NaN if sub-keys cannot be scaled.
    """
    num_searches, _, num_sub_keys, width = codebooks.shape
    num_blocks = -(-num_sub_keys // GROUPS) * GROUPS // BLOCK_KEYS
    blocks = np.zeros((num_searches, 2, num_blocks, width // 2, 2 * BLOCK_KEYS), np.int16)
    lengths = np.zeros((num_searches, 2, 2), np.float32)
    integers = np.empty(width, np.int16)
    for search in range(num_searches):
        for codebook in range(2):
            sub_keys, largest = codebooks[search, codebook], lengths[search, codebook]
            scale = _scale(sub_keys.reshape(-1), width)
            for key in range(num_sub_keys):
                for i, length in enumerate(_round(sub_keys[key], scale, integers)):
                    largest[i] = length if not length <= largest[i] else largest[i]
                for feature in range(width):
                    pair = blocks[search, codebook, key // BLOCK_KEYS, feature // 2]
                    pair[2 * (key % BLOCK_KEYS) + feature % 2] = integers[feature]
    return blocks.view(np.int32), lengths


@compiled
def filtered_top_k(queries, num_rows, blocks, lengths, sub_keys, scores, scratch, best, best_keys):
    """The best of `sub_keys` for the first `num_rows` of `queries`, for rows where few sub-keys can win.

    `sub_keys` is (n, q / 2) and `queries` (rows, q / 2); `blocks` and `lengths` are from `round_sub_keys`.

    Returns:
        The other rows: many of their scores tie, or there is no bound on their rounding.
    """
    num_sub_keys = len(sub_keys)
    integers, margins = np.zeros(queries.shape, np.int16), np.empty(num_rows, np.float32)
    pairs = integers.view(np.int32)
    for i in range(num_rows):
        margins[i] = _round_query(queries[i], lengths, integers[i])
    for block in range(len(blocks)):
        for i in range(0, num_rows, BLOCK_ROWS):
            score_integer_block(pairs, i, blocks[block], scores, block * BLOCK_KEYS)

    values, keys, _ = scratch
    others, num_others = np.empty(num_rows, np.int64), 0
    for i in range(num_rows):
        scores[i, num_sub_keys:] = PADDING
        can_win = np.isfinite(margins[i])
        count = find_candidates(scores[i], best.shape[1], margins[i], scratch) if can_win else MAX_COUNTED + 1
        if count > MAX_COUNTED:
            others[num_others] = i
            num_others += 1
            continue
        keys[count : count + LISTED_KEYS] = 0
        for first in range(0, count, LISTED_KEYS):
            score_listed(queries[i], sub_keys, keys, first, values)
        keep_best(count, scratch, best[i], best_keys[i])
    return others[:num_others]


@compiled
def _round_query(query, lengths, integers):
    """Write `integers` of `query`, and return how far below the k-th best integer score a winner can be.

    The result is NaN if that is unknown.
    """
    width, (longest, longest_rest) = len(query), lengths
    length, rest = _round(query, _scale(query, width), integers)
    error = rest * longest + (length + rest) * longest_rest
    # 8 is for roundings other than the sum's
    error += (width + 8) * np.float32(2.0**-24) * length * longest
    return np.float32(2.002) * error + np.float32(2)


@compiled
def _scale(values, width):
    """The scale that gives the largest integers whose sums of `width` products fit into 32 bits; or NaN."""
    largest = np.float32(0)
    for value in values:
        largest = abs(value) if abs(value) > largest else largest
    scale = np.float32(min(2**15 - 1, int(np.sqrt(2**31 / width)) - 1)) / largest
    return scale if scale >= MIN_SCALE and scale <= MAX_SCALE else np.float32(np.nan)


@compiled
def _round(values, scale, integers):
    """Write the nearest `integers` to `values * scale`. Returns the lengths of the latter and of the difference.

    They are NaN if a value is.
    """
    square = rest = np.float32(0)
    for i in range(len(values)):
        value = values[i] * scale
        integer = np.rint(value)
        integers[i] = np.int16(integer)
        square += value * value
        rest += (value - integer) * (value - integer)
    return np.sqrt(square), np.sqrt(rest)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The best k of a row of scores, and the best k pairs of a row's and a column's scores.

    candidates    The maxima of GROUPS groups of scores give a bound that at least k scores reach. The few scores that
                  reach it, 18 of 1024 at k = 16, are candidates.
    the best k    of the candidates are sorted by counting, or by insertion if they are many, as when scores tie.
    best pairs    Both lists are sorted: walk the pairs with (i + 1)(j + 1) <= k, and leave a row at the first pair
                  that is too small.

Of equal scores the first wins.
"""

import numpy as np

from .simd import GROUPS, at_least, compiled, count_bits, lowest_bit

PADDING = np.float32(np.finfo(np.float32).min)  # finite, so that PADDING * 0 does not count as an overflow
MAX_COUNTED = GROUPS
# Measured on retrieval of 2,048 tokens (n = 1024, k = 16) on two Zen 4 cores (2026-11-22). Finding the bound by
# counting took 4 ms more; 6 or 10 steps took no less. Without EXPECTED_KEYS it took 4 ms more; with 3, no less.
BOUND_STEPS = 8
EXPECTED_KEYS = 2


@compiled
def scratch_for(num_scores):
    """Buffers for the functions below: values and keys of candidates, with spare room, and maxima of the groups."""
    room = num_scores + GROUPS
    return np.empty(room, np.float32), np.zeros(room, np.int64), np.empty(GROUPS, np.float32)


@compiled
def copy_finite(values, target):
    """Copy `values` to the beginning of `target`. Returns zero, or NaN if one of them is not finite."""
    finite = np.float32(0)
    for i in range(len(values)):
        target[i] = values[i]
        finite += values[i] * np.float32(0)
    return finite


@compiled
def find_best(scores, scratch, best, best_keys):
    """Write the `len(best)` best of `scores`, in descending order. Returns NaN if there are fewer.

    The length of `scores` is a multiple of `GROUPS`.
    """
    count = find_candidates(scores, len(best), np.float32(0), scratch)
    values, keys = scratch[0], scratch[1]
    for i in range(count):
        values[i] = scores[keys[i]]
    keep_best(count, scratch, best, best_keys)
    return np.float32(0) if count >= len(best) else np.float32(np.nan)


@compiled
def find_candidates(scores, top_k, margin, scratch):
    """Write the keys of `scores` that reach the `top_k`-th best minus `margin` into `scratch`, in ascending order.

    The length of `scores` is a multiple of `GROUPS`. Returns the number of keys. A few extra keys are included; there
    are fewer than `top_k` only if scores are NaN.
    """
    _, keys, maxima = scratch
    bound = _lower_bound(scores, top_k, maxima) - margin if top_k <= GROUPS else PADDING
    count = 0
    for first in range(0, len(scores), GROUPS):
        mask = at_least(scores, first, bound)
        num_keys = count_bits(mask)
        # Written even if there are fewer, which avoids a branch that is hard to predict.
        for i in range(EXPECTED_KEYS):
            keys[count + i] = first + lowest_bit(mask)
            mask &= mask - np.uint64(1)
        i = count + EXPECTED_KEYS
        while mask != 0:
            keys[i] = first + lowest_bit(mask)
            mask &= mask - np.uint64(1)
            i += 1
        count += num_keys
    return count


@compiled
def _lower_bound(scores, top_k, maxima):
    """A bound that at least `top_k` of the groups' maxima reach, but few more."""
    maxima[:] = PADDING
    num_unrolled = len(scores) // (4 * GROUPS) * (4 * GROUPS)
    for first in range(0, num_unrolled, 4 * GROUPS):  # four at a time, to load and store the maxima less often
        for group in range(GROUPS):
            i = first + group
            left, right = (
                _larger(scores[i], scores[i + GROUPS]),
                _larger(scores[i + 2 * GROUPS], scores[i + 3 * GROUPS]),
            )
            maxima[group] = _larger(maxima[group], _larger(left, right))
    for first in range(num_unrolled, len(scores), GROUPS):
        for group in range(GROUPS):
            maxima[group] = _larger(maxima[group], scores[first + group])

    low = high = maxima[0]
    for group in range(GROUPS):
        low = maxima[group] if maxima[group] < low else low
        high = _larger(maxima[group], high)
    for _ in range(BOUND_STEPS):
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        enough = count_bits(at_least(maxima, 0, middle)) >= top_k
        low, high = (middle, high) if enough else (low, middle)
    return low


@compiled
def _larger(a, b):
    return a if a > b else b  # one instruction, while max() would also handle NaN


@compiled
def keep_best(count, scratch, best, best_keys):
    """Write the `len(best)` best of the first `count` values in `scratch`, in descending order, and their keys."""
    values, keys, _ = scratch
    top_k = len(best)
    if count <= MAX_COUNTED:
        for i in range(count):
            value, rank = values[i], np.int32(0)
            for j in range(count):
                rank += np.int32((values[j] > value) | ((values[j] == value) & (j < i)))
            if rank < top_k:
                best[rank], best_keys[rank] = value, keys[i]
    else:
        for i in range(count):
            if i < top_k or values[i] > best[top_k - 1]:
                _insert(values[i], keys[i], best, best_keys, min(i, top_k - 1))


@compiled
def _insert(value, key, best, best_keys, position):
    """Insert `value` into the descending list that ends at `position`, in place of the list's last entry."""
    while position > 0 and best[position - 1] < value:
        best[position], best_keys[position] = best[position - 1], best_keys[position - 1]
        position -= 1
    best[position], best_keys[position] = value, key


@compiled
def best_pairs(best, best_keys, num_sub_keys, finite, out_scores, out_ids):
    """Write the best sums of a row's and a column's score, from both descending lists, (2, k) each.

    They are NaN if `finite` is.
    """
    top_k = len(out_scores)
    if finite != 0:
        out_scores[:] = np.nan
        out_ids[:] = np.arange(top_k)
        return
    count = 0
    for i in range(top_k):
        for j in range(top_k // (i + 1)):
            score = best[0, i] + best[1, j]
            if count >= top_k and not score > out_scores[top_k - 1]:
                break  # the rest of this row of pairs is no better
            expert_id = best_keys[0, i] * num_sub_keys + best_keys[1, j]
            _insert(score, expert_id, out_scores, out_ids, min(count, top_k - 1))
            count += 1

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernels' filter by integers: never another bit than without it, whatever the data."""

import pytest
import torch

from modeling_peer.backends_peer import RETRIEVAL_FUNCTIONS

pytest.importorskip("numba")

from modeling_peer.kernels.cpu import filter as cpu_filter
from modeling_peer.kernels.cpu.memory import array
from modeling_peer.kernels.cpu.products import BLOCK_KEYS, HAS_VNNI
from modeling_peer.kernels.cpu.top_k import scratch_for

pytestmark = pytest.mark.skipif(not HAS_VNNI, reason="this CPU multiplies integers no faster than float32")

NUM_SUB_KEYS, HALF, TOP_K = 200, 32, 4


def near_ties(query, sub_keys):
    sub_keys[:, 40:60] = 3 * sub_keys[:, :1] + 1e-6 * torch.randn(2, 20, HALF)


def many_near_ties(query, sub_keys):
    sub_keys[:] = sub_keys[:, :1] + 1e-5 * sub_keys


def ties(query, sub_keys):
    sub_keys[:, ::2] = sub_keys[:, :1]


def rounded_against_the_winner(query, sub_keys):
    """Sub-key 30 wins, though by integers ten others are ahead by most of what rests can do. The largest values are
    the largest integers, so that nothing is scaled; the other scores are near, so that the bound is."""
    rows, columns = sub_keys
    query[..., :HALF], rows[:], rows[0], rows[0, 0] = 8191, 990, 757, 8191
    rows[10:20], rows[30] = 1000 - 0.499, 1000 + 0.499
    rows[30, :30] -= 1  # 30 * 8191 by integers, of 2 * 0.499 * 32 * 8191
    query[..., HALF], query[..., HALF + 1 : HALF + 16], query[..., HALF + 16 :] = 8191, 1000 + 0.499, 1000 - 0.499
    columns[:], columns[:, 16:31], columns[10:20, 16:31] = 0, 8000, 8191
    columns[30], columns[30, 1:16] = 0, 8191
    columns[30, 1] -= 120  # 120 * 1000, of 2 * 0.499 * 15 * 8191


def heavy_tails(query, sub_keys):
    for values in (query, sub_keys):
        values /= torch.rand_like(values)


def one_feature_a_million_times_as_large(query, sub_keys):
    query[..., 3] *= 1e6
    sub_keys[..., 3] *= 1e-6


def one_sub_key_a_million_times_as_large(query, sub_keys):
    sub_keys[:, 7] *= 1e6


def tokens_of_every_magnitude(query, sub_keys):
    query *= torch.logspace(-44, 37, len(query)).view(-1, 1, 1)


def sub_keys_of_every_magnitude(query, sub_keys):
    sub_keys *= torch.logspace(-44, 37, NUM_SUB_KEYS).view(-1, 1)


def subnormal_scores(query, sub_keys):
    query *= 1e-20
    sub_keys *= 1e-20


def overflowing_scores(query, sub_keys):
    query *= 1e20
    sub_keys *= 1e20


def zeros(query, sub_keys):
    query[::2] = 0
    sub_keys[1] = 0


def nan_in_a_query(query, sub_keys):
    query[7, 1, 5] = torch.nan


def infinity_in_a_query(query, sub_keys):
    query[7, 1, 5] = torch.inf


def nan_in_a_sub_key(query, sub_keys):
    sub_keys[1, 7, 5] = torch.nan


@pytest.mark.parametrize("share_sub_keys", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        None,
        near_ties,
        many_near_ties,
        ties,
        rounded_against_the_winner,
        heavy_tails,
        one_feature_a_million_times_as_large,
        one_sub_key_a_million_times_as_large,
        tokens_of_every_magnitude,
        sub_keys_of_every_magnitude,
        subnormal_scores,
        overflowing_scores,
        zeros,
        nan_in_a_query,
        infinity_in_a_query,
        nan_in_a_sub_key,
    ],
    ids=lambda change: change.__name__ if change else "plain",
)
def test_the_filter_changes_no_bit(change, share_sub_keys, monkeypatch, poisoned_memory):
    query, codebooks = torch.randn(1030, 2, 2 * HALF), [torch.randn(2, NUM_SUB_KEYS, HALF) for _ in range(2)]
    for sub_keys in codebooks if change else ():
        change(query, sub_keys)
    sub_keys = codebooks[0] if share_sub_keys else torch.stack(codebooks)
    assert cpu_filter.is_faster(1030, NUM_SUB_KEYS, HALF, TOP_K)
    actual = RETRIEVAL_FUNCTIONS["cpu"](query, sub_keys, TOP_K)
    monkeypatch.setattr(cpu_filter, "is_faster", lambda *sizes: False)
    expected = RETRIEVAL_FUNCTIONS["cpu"](query, sub_keys, TOP_K)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    _, expert_ids = actual
    assert ((expert_ids >= 0) & (expert_ids < NUM_SUB_KEYS**2)).all()


@pytest.mark.parametrize(("num_sub_keys", "half", "top_k"), [(1024, 128, 16), (129, 36, 2), (1600, 100, 32)])
def test_a_token_gives_the_same_bits_alone_and_among_many(num_sub_keys, half, top_k):
    query, sub_keys = torch.randn(600, 2, 2 * half), torch.randn(2, num_sub_keys, half) * half**-0.5
    assert cpu_filter.is_faster(1200, num_sub_keys, half, top_k)
    scores, expert_ids = RETRIEVAL_FUNCTIONS["cpu"](query, sub_keys, top_k)
    for some in (slice(5, 6), slice(100, 140)):  # one by one; in blocks
        some_scores, some_ids = RETRIEVAL_FUNCTIONS["cpu"](query[some], sub_keys, top_k)
        assert torch.equal(scores[some], some_scores)
        assert torch.equal(expert_ids[some], some_ids)


@pytest.mark.parametrize(
    ("change", "num_others"), [(None, 0), (heavy_tails, 0), (near_ties, 0), (many_near_ties, 40), (zeros, 20)]
)
def test_only_rows_with_many_ties_need_every_score(change, num_others):
    query, sub_keys = torch.randn(40, HALF), torch.randn(2, NUM_SUB_KEYS, HALF)
    if change:
        change(query, sub_keys)
    blocks, lengths = cpu_filter.round_sub_keys(array(sub_keys.unsqueeze(0)))
    scores, best, best_keys = torch.empty(40, 256), torch.empty(40, TOP_K), torch.empty(40, TOP_K, dtype=torch.int64)
    results = (array(scores), scratch_for(256), array(best), array(best_keys))
    others = cpu_filter.filtered_top_k(array(query), 40, blocks[0, 0], lengths[0, 0], array(sub_keys[0]), *results)
    assert len(others) == num_others
    assert 256 % BLOCK_KEYS == 0


@pytest.mark.parametrize(
    "sizes",
    [
        (1000, 1024, 128, 16),  # few queries
        (16384, 512, 128, 16),  # few sub-keys for that many experts
        (16384, 4096, 128, 64),  # more candidates than are sorted by counting
        (16384, 1024, 16, 16),  # narrow
        (16384, 1024, 66, 16),  # no multiple of the features that are loaded together
        (16384, 1024, 8192, 16),  # sums too long for the margin
    ],
)
def test_the_filter_stays_out_where_it_does_not_pay(sizes):
    assert not cpu_filter.is_faster(*sizes)

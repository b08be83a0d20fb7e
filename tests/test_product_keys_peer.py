# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product-key retrieval against exhaustive search, in results, gradients and memory."""

import pytest
import reference
import torch

from modeling_peer import product_keys_peer
from modeling_peer.product_keys_peer import product_key_top_k


@pytest.mark.parametrize(
    ("num_sub_keys", "top_k"),
    [
        (1, 1),  # one expert
        (4, 1),  # k = 1: the best of each codebook
        (5, 3),  # odd sizes
        (32, 16),  # the paper's k
        (9, 9),  # k = n: nothing pruned in the first stage
        (64, 64),  # the largest k we promise
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_product_key_top_k_equals_exhaustive_search(num_sub_keys, top_k, shared):
    query = torch.randn(5, 3, 8, dtype=torch.float64)
    sub_keys = torch.randn(*(() if shared else (3,)), 2, num_sub_keys, 4, dtype=torch.float64)
    scores, expert_ids = product_key_top_k(query, sub_keys, top_k)
    expected_scores, expected_ids = reference.exhaustive_top_k(query, sub_keys, top_k)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(expert_ids, expected_ids)  # continuous scores: no ties


@pytest.mark.parametrize(("top_k", "num_candidates"), [(1, 1), (8, 20), (16, 50), (32, 119)])
def test_only_pairs_of_ranks_that_can_win_are_scored(top_k, num_candidates):
    ranks = product_keys_peer._candidate_ranks(top_k)
    assert len(set(ranks)) == len(ranks) == num_candidates
    assert all((i + 1) * (j + 1) <= top_k for i, j in ranks)


def test_product_key_top_k_with_ties_returns_scores_of_the_ids_it_returns():
    query = torch.randint(-1, 2, (6, 2, 8)).float()
    sub_keys = torch.randint(-1, 2, (2, 16, 4)).float()
    scores, expert_ids = product_key_top_k(query, sub_keys, 8)
    expected_scores, _ = reference.exhaustive_top_k(query, sub_keys, 8)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(reference.score_of(query, sub_keys, expert_ids), scores)
    assert all(len(set(ids)) == 8 for ids in expert_ids.flatten(0, 1).tolist()), "an expert was retrieved twice"


@pytest.mark.parametrize("shared", [True, False])
def test_product_key_top_k_gradients_equal_those_of_exhaustive_search(shared):
    query = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(*(() if shared else (2,)), 2, 7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 2, 4, dtype=torch.float64)

    def gradients(top_k_function):
        return torch.autograd.grad((top_k_function(query, sub_keys, 4)[0] * weights).sum(), (query, sub_keys))

    for actual, expected in zip(gradients(product_key_top_k), gradients(reference.exhaustive_top_k), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_scoring_in_tiles_changes_nothing(monkeypatch, num_tokens):
    query, sub_keys = torch.randn(num_tokens, 2, 8), torch.randn(2, 6, 4)
    whole = product_key_top_k(query, sub_keys, 3)
    monkeypatch.setattr(product_keys_peer, "MAX_TILE_SCORES", 5 * 2 * 6)  # five tokens a tile
    tiled = product_key_top_k(query, sub_keys, 3)
    torch.testing.assert_close(tiled[0], whole[0])  # a matrix product rounds differently at another size
    assert torch.equal(tiled[1], whole[1])
    assert tiled[1].dtype == torch.int64


def test_scores_are_float32_in_a_half_precision_model_and_under_autocast(tiny_config):
    query, sub_keys = torch.randn(4, 2, 8).bfloat16(), torch.randn(2, 6, 4).bfloat16()
    expected, _ = product_key_top_k(query.float(), sub_keys.float(), 3)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores, _ = product_key_top_k(query, sub_keys, 3)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, expected)


def test_retrieval_memory_does_not_grow_with_the_scores(monkeypatch):
    sub_keys = torch.randn(2, 512, 8, requires_grad=True)
    monkeypatch.setattr(product_keys_peer, "MAX_TILE_SCORES", 64 * 4 * 512)  # 64 tokens a tile

    def peak(num_tokens):
        query = torch.randn(num_tokens, 4, 16, requires_grad=True)
        return reference.peak_memory(lambda: product_key_top_k(query, sub_keys, 4)[0].sum().backward())

    few, many = peak(128), peak(1024)
    scores_of_one_token = 2 * 4 * 512 * 4  # bytes, both codebooks
    assert (many - few) / (1024 - 128) < scores_of_one_token / 4

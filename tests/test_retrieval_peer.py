"""Retrieval against exhaustive search, and the query BatchNorm's promises."""

import pytest
import reference
import torch

from modeling_peer import retrieval_peer
from modeling_peer.retrieval_peer import PeerBatchNorm, PeerRetrieval, product_key_top_k


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
    ranks = retrieval_peer._candidate_ranks(top_k)
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
    monkeypatch.setattr(retrieval_peer, "MAX_TILE_SCORES", 5 * 2 * 6)  # five tokens a tile
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
    monkeypatch.setattr(retrieval_peer, "MAX_TILE_SCORES", 64 * 4 * 512)  # 64 tokens a tile

    def peak(num_tokens):
        query = torch.randn(num_tokens, 4, 16, requires_grad=True)
        return reference.peak_memory(lambda: product_key_top_k(query, sub_keys, 4)[0].sum().backward())

    few, many = peak(128), peak(1024)
    scores_of_one_token = 2 * 4 * 512 * 4  # bytes, both codebooks
    assert (many - few) / (1024 - 128) < scores_of_one_token / 4


def masked_batch_norm_reference(query, mask, norm):
    """Plain formula on the real tokens alone."""
    real = query[mask]
    mean, variance = real.mean(0), real.var(0, correction=0)
    return (query - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def batch_norm(num_features=6):
    norm = PeerBatchNorm(num_features)
    norm.reset_parameters()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def test_batch_norm_without_padding_equals_pytorch():
    ours, query = batch_norm(), torch.randn(9, 6)
    theirs = torch.nn.BatchNorm1d(6)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        torch.testing.assert_close(ours(query), theirs(query))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours(query), theirs(query))


def test_batch_norm_ignores_padding_in_output_statistics_and_gradients():
    norm, mask = batch_norm(), torch.tensor([True, False, True, True, False, True])
    query = torch.randn(6, 6, dtype=torch.float32, requires_grad=True)
    output = norm(query, mask)
    expected = masked_batch_norm_reference(query, mask, norm)
    torch.testing.assert_close(output, expected)
    weights = torch.randn(6, 6) * mask.unsqueeze(1)
    gradients = [torch.autograd.grad((o * weights).sum(), query, retain_graph=True)[0] for o in (output, expected)]
    torch.testing.assert_close(*gradients)

    other = batch_norm()
    other.load_state_dict({**norm.state_dict(), "running_mean": torch.zeros(6), "running_var": torch.ones(6)})
    other(torch.where(mask.unsqueeze(1), query, torch.full_like(query, 1e6)), mask)
    torch.testing.assert_close(other.running_mean, norm.running_mean)
    torch.testing.assert_close(other.running_var, norm.running_var)


@pytest.mark.parametrize("mask", [[True], [False], [False, True, False], [False, False]])
def test_batch_norm_with_fewer_than_two_tokens_uses_the_running_statistics(mask):
    norm, mask = batch_norm(), torch.tensor(mask)
    query = torch.randn(len(mask), 6, requires_grad=True)
    before = norm.running_mean.clone(), norm.running_var.clone()
    output = norm(query, mask)
    output.sum().backward()
    torch.testing.assert_close(output, norm.eval()(query))
    assert torch.isfinite(query.grad).all()
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_batch_norm_with_no_token_at_all():
    assert batch_norm()(torch.empty(0, 6)).shape == (0, 6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_batch_norm_counts_once_under_gradient_checkpointing(use_reentrant):
    plain, checkpointed = batch_norm(), batch_norm()
    checkpointed.load_state_dict(plain.state_dict())
    query = torch.randn(8, 6, requires_grad=True)
    plain(query).square().sum().backward()
    plain_gradient, query.grad = query.grad, None
    output = torch.utils.checkpoint.checkpoint(checkpointed, query, use_reentrant=use_reentrant)
    output.square().sum().backward()
    torch.testing.assert_close(checkpointed.running_mean, plain.running_mean)
    torch.testing.assert_close(checkpointed.running_var, plain.running_var)
    torch.testing.assert_close(query.grad, plain_gradient)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_batch_norm_keeps_float32_statistics_when_the_module_is_cast(cast):
    norm = batch_norm()
    norm(torch.randn(9, 6) * 3 + 1.2345678)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for name, tensor in cast(norm).state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, before[name]), name
    assert norm.double().running_mean.dtype == torch.float64  # more precision is welcome


def test_a_frozen_batch_norm_acts_as_in_evaluation():
    """Under an adapter its statistics would move, and not be saved with the adapter."""
    norm, query = batch_norm(), torch.randn(9, 6)
    norm.requires_grad_(False).train()
    before = norm.running_mean.clone()
    output = norm(query)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(output, norm.eval()(query))


@pytest.mark.parametrize("query_norm", ["batch_norm", "rms_norm", "layer_norm", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_query_norm_works_in_a_model_cast_to_half_precision(tiny_config, query_norm, dtype):
    retrieval = PeerRetrieval(tiny_config(query_norm=query_norm))
    retrieval.reset_parameters()
    hidden = torch.randn(3, 5, 32)
    expected, _ = retrieval(hidden)
    gates, _ = retrieval.to(dtype)(hidden.to(dtype))
    assert all(tensor.dtype == torch.float32 for tensor in retrieval.query_norm.state_dict().values())
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sort().values, expected.sort().values, rtol=0, atol=0.05)  # inputs were rounded


def test_batch_norm_is_causal_in_evaluation(tiny_config):
    retrieval = PeerRetrieval(tiny_config())
    retrieval.reset_parameters()
    retrieval(torch.randn(4, 10, 32))  # statistics that are not the initial ones
    retrieval.eval()
    hidden = torch.randn(1, 10, 32)
    gates, expert_ids = retrieval(hidden)
    hidden[:, 6:] += 5
    changed_gates, changed_ids = retrieval(hidden)
    assert torch.equal(gates[:, :6], changed_gates[:, :6])
    assert torch.equal(expert_ids[:, :6], changed_ids[:, :6])

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The query BatchNorm's promises, and the query norms in half precision."""

import pytest
import torch

from modeling_peer.query_norms_peer import PeerBatchNorm
from modeling_peer.retrieval_peer import PeerRetrieval


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


def test_batch_norm_with_a_mask_of_real_tokens_equals_the_one_without():
    results = []
    for mask in (None, torch.ones(9, dtype=torch.bool)):
        torch.manual_seed(0)
        norm, queries = batch_norm(), [torch.randn(9, 6, requires_grad=True) for _ in range(2)]
        # The backward of the first after the forward of the second, as between micro-batches of a pipeline.
        first, second = (norm(query, mask) for query in queries)
        first.square().sum().backward()
        second.sin().sum().backward()
        gradients = [tensor.grad for tensor in (*queries, norm.weight, norm.bias)]
        results.append([first, second, norm.running_mean, norm.running_var, *gradients])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


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

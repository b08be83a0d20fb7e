# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sparsely gated mixtures against their oracles, and what their routers promise."""

import math

import pytest
import reference
import torch

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.top_k_moe_peer import PeerTopKMoe

NOISY = {"moe_router": "noisy_top_k"}
SWITCH = {"moe_router": "switch"}
ROUTERS = pytest.mark.parametrize("router", [NOISY, SWITCH], ids=["noisy_top_k", "switch"])


@pytest.fixture
def new_layer(tiny_config):
    """Builds a float64 layer with routers that are not the trivial initial ones."""

    def build(**fields):
        layer = PeerTopKMoe(tiny_config(sparse_mlp="top_k_moe", moe_intermediate_size=8, **fields)).double()
        with torch.no_grad():
            for weight in layer.router.parameters():
                weight.normal_(std=0.3)
            for weight in layer.experts.parameters():
                weight.normal_(std=0.3)
        return layer

    return build


def run(layer, hidden, token_mask=None):
    aux_losses = AuxiliaryLosses()
    output = layer(hidden, token_mask, aux_losses)
    return output, aux_losses.total


def assert_equal_with_gradients(layer, hidden, result, expected):
    leaves = dict(layer.named_parameters()) | {"hidden_states": hidden}

    def gradients(output, loss):
        return torch.autograd.grad(output.square().sum() + loss, list(leaves.values()), allow_unused=True)

    torch.testing.assert_close(result, expected)
    for name, gradient, expected_gradient in zip(leaves, gradients(*result), gradients(*expected), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, msg=lambda m, name=name: f"{name}: {m}")
        if layer.training:
            assert expected_gradient.any(), f"{name} gets no gradient: the case shows nothing"


MASK = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]).bool()


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_moe_experts": 5, "num_moe_experts_per_token": 2},
        {"num_moe_experts": 5, "num_moe_experts_per_token": 1},  # its gate is 1
        {"num_moe_experts": 5, "num_moe_experts_per_token": 4},
        {"num_moe_experts": 3, "num_moe_experts_per_token": 3},  # nothing to choose, and no load loss
        {"num_moe_experts": 20, "num_moe_experts_per_token": 2},  # fewer tokens than experts
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_noisy_top_k_and_every_gradient_equal_the_papers_equations(new_layer, sizes, training):
    layer = new_layer(**NOISY, **sizes).train(training)
    hidden = torch.randn(8, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    result = run(layer, hidden, MASK)
    torch.manual_seed(1)
    noise = torch.randn(8, sizes["num_moe_experts"], dtype=torch.float64) if training else None
    expected = reference.noisy_top_k_moe(layer, hidden, MASK, noise)
    assert_equal_with_gradients(layer, hidden, result, expected)


@pytest.mark.parametrize(
    ("fields", "capacity"),
    [
        ({"num_moe_experts": 2}, 4),  # ceil(6 / 2 * 1.25)
        ({"num_moe_experts": 2, "moe_capacity_factor": 0.5}, 2),
        ({"num_moe_experts": 2, "moe_capacity_factor": 0.01}, 1),
        ({"num_moe_experts": 12}, 1),
        ({"num_moe_experts": 1}, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_switch_and_every_gradient_equal_the_papers_equations(new_layer, fields, capacity, training):
    layer = new_layer(**SWITCH, **fields).train(training)
    hidden = torch.randn(8, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    result = run(layer, hidden, MASK)
    torch.manual_seed(1)
    in_training = {"jitter": torch.empty(8, 32, dtype=torch.float64).uniform_(0.99, 1.01), "capacity": capacity}
    expected = reference.switch_moe(layer, hidden, MASK, **(in_training if training else {}))
    if fields == {"num_moe_experts": 1}:  # nothing to choose: the router has no gradient
        torch.testing.assert_close(result, expected)
    else:
        assert_equal_with_gradients(layer, hidden, result, expected)


def test_the_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again(new_layer):
    """Shazeer et al. 2017, eq. 8, by drawing."""
    layer = new_layer(**NOISY, num_moe_experts=5)
    x, draws = torch.randn(1, 32, dtype=torch.float64), 20_000
    noise = torch.randn(1, 5, dtype=torch.float64)
    std = (x @ layer.router.noise_weight.T).exp().log1p() + 0.01
    scores = x @ layer.router.score_weight.T
    for expert in range(5):
        noisy = (scores + noise * std).repeat(draws, 1)
        noisy[:, expert] = scores[0, expert] + torch.randn(draws, dtype=torch.float64) * std[0, expert]
        frequency = (noisy.topk(2).indices == expert).any(1).double().mean()
        best, expert_ids = (scores + noise * std).sort(descending=True)
        load = layer.router._load(scores, std, best, expert_ids[:, :2])[0, expert]
        assert abs(load - frequency) < 0.015  # four standard deviations of such a frequency


def test_an_expert_takes_the_earlier_tokens_and_the_others_pass_by(new_layer):
    layer = new_layer(**SWITCH, num_moe_experts=4, moe_capacity_factor=1.0)
    hidden = torch.randn(1, 32, dtype=torch.float64).repeat(10, 1)  # all choose the same expert
    real = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
    written = layer(hidden, real).any(1)
    assert written[real].tolist() == [True, True] + [False] * 6  # 8 / 4 places
    assert layer.eval()(hidden, real).any(1).all()


def test_later_tokens_and_padding_change_nothing_in_training_with_a_capacity(new_layer):
    """But for their number, which the capacity depends on."""
    layer = new_layer(**SWITCH, num_moe_experts=4, moe_capacity_factor=0.5)
    hidden = torch.randn(2, 8, 32, dtype=torch.float64)
    changed, real = hidden.clone(), torch.ones(2, 8).bool()
    real[:, :2] = False
    changed[1, 5:] += 1
    changed[:, :2] += 1

    def output(x):
        torch.manual_seed(1)
        return layer(x, real)

    same = real.clone()
    same[1, 5:] = False
    before, after = output(hidden), output(changed)
    assert not before[same].any(1).all()
    torch.testing.assert_close(after[same], before[same])


@pytest.mark.parametrize(("router", "even", "collapsed"), [(NOISY, 0, 2 * (4 - 1)), (SWITCH, 1, 4)])
def test_the_ends_of_the_scale_of_the_auxiliary_losses(new_layer, router, even, collapsed):
    layer = new_layer(**router, num_moe_experts=4, num_moe_experts_per_token=1).eval()
    axes = 40 * torch.eye(4, 32, dtype=torch.float64)
    with torch.no_grad():
        for weight in layer.router.parameters():
            weight.copy_(torch.eye(4, 32))
    assert math.isclose(run(layer, axes)[1].item(), even, abs_tol=1e-9)
    assert math.isclose(run(layer, axes[:1].repeat(4, 1))[1].item(), collapsed, rel_tol=1e-8)


@ROUTERS
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_a_real_token_everything_is_finite(new_layer, router, num_tokens):
    layer = new_layer(**router)
    hidden = torch.randn(num_tokens, 32, dtype=torch.float64, requires_grad=True)
    output, loss = run(layer, hidden, torch.zeros(num_tokens).bool())
    (output.square().sum() + loss).backward()
    assert output.shape == hidden.shape
    assert all(torch.isfinite(values).all() for values in (loss, hidden.grad))
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_noise_spreads_the_tokens_of_a_new_layer_and_a_switch_starts_near_even(tiny_config):
    hidden = torch.randn(1000, 32)
    for router, even, tolerance in ((NOISY, 0, 0.02), (SWITCH, 1, 0.02)):
        _, loss = run(PeerTopKMoe(tiny_config(sparse_mlp="top_k_moe", **router)), hidden)
        assert abs(loss.item() - even) < tolerance, router


@ROUTERS
def test_descending_the_auxiliary_loss_evens_out_a_collapsed_router(new_layer, router):
    layer = new_layer(**router, num_moe_experts=4)
    hidden = torch.randn(200, 32, dtype=torch.float64)
    hidden[:, 0] = 1
    with torch.no_grad():
        layer.router.get_parameter("score_weight" if router is NOISY else "weight")[0, 0] += 8
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.1)

    def largest_share():
        expert_ids, _ = layer.eval().router(hidden, torch.ones(200).bool())
        return (expert_ids.flatten().bincount() / expert_ids.numel()).max().item()

    before = largest_share()
    for _ in range(100):
        _, loss = run(layer.train(), hidden)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > (0.49 if router is NOISY else 0.9)  # of two experts a token, one is always it
    assert largest_share() < 0.35


@ROUTERS
@pytest.mark.parametrize("autocast", [True, False])
def test_routing_is_computed_in_float32_in_half_precision(tiny_config, router, autocast):
    layer = PeerTopKMoe(tiny_config(sparse_mlp="top_k_moe", **router)).eval()
    for weight in layer.router.parameters():
        torch.nn.init.normal_(weight)
        weight.data = weight.data.bfloat16().float()
    hidden = torch.randn(200, 32).bfloat16()
    expected_ids, expected_gates = layer.router(hidden.float(), torch.ones(200).bool())
    if not autocast:
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expert_ids, gates = layer.router(hidden, torch.ones(200).bool())
        output, loss = run(layer, hidden.float() if autocast else hidden)
    assert gates.dtype == loss.dtype == torch.float32
    assert torch.equal(expert_ids, expected_ids)
    torch.testing.assert_close(gates, expected_gates)
    assert output.dtype == (torch.float32 if autocast else torch.bfloat16)


@ROUTERS
def test_of_equal_scores_the_first_experts_win(new_layer, router):
    layer = new_layer(**router).eval()
    with torch.no_grad():
        for weight in layer.router.parameters():
            weight.zero_()
    expert_ids, gates = layer.router(torch.randn(50, 32, dtype=torch.float64), torch.ones(50).bool())
    assert expert_ids.unique(dim=0).tolist() == [list(range(expert_ids.shape[1]))]
    assert gates.unique().tolist() == [0.5 if router is NOISY else 1 / 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_moe_experts_per_token": 9}, r"num_moe_experts_per_token \(9\) exceeds num_moe_experts \(8\)"),
        ({"num_moe_experts": 0}, "num_moe_experts must be at least 1, got 0"),
        ({"moe_capacity_factor": 0}, "moe_capacity_factor must be above 0, got 0"),
        ({"moe_router": "top_1"}, "moe_router"),
        ({"balance_loss": "switch"}, "balance_loss='switch' evens out product keys"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(tiny_config, fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(sparse_mlp="top_k_moe", **fields)


def test_a_switch_of_one_expert_is_allowed(tiny_config):
    """`num_moe_experts_per_token` is the other router's."""
    assert tiny_config(sparse_mlp="top_k_moe", moe_router="switch", num_moe_experts=1).num_moe_experts == 1

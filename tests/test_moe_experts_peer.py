# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Coarse experts: Transformers' implementations against one expert after the other, and which of them runs."""

import copy

import pytest
import reference
import torch
from model_helpers import grouped_gradients_compile
from transformers import AutoModelForCausalLM

from modeling_peer import PeerForCausalLM
from modeling_peer.moe_experts_peer import PeerMoeExperts

ROUTES = {
    "every expert": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 3]]),
    "all tokens on two experts": torch.tensor([[2, 0]] * 5),
    "fewer tokens than experts": torch.tensor([[3, 1]]),
    "no token": torch.empty(0, 2, dtype=torch.long),
}


def new_experts(config):
    experts = PeerMoeExperts(config)
    experts.reset_parameters()
    return experts


def output_and_gradients(function, *leaves):
    output = function()
    return output, *torch.autograd.grad(output.double().square().sum(), leaves)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_eager_and_every_gradient_equal_each_tokens_own_mlps(tiny_config, route):
    experts = new_experts(tiny_config(num_moe_experts=4, moe_intermediate_size=7)).double()
    hidden = torch.randn(len(route), 32, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(route.shape, dtype=torch.float64, requires_grad=True)
    leaves = hidden, gates, *experts.parameters()
    experts.config._experts_implementation = "eager"

    def loop():
        written = [
            sum(gate * reference.moe_expert(experts, i, x) for i, gate in zip(ids, token_gates, strict=True))
            for x, ids, token_gates in zip(hidden, route.tolist(), gates, strict=True)
        ]
        return torch.stack(written) if written else sum(0 * leaf.sum() for leaf in leaves) + hidden

    torch.testing.assert_close(
        output_and_gradients(lambda: experts(hidden, route, gates), *leaves), output_and_gradients(loop, *leaves)
    )


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm", None])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_implementations_agree(tiny_config, implementation, route):
    experts = new_experts(tiny_config(num_moe_experts=4))
    hidden = torch.randn(len(route), 32, requires_grad=True)
    gates = torch.rand(route.shape, requires_grad=True)
    with torch.no_grad():
        gates[::2, 0] = 0  # dropped tokens have such gates

    def run(name):
        experts.config._experts_implementation = name
        return output_and_gradients(lambda: experts(hidden, route, gates), hidden, gates, *experts.parameters())

    torch.testing.assert_close(run(implementation), run("eager"))


@pytest.mark.parametrize("num_moe_experts", [1, 3])
def test_a_single_expert_and_a_single_token(tiny_config, num_moe_experts):
    experts = new_experts(tiny_config(num_moe_experts=num_moe_experts))
    x, last = torch.randn(1, 32), num_moe_experts - 1
    output = experts(x, torch.tensor([[last]]), torch.ones(1, 1))
    torch.testing.assert_close(output[0], reference.moe_expert(experts, last, x[0]))


def test_slots_go_through_the_experts_that_own_them(tiny_config):
    experts = new_experts(tiny_config(num_moe_experts=3)).double()
    slots = torch.randn(3, 2, 32, dtype=torch.float64)
    expected = [[reference.moe_expert(experts, i, x) for x in slots[i]] for i in range(3)]
    torch.testing.assert_close(experts.of_slots(slots), torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize(
    ("dtype", "width", "compiled"),
    [
        (torch.float32, 64, False),  # grouped
        (torch.float32, 7, False),  # rows of 28 bytes, where torch's grouped products ask for multiples of 16
        (torch.bfloat16, 4, False),
        (torch.float64, 64, False),  # which they do not know
        # one expert after the other would not compile to one graph
        pytest.param(torch.float32, 7, True, marks=grouped_gradients_compile),
    ],
    ids=str,
)
def test_unset_any_width_and_precision_is_computed(tiny_config, dtype, width, compiled):
    experts = new_experts(tiny_config(num_moe_experts=3, moe_intermediate_size=width)).to(dtype)
    hidden, ids, gates = torch.randn(5, 32, dtype=dtype), torch.randint(3, (5, 2)), torch.rand(5, 2)
    run = torch.compile(experts, fullgraph=True, backend="aot_eager") if compiled else experts
    output = run(hidden, ids, gates)
    expected = torch.stack(
        [
            sum(gate * reference.moe_expert(experts.double(), i, x) for i, gate in zip(*routes, strict=True))
            for x, *routes in zip(hidden.double(), ids.tolist(), gates.double(), strict=True)
        ]
    )
    assert output.dtype == dtype
    # bfloat16 has 8 bits: measured 2e-3 of values up to 0.03
    tolerance = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(output.double(), expected, **tolerance)


def test_autocast_computes_experts_as_a_model_of_half_precision_does(tiny_config):
    experts = new_experts(tiny_config(num_moe_experts=3, moe_intermediate_size=8))
    hidden, ids, gates = torch.randn(5, 32), torch.randint(3, (5, 2)), torch.rand(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output, *gradients = output_and_gradients(lambda: experts(hidden, ids, gates), *experts.parameters())
    half = copy.deepcopy(experts).bfloat16()
    assert output.dtype == torch.float32
    assert torch.equal(output.bfloat16(), half(hidden.bfloat16(), ids, gates))
    assert all(g.dtype == torch.float32 and g.any() for g in gradients)


def test_coarse_mixtures_take_transformers_implementations_and_not_those_of_product_keys(tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config(sparse_mlp="top_k_moe"), experts_implementation="batched_mm")
    assert model.get_experts_implementation() == {"": "batched_mm"}
    with pytest.raises(ValueError, match=r'"cpu" does not compute experts that are whole MLPs.*batched_mm'):
        model.set_experts_implementation("cpu")
    with pytest.raises(ValueError, match=r'"triton" does not compute experts that are whole MLPs'):
        PeerForCausalLM(tiny_config(sparse_mlp="top_k_moe", experts_implementation="triton"))
    tokens = torch.arange(1, 7).unsqueeze(0)
    expected = model.eval()(tokens).logits
    for name in ("grouped_mm", "eager", None):
        model.set_experts_implementation(name)
        assert model.get_experts_implementation() == {"": name}
        torch.testing.assert_close(model(tokens).logits, expected)
    with pytest.raises(ValueError, match=r'"grouped_mm" is not available here, for product keys'):
        PeerForCausalLM(tiny_config()).set_experts_implementation("grouped_mm")

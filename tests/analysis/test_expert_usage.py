# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Figures of expert usage against loops, against values worked out by hand, and from what a model really retrieved."""

import math

import pytest
import reference
import torch

from modeling_peer import PeerForCausalLM
from modeling_peer.analysis.expert_usage import ExpertUsage, expert_usage, unevenness


@pytest.mark.parametrize(
    ("gate_sums", "usage", "divergence"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0),
        ([0.0, 3.0, 0.0, 0.0], 0.25, math.log(4)),  # all on one
        ([2.0, 2.0, 0.0, 0.0], 0.5, math.log(2)),  # half of them, evenly
        ([0.5, 0.25, 0.25, 0.0], 0.75, math.log(4) - 1.5 * math.log(2)),  # an entropy of one and a half bits
    ],
)
def test_usage_and_unevenness_of_small_pools(gate_sums, usage, divergence):
    gate_sums = torch.tensor(gate_sums)
    assert expert_usage(gate_sums).item() == usage
    assert unevenness(gate_sums).item() == pytest.approx(divergence, abs=1e-7)
    assert unevenness(1e6 * gate_sums).item() == pytest.approx(divergence, abs=1e-6)  # a matter of shares


def test_unevenness_of_a_million_experts_is_as_good_as_in_float64():
    gate_sums = torch.rand(1024**2).square()
    shares = gate_sums.double() / gate_sums.double().sum()
    expected = math.log(1024**2) + torch.special.xlogy(shares, shares).sum()
    assert unevenness(gate_sums).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("shape", [(7,), (2, 5)])  # tokens in a row; a batch of sequences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_equals_the_loops(shape, dtype):
    usage, forwards = ExpertUsage(20), []
    for _ in range(3):
        gates = torch.rand(*shape, 2, 4).sort(descending=True).values.to(dtype)
        forwards.append((gates, torch.randint(20, gates.shape), torch.rand(shape) < 0.7))
        usage.add(*forwards[-1])
    assert usage.measure() == pytest.approx(reference.expert_usage(forwards, 20), rel=1e-6)


def test_without_a_mask_every_token_counts_and_without_tokens_there_is_nothing_to_say():
    usage = ExpertUsage(4)
    gates, expert_ids = torch.tensor([[[0.75, 0.25]]]), torch.tensor([[[3, 1]]])
    usage.add(gates[:0], expert_ids[:0])
    usage.add(gates, expert_ids, torch.tensor([False]))
    assert usage.measure() == {}
    usage.add(gates, expert_ids)
    figures = usage.measure()
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert figures.pop("unevenness") == pytest.approx(math.log(4) - entropy)
    assert figures == {"expert_usage": 0.5, "top_1_usage": 0.25, "dead_experts": 2}
    usage.reset()
    assert usage.measure() == {}


def test_a_models_outputs_can_be_measured(tiny_config):
    model = PeerForCausalLM(tiny_config()).eval()
    outputs = model(torch.randint(1, 99, (2, 12)), output_expert_ids=True, output_expert_gates=True)
    usage = ExpertUsage(model.config.num_peer_experts)
    usage.add(outputs.expert_gates[0], outputs.expert_ids[0])
    assert usage.measure()["dead_experts"] == 64 - len(outputs.expert_ids[0].unique())

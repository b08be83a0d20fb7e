# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Statistics of routing against loops over sets, and against values worked out by hand."""

import math

import pytest
import torch

from modeling_peer.analysis import statistics
from modeling_peer.analysis.statistics import (
    co_activation,
    gate_entropy,
    head_overlap,
    heat_map,
    means_by_power_of_two,
    routing_consistency,
    usage_table,
)


def some_ids(num_tokens=30, heads=3, active=4, num_experts=12):
    """Different experts within a head, as product keys give; heads may agree."""
    return torch.rand(num_tokens, heads, num_experts).argsort(-1)[..., :active]


@pytest.fixture(params=[2**25, 50], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(statistics, "TILE_PAIRS", request.param)


@pytest.mark.usefixtures("tiles")
def test_overlap_of_heads_equals_the_sets():
    ids = some_ids()
    overlap = head_overlap(ids)
    for a in range(3):
        for b in range(3):
            shared = [len(set(token[a].tolist()) & set(token[b].tolist())) for token in ids]
            assert overlap[a, b].item() == pytest.approx(sum(shared) / (30 * 4))
    assert torch.equal(overlap.diagonal(), torch.ones(3))


@pytest.mark.usefixtures("tiles")
def test_co_activation_equals_the_sets_and_a_gate_of_zero_is_no_retrieval():
    ids = some_ids()
    gates = torch.rand(ids.shape)
    gates[gates < 0.3] = 0.0
    experts = torch.tensor([2, 5, 11])
    counts, lift = co_activation(ids, gates, experts, 12)
    used = [set(ids[t][gates[t] > 0].tolist()) for t in range(30)]
    for i, first in enumerate(experts.tolist()):
        for j, second in enumerate(experts.tolist()):
            both = sum({first, second} <= experts_used for experts_used in used)
            assert counts[i, j] == both
            single = [sum(one in experts_used for experts_used in used) for one in (first, second)]
            assert lift[i, j].item() == pytest.approx(both * 30 / (single[0] * single[1]))
    assert co_activation(ids, torch.zeros(ids.shape), experts, 12)[1].isnan().all()


def test_entropy_of_gates_of_any_sum():
    gates = torch.tensor([[[0.25, 0.25, 0.25, 0.25]], [[1.0, 0.0, 0.0, 0.0]], [[0.9, 0.9, 0.0, 0.0]]])
    expected = torch.tensor([[math.log(4)], [0.0], [math.log(2)]])
    torch.testing.assert_close(gate_entropy(gates), expected)
    assert gate_entropy(torch.zeros(1, 1, 4)).item() == 0.0


def test_means_are_grouped_by_powers_of_two():
    rows = means_by_power_of_two(torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0]), torch.tensor([0, 1, 2, 3, 8]))
    assert rows == [
        {"from": 0, "to": 0, "tokens": 1, "mean": 1.0},
        {"from": 1, "to": 1, "tokens": 1, "mean": 2.0},
        {"from": 2, "to": 3, "tokens": 2, "mean": 6.0},
        {"from": 8, "to": 15, "tokens": 1, "mean": 6.0},
    ]


@pytest.mark.usefixtures("tiles")
def test_consistency_is_one_where_a_token_decides_its_experts_and_chance_where_it_does_not():
    tokens = torch.arange(8).repeat(25)
    fixed = some_ids(8)[tokens]
    table, chance = routing_consistency(fixed, tokens)
    assert table["token"].tolist() == list(range(8))
    assert table["pairs"].tolist() == [24] * 8
    assert torch.equal(table["overlap"], torch.ones(8))
    assert chance < 0.6
    table, chance = routing_consistency(some_ids(200), tokens)
    # 4 of 12 experts overlap by a third on average; 192 pairs of 3 heads with a standard deviation of 0.2 each
    assert table["overlap"].mean().item() == pytest.approx(1 / 3, abs=0.06)
    assert chance == pytest.approx(1 / 3, abs=0.06)
    assert routing_consistency(some_ids(3), torch.arange(3))[0]["token"].tolist() == []


def test_a_heat_map_is_the_grid_or_the_means_of_its_blocks():
    values = torch.arange(16.0)
    assert torch.equal(heat_map(values), values.view(4, 4))
    assert heat_map(values, max_size=2).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert heat_map(values, max_size=3).shape == (2, 2)  # blocks of 2 x 2: no cell is a fraction of an expert
    odd = heat_map(torch.tensor([3.0, 1.0, 2.0]))  # coarse experts need not be a square
    assert odd[0].tolist() == [3.0, 1.0]
    assert odd[1, 0] == 2
    assert odd[1, 1].isnan()
    uneven = heat_map(torch.ones(25), max_size=2)  # blocks of 3 x 3, of which some reach beyond the grid
    assert uneven.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_usage_has_a_row_for_all_heads_and_one_for_each():
    sums = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    best = torch.tensor([[1, 0, 0, 0], [0, 2, 0, 0]])
    layer = type("Layer", (), {"gate_sums": sums, "best_counts": best, "num_heads": 2})
    every, first, second = usage_table(layer)
    assert every["expert_usage"] == 0.5
    assert every["top_1_usage"] == 0.5
    assert every["dead_experts"] == 2
    assert every["unevenness"] == pytest.approx(math.log(4) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert first["unevenness"] == pytest.approx(math.log(2))
    assert first["top_1_usage"] == 0.25
    assert second == {
        "head": "1", "expert_usage": 0.25, "unevenness": pytest.approx(math.log(4)), "top_1_usage": 0.25,
        "dead_experts": 3,
    }  # fmt: skip

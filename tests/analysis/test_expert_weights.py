# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Similarity of experts and norms against gates: against the layers themselves, and where the answer is known."""

import math

import pytest
import torch
from test_routing_hooks import tiny_mixtral

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.analysis.expert_weights import (
    expert_outputs,
    expert_vectors,
    gate_vectors,
    gates_against_weights,
    last_layer_outlier,
    norms_against_gates,
    output_similarity,
    weight_similarity,
)
from modeling_peer.analysis.routing_hooks import find_routed_layers

KINDS = [
    {},
    {"gated_experts": True, "expert_act": "silu"},
    {"sparse_mlp": "product_key_memory"},
    {"sparse_mlp": "top_k_moe", "num_moe_experts": 5},
    {"sparse_mlp": "top_k_moe", "num_moe_experts": 5, "moe_router": "switch"},
    {"sparse_mlp": "expert_choice_moe", "num_moe_experts": 5},
]


def routed_layer(tiny_config, **changes):
    return find_routed_layers(PeerForCausalLM(tiny_config(**changes)).eval())[0]


@pytest.mark.parametrize("changes", KINDS)
def test_outputs_times_gates_are_what_the_experts_return(tiny_config, changes):
    layer = routed_layer(tiny_config, **changes)
    hidden, gates = torch.randn(7, 32), torch.rand(7, 3)
    ids = torch.rand(7, layer.num_experts).argsort(1)[:, :3]
    outputs, neurons = expert_outputs(layer, hidden, ids)
    with torch.no_grad():
        torch.testing.assert_close((gates.unsqueeze(-1) * outputs).sum(1), layer.experts(hidden, ids, gates))
    width = 1 if layer.has_single_neurons else layer.experts.down_proj.shape[2]
    assert neurons.shape == (7, 3, width)


def test_a_mixtral_has_the_same_measurements():
    layer = find_routed_layers(tiny_mixtral())[1]
    hidden, ids = torch.randn(9, 32), torch.tensor([[0, 2]]).expand(9, 2)
    with torch.no_grad():
        outputs, _ = expert_outputs(layer, hidden, ids)
        torch.testing.assert_close(outputs.sum(1), layer.experts(hidden, ids, torch.ones(9, 2)))
    assert set(weight_similarity(layer)) == {"gate_proj", "up_proj", "down_proj"}
    assert set(gates_against_weights(layer)) == {"gate_proj", "up_proj", "down_proj"}
    norms = norms_against_gates(layer, hidden, ids.unsqueeze(1), torch.ones(9, 1, 2))
    assert torch.tensor(norms["rank_counts"]).shape == (3, 3)  # all experts are ranked, not only the chosen ones
    assert torch.tensor(norms["rank_counts"]).sum(1).tolist() == [9, 9, 9]


@pytest.mark.parametrize("share", [True, False])
def test_gate_vectors_score_a_query_as_the_product_keys_do(tiny_config, share):
    layer = routed_layer(tiny_config, share_sub_keys=share)
    retrieval = layer.parent.retrieval
    query, ids = torch.randn(16), torch.tensor([0, 9, 63])
    vectors = gate_vectors(layer, ids).view(3, 1 if share else 2, 16)
    keys = retrieval.sub_keys.detach() if share else retrieval.sub_keys.detach()[1]
    expected = [query[:8] @ keys[0, i // 8] + query[8:] @ keys[1, i % 8] for i in ids.tolist()]
    torch.testing.assert_close(vectors[:, -1] @ query, torch.stack(expected))


def test_weights_that_follow_the_gates_are_explained_by_them(tiny_config):
    layer = routed_layer(tiny_config, query_dim=32)
    assert gates_against_weights(layer)["down_embed"] < 0.05  # drawn independently: 2,016 pairs
    with torch.no_grad():
        layer.experts.down_embed.copy_(gate_vectors(layer, torch.arange(64)))
    found = gates_against_weights(layer)
    assert found["down_embed"] == pytest.approx(1.0, abs=1e-5)
    assert found["up_embed"] < 0.05


def test_similar_weights_are_found(tiny_config):
    layer = routed_layer(tiny_config)
    found = weight_similarity(layer)["up_embed"]
    assert abs(found["mean"]) < 0.03
    assert found["mean_absolute"] == pytest.approx(found["expected"], rel=0.1)
    with torch.no_grad():
        layer.experts.up_embed[1:] = layer.experts.up_embed[0]
    assert weight_similarity(layer)["up_embed"]["mean"] == pytest.approx(1.0, abs=1e-5)


def test_rows_of_quantised_tables_are_their_values(tiny_config):
    model = PeerForCausalLM(tiny_config()).eval()
    ids = torch.tensor([5, 60])
    before = expert_vectors(find_routed_layers(model)[0], ids)["up_embed"]
    after = expert_vectors(find_routed_layers(quantise_expert_tables(model, "int8"))[0], ids)["up_embed"]
    torch.testing.assert_close(after, before, atol=before.abs().max().item() / 127, rtol=0)


def test_gates_that_follow_the_norms_have_a_rank_correlation_of_one(tiny_config):
    layer = routed_layer(tiny_config, expert_act="identity")  # GELU makes many outputs zero, and zeros have no order
    hidden, ids = torch.randn(20, 32), torch.rand(20, 2, 64).argsort(-1)[..., :4]
    norms = expert_outputs(layer, hidden, ids.flatten(1))[0].norm(dim=-1).view(ids.shape)
    found = norms_against_gates(layer, hidden, ids, norms)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["top_has_largest"] == 1.0
    assert found["rank_counts"] == [[40 if i == j else 0 for j in range(4)] for i in range(4)]
    assert norms_against_gates(layer, hidden, ids, -norms)["rank_correlation"] == pytest.approx(-1.0)
    assert 0.5 < found["active_neurons"] <= 1.0


def test_outputs_of_experts_that_write_alike_are_similar_and_repeats_do_not_count(tiny_config):
    layer = routed_layer(tiny_config, sparse_mlp="product_key_memory")
    with torch.no_grad():
        layer.experts.up_embed.copy_(torch.eye(64)[:, :32].roll(1, 0))
        layer.experts.up_embed[:4] = 1.0
    hidden = torch.zeros(2, 32)
    same = output_similarity(layer, hidden, torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]))
    assert same["chosen"] == pytest.approx(1.0)
    repeated = output_similarity(layer, hidden, torch.tensor([[0, 0, 0, 1], [20, 20, 21, 21]]))
    assert repeated["chosen"] == pytest.approx((1.0 + 0.0) / 2)  # one pair of each token
    assert math.isnan(output_similarity(layer, hidden, torch.tensor([[7], [7]]))["chosen"])


@pytest.mark.parametrize(
    ("values", "outlier"),
    [
        ([0.1, 0.3, 0.6], True),
        ([0.3, 0.1, -0.2], True),
        ([0.1, 0.3, 0.4], False),  # beyond the others, by less than they differ
        ([0.1, 0.1005, 0.102], False),  # by less than counts
        ([0.1, 0.3, 0.2], False),
        ([0.1, 0.3], None),
        ([0.1], None),
    ],
)
def test_the_last_layer_is_an_outlier_if_it_stands_far_outside_the_range_of_the_others(values, outlier):
    assert last_layer_outlier(values)["outlier"] is outlier

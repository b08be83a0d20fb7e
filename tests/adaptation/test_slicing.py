# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Slices compute what the whole model computes without the other experts, and live like any checkpoint."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_peer import PeerForCausalLM, PeerLayer, quantise_expert_tables
from modeling_peer.adaptation.slicing import most_important, scale_expert_rows, slice_experts
from modeling_peer.analysis.expert_importance import ExpertImportance
from modeling_peer.analysis.expert_weights import pick_experts, table_rows
from modeling_peer.analysis.routing_hooks import find_routed_layer, keep_experts, scale_experts
from modeling_peer.optim.row_sparse_adamw import RowSparseAdamW

TOKENS = torch.arange(1, 13).view(2, 6)
TWO_LAYERS = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
KINDS = [
    TWO_LAYERS,
    {"gated_experts": True, "query_norm": "rms_norm"},
    {"sparse_mlp": "product_key_memory"},
    {"share_expert_tables": True, **TWO_LAYERS},
]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens).logits


def some_experts(model, number=20):
    """For each layer the same experts, drawn at random."""
    chosen = torch.randperm(model.config.num_peer_experts)[:number]
    return {index: chosen for index, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"}


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_slice_equals_the_model_without_the_other_experts(tiny_config, fields, implementation):
    if implementation == "cpu":
        pytest.importorskip("numba")
    model = PeerForCausalLM(tiny_config(**fields))
    model.set_experts_implementation(implementation)
    kept = some_experts(model)
    with keep_experts(model, kept):
        expected, one = logits(model), logits(model, TOKENS[:1, :1])
    assert not torch.allclose(expected, logits(model))
    whole = {name: table.clone() for name, table in model.state_dict().items()}
    assert slice_experts(model, kept) is model
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model, TOKENS[:1, :1]), one)  # decoding, whose one call takes no slice
    ids = kept[model.config.mlp_layer_types.index("sparse")].sort().values
    for name, table in model.state_dict().items():
        if "_embed" in name and "experts" in name:
            assert torch.equal(table, whole[name][ids])


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_slice_is_saved_and_loaded_like_any_checkpoint(tmp_path, tiny_config, fields):
    model = slice_experts(model := PeerForCausalLM(tiny_config(**fields)), some_experts(model))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_kept_experts == 20
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(logits(loaded), logits(model))


def test_slices_of_slices_quantised_slices_and_slices_of_quantised_tables(tiny_config):
    model = PeerForCausalLM(tiny_config())
    with keep_experts(model, {1: [3, 9, 40]}):
        expected = logits(model)
    slice_experts(model, {1: [3, 5, 9, 40, 63]})
    slice_experts(model, {"layer_1": [40, 9, 3]})
    torch.testing.assert_close(logits(model), expected)
    quantise_expert_tables(model, "int8")
    torch.testing.assert_close(logits(model), expected, atol=0.05, rtol=0)

    quantised = quantise_expert_tables(PeerForCausalLM(tiny_config()), "int4")
    with keep_experts(quantised, {1: [3, 9, 40]}):
        expected = logits(quantised)
    slice_experts(quantised, {1: [3, 9, 40]})
    torch.testing.assert_close(logits(quantised), expected)
    assert quantised.model.layers[1].mlp.experts.down_scale.shape == (3,)
    assert not quantised.model.layers[1].mlp.experts.down_embed.requires_grad


@pytest.mark.parametrize("row_sparse", [False, True])
def test_a_slice_trains_and_rows_of_absent_experts_get_no_gradient(tiny_config, row_sparse):
    model = slice_experts(PeerForCausalLM(tiny_config(row_sparse_gradients=row_sparse)), {1: torch.arange(20)})
    optimizer = RowSparseAdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradient = model.model.layers[1].mlp.experts.up_embed.grad
        assert gradient.shape == (20, 32)
        assert gradient.is_sparse == row_sparse
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_layer_alone_and_a_new_model_of_a_slice(tiny_config):
    layer = PeerLayer(tiny_config(num_kept_experts=1))
    output = layer(torch.randn(5, 32))
    used = layer.retrieval(torch.randn(5, 32))[1]
    assert used.max() > 0  # experts without a row are retrieved, too
    assert output.isfinite().all()
    model = PeerForCausalLM(tiny_config(num_kept_experts=30))
    rows = model.model.layers[1].mlp.experts.row_of_expert
    assert rows.tolist() == [*range(30), *[-1] * 34]
    assert model.model.layers[1].mlp.experts.down_embed.shape == (30, 32)


def test_tables_without_their_map_are_refused(tmp_path, tiny_config):
    slice_experts(model := PeerForCausalLM(tiny_config()), {1: [1, 2, 3]}).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "row_of_expert" not in name}
    assert len(tensors) == len(model.state_dict()) - 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"num_kept_experts=3: .* without row_of_expert"):
        PeerForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "kept", "message"),
    [
        (TWO_LAYERS, {0: [1]}, "no entry for layer_2"),
        (TWO_LAYERS, {0: [1], 2: [1, 2]}, "equally many"),
        ({}, {1: []}, "at least 1"),
        ({}, {1: [64]}, "experts 0 to 63; got \\[64\\]"),
        ({}, {0: [1]}, "layer 0 routes no tokens"),
        (TWO_LAYERS | {"share_expert_tables": True}, {0: [1], 2: [2]}, "shares the tables of layer_0"),
        ({"sparse_mlp": "top_k_moe"}, {1: [0]}, "whole MLPs"),
        ({"mlp_layer_types": ["dense"] * 3}, {1: [0]}, "no layer that routes"),
    ],
)
def test_what_cannot_be_sliced_is_refused_and_unchanged(tiny_config, fields, kept, message):
    model = PeerForCausalLM(tiny_config(**fields))
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        slice_experts(model, kept)
    assert model.config.num_kept_experts is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_that_are_gone_and_adapted_tables_are_refused(tiny_config):
    model = slice_experts(PeerForCausalLM(tiny_config()), {1: [1, 2, 3]})
    with pytest.raises(ValueError, match="earlier slice did not keep \\[7\\]"):
        slice_experts(model, {1: [1, 7]})
    adapted = get_peft_model(
        PeerForCausalLM(tiny_config()), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_embed"])
    )
    with pytest.raises(ValueError, match=r"adapted\. Merge adapters"):
        slice_experts(adapted, {1: [1]})
    with pytest.raises(ValueError, match=r"adapted\. Merge adapters"):
        scale_expert_rows(adapted, 1, [1])


def test_the_most_important_experts_are_kept(tiny_config):
    model = PeerForCausalLM(tiny_config(**TWO_LAYERS))
    counts, sums = torch.arange(64), torch.arange(64).flip(0).double()
    importance = [ExpertImportance(name, index, counts, sums, 10) for name, index in (("layer_0", 0), ("layer_2", 2))]
    assert most_important(model, importance, 2)["layer_0"].tolist() == [0, 1]
    assert most_important(model, importance, 2, "use")["layer_2"].tolist() == [62, 63]
    slice_experts(model, {0: range(4, 10), 2: range(4, 10)})
    assert most_important(model, importance, 2)["layer_0"].tolist() == [4, 5]  # of those that are left
    for number in (0, 7):
        with pytest.raises(ValueError, match="1 to 6"):
            most_important(model, importance, number)
    with pytest.raises(ValueError, match="output, mean_output, use"):
        most_important(model, importance, 2, "size")
    # layers that share their tables keep the same experts: the sum of both decides
    shared = PeerForCausalLM(tiny_config(**TWO_LAYERS, share_expert_tables=True))
    importance[1].output_sums = 3 * counts.double()
    kept = most_important(shared, importance, 2)
    assert kept["layer_0"].tolist() == kept["layer_2"].tolist() == [62, 63]


def test_analysis_of_a_slice_sees_only_experts_that_it_has(tiny_config):
    model = slice_experts(PeerForCausalLM(tiny_config()), {1: [5, 9, 40]})
    layer = find_routed_layer(model, 1)
    assert pick_experts(layer).tolist() == [5, 9, 40]
    rows = table_rows(layer, "up_embed", torch.tensor([[9, 10]]))
    assert torch.equal(rows[0, 0], model.model.layers[1].mlp.experts.up_embed[1])
    assert not rows[0, 1].any()


@pytest.mark.parametrize("table_format", [None, "int8"])
def test_experts_are_scaled_for_good(tiny_config, table_format):
    model = PeerForCausalLM(tiny_config())
    if table_format:
        quantise_expert_tables(model, table_format)
    plain = logits(model)
    for factor in (0.0, -2.5):
        with scale_experts(model, 1, range(0, 64, 2), factor):
            expected = logits(model)
        edited = scale_expert_rows(copy.deepcopy(model), "layer_1", range(0, 64, 2), factor)
        torch.testing.assert_close(logits(edited), expected)
        assert not torch.allclose(expected, plain)
    assert torch.equal(logits(model), plain)
    sliced = slice_experts(copy.deepcopy(model), {1: [1, 2, 3]})
    before = logits(sliced)
    assert torch.equal(logits(scale_expert_rows(sliced, 1, [0, 4, 63])), before)  # which it does not keep
    for ids, factor, message in (([64], 0.0, "experts 0 to 63"), ([1], math.nan, "must be finite")):
        with pytest.raises(ValueError, match=message):
            scale_expert_rows(model, 1, ids, factor)

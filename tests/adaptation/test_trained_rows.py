# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training of chosen experts leaves all other rows as they are, and the ranking chooses what a new text uses."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.adaptation.patches import save_patch
from modeling_peer.adaptation.slicing import slice_experts
from modeling_peer.adaptation.trained_rows import train_only_experts
from modeling_peer.analysis.expert_importance import ExpertImportance, record_importance
from modeling_peer.analysis.expert_ranking import rank_experts, specificity
from modeling_peer.analysis.routing_trace import TokenBatch
from modeling_peer.optim import RowSparseAdamW, clip_gradients, parameter_groups, row_sparse_gradients

TOKENS = torch.arange(1, 25).view(2, 12)
TWO_LAYERS = {"mlp_layer_types": ["sparse", "dense", "sparse"]}


def train(model, optimizer, steps=3, micro_batches=1, tokens=TOKENS):
    for _ in range(steps):
        for _ in range(micro_batches):
            model.train()(tokens, labels=tokens).loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def used_experts(model, number=6):
    """Some experts of each sparse layer that the tokens retrieve."""
    importance = record_importance(model, [TokenBatch(TOKENS, torch.zeros(2, dtype=torch.int64))], show_progress=False)
    return {entry.name: entry.by("use").topk(number).indices for entry in importance}


OPTIMIZERS = {
    "row-sparse": lambda model: RowSparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "dense, ours": lambda model: RowSparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "dense, torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "dense, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_chosen_rows_change_even_with_weight_decay_and_earlier_moments(tiny_config, name, implementation):
    if implementation == "cpu":
        pytest.importorskip("numba")
    fields = {"gated_experts": True, "num_sub_keys": 16, **TWO_LAYERS}  # 256 rows: gradients stay products
    model = PeerForCausalLM(tiny_config(row_sparse_gradients=name == "row-sparse", **fields))
    model.set_experts_implementation(implementation)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer)  # all rows get moments
    chosen = used_experts(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with train_only_experts(model, chosen) as trained:
        assert trained.num_rows == 2 * 3 * 6
        train(model, optimizer, micro_batches=2)
    for key, value in model.state_dict().items():
        if "_embed" in key and "experts" in key:
            ids = chosen[f"layer_{key.split('.')[2]}"]
            others = torch.ones(len(value), dtype=torch.bool).index_fill(0, ids, False)
            assert torch.equal(value[others], before[key][others]), key
            assert (value[ids] != before[key][ids]).any(1).all(), key
        else:
            assert torch.equal(value, before[key]), key  # running statistics included
    train(model, optimizer, steps=1)
    after = model.state_dict()
    assert not any(torch.equal(after[key], before[key]) for key in before if key.endswith(".up_embed"))
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_both_kinds_of_gradient_move_the_chosen_rows_alike(tiny_config):
    config = tiny_config(query_norm="rms_norm")
    dense = PeerForCausalLM(config)
    sparse = PeerForCausalLM(config)
    sparse.load_state_dict(dense.state_dict())
    chosen = used_experts(dense)
    with train_only_experts(dense, chosen), train_only_experts(sparse, chosen), row_sparse_gradients(sparse):
        train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0), steps=2)
        train(sparse, RowSparseAdamW(sparse.parameters(), lr=1e-2, weight_decay=0.0), steps=2)
    for mine, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_restricted_fine_tune_is_a_small_patch_that_learned(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "base")
    model = PeerForCausalLM.from_pretrained(tmp_path / "base")
    chosen = used_experts(model)
    with torch.no_grad():
        before = model.eval()(TOKENS, labels=TOKENS).loss
    with train_only_experts(model, chosen):
        groups = parameter_groups(model, 3e-2)
        assert [len(group["params"]) for group in groups] == [2]
        train(model, RowSparseAdamW(groups), steps=10)
    with torch.no_grad():
        assert model.eval()(TOKENS, labels=TOKENS).loss < before - 0.1
    patch = save_patch(tmp_path / "base", model, tmp_path / "fine.safetensors")
    assert {tuple(one.row_ids.tolist()) for one in patch.tensors.values()} == {
        tuple(chosen["layer_1"].sort().values.tolist())
    }


def test_layers_that_are_not_named_are_frozen_and_shared_tables_train_the_experts_of_all(tiny_config):
    model = PeerForCausalLM(tiny_config(**TWO_LAYERS))
    with train_only_experts(model, {2: [1]}):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            f"model.layers.2.mlp.experts.{name}_embed" for name in ("down", "up")
        ]
    assert all(p.requires_grad for p in model.parameters())
    with train_only_experts(model, {2: [1]}, freeze_others=False):
        assert model.model.norm.weight.requires_grad
        assert not model.model.layers[0].mlp.experts.up_embed.requires_grad
    shared = PeerForCausalLM(tiny_config(share_expert_tables=True, **TWO_LAYERS))
    with train_only_experts(shared, {0: [1], 2: [1, 5]}) as trained:
        assert trained.num_rows == 4


def test_experts_of_a_slice_are_trained_by_their_ids(tiny_config):
    model = slice_experts(PeerForCausalLM(tiny_config()), {1: [3, 9, 40]})
    before = model.model.layers[1].mlp.experts.up_embed.detach().clone()
    with train_only_experts(model, {1: [9, 10]}) as trained:  # 10 has no row
        assert trained.num_rows == 2
        model.model.layers[1].mlp.experts.up_embed.sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = (model.model.layers[1].mlp.experts.up_embed != before).any(1)
    assert changed.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="no expert is chosen that has a row"):
        train_only_experts(model, {1: [10]})


def test_what_cannot_be_trained_is_refused_and_unchanged(tiny_config):
    model = PeerForCausalLM(tiny_config())
    for experts, message in (
        ({0: [1]}, "layer 0 routes no tokens"),
        ({1: [64]}, "experts 0 to 63"),
        ({}, "no expert"),
    ):
        with pytest.raises(ValueError, match=message):
            train_only_experts(model, experts)
    assert all(p.requires_grad for p in model.parameters())
    on_tables = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_embed"])
    with pytest.raises(ValueError, match=r"adapted\. Merge adapters"):
        train_only_experts(get_peft_model(PeerForCausalLM(tiny_config()), on_tables), {1: [1]})
    with pytest.raises(ValueError, match="its tables are quantised and do not train"):
        train_only_experts(quantise_expert_tables(model, "int8"), {1: [1]})


def importance(counts, num_tokens, name="layer_1"):
    counts = torch.tensor(counts)
    return ExpertImportance(name, 1, counts, counts.double(), num_tokens)


def test_ranking_is_by_use_in_the_new_text_against_the_background():
    background, new = importance([90, 10, 0, 0], 100), importance([50, 30, 20, 0], 100)
    tf_idf = specificity(background, new, "tf_idf")
    expected = [0.5 * math.log(101 / 91), 0.3 * math.log(101 / 11), 0.2 * math.log(101)]
    torch.testing.assert_close(tf_idf[:3], torch.tensor(expected, dtype=torch.float64))
    assert tf_idf[3] == float("-inf")
    kl = specificity(background, new, "kl")
    expected = [0.5 * math.log(0.5 * 104 / 91), 0.3 * math.log(0.3 * 104 / 11), 0.2 * math.log(0.2 * 104)]
    torch.testing.assert_close(kl[:3], torch.tensor(expected, dtype=torch.float64))
    assert rank_experts([background], [new], 2)["layer_1"].tolist() == [2, 1]
    assert rank_experts([background], [new], 9, "kl")["layer_1"].tolist() == [2, 1, 0]  # the last was not retrieved
    more_often_than_tokens = specificity(importance([500], 100), importance([5], 100))
    assert more_often_than_tokens.item() == 0.0
    for arguments, message in (
        (([background], [new], 0), "must be at least 1"),
        (([background], [new], 1, "tfidf"), "Known: tf_idf, kl"),
        (([background], [], 1), "must have the same layers; got layer_1 and "),
        (([background], [importance([1], 1)], 1), "are not the same layer"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_experts(*arguments)


def test_ranking_finds_the_experts_of_a_new_text(tiny_config):
    model = PeerForCausalLM(tiny_config(num_sub_keys=16))
    texts = [torch.randint(1, 50, (4, 16)), torch.randint(50, 99, (4, 16))]
    background, new = (
        record_importance(model, [TokenBatch(text, torch.zeros(4, dtype=torch.int64))], show_progress=False)
        for text in texts
    )
    for measure in ("tf_idf", "kl"):
        (chosen,) = rank_experts(background, new, 10, measure).values()
        shares = [entry[0].counts[chosen].sum() / entry[0].counts.sum() for entry in (background, new)]
        assert shares[1] > 1.5 * shares[0]  # an untrained model: both texts use most experts

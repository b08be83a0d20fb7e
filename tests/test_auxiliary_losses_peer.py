# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Balance losses against sums over every product key, and their way into the loss of every head."""

import copy
import math

import pytest
import reference
import torch
from training_helpers import run_processes
from transformers import Trainer, TrainingArguments

from modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerLayer,
    retrieval_peer,
)
from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.balance_loss_peer import MAX_TILE_SCORES, balance_loss, mean_probabilities
from modeling_peer.product_keys_peer import product_key_top_k

KINDS = ["switch", "uniformity"]


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


def random_keys(shared=True, num_tokens=7, num_sub_keys=5, dtype=torch.float64):
    query = torch.randn(num_tokens, 3, 8, dtype=dtype, requires_grad=True)
    sub_keys = torch.randn(*(() if shared else (3,)), 2, num_sub_keys, 4, dtype=dtype, requires_grad=True)
    return query, sub_keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tile", [100, 2])  # all tokens at once, and two at a time
def test_balance_loss_and_its_gradients_equal_those_of_a_softmax_over_every_product_key(
    monkeypatch, kind, shared, tile
):
    query, sub_keys = random_keys(shared)
    mask = torch.tensor([True, True, False, True, True, False, True])
    _, expert_ids = product_key_top_k(query, sub_keys, 4)
    monkeypatch.setitem(MAX_TILE_SCORES, "cpu", tile * 3 * 5)
    loss = balance_loss(kind, query, sub_keys, expert_ids, mask)
    expected = reference.balance_loss(kind, query, sub_keys, expert_ids, mask)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, (query, sub_keys)) for each in (loss, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("kind", "even", "collapsed"), [("switch", 1, 5), ("uniformity", 0, 2 * math.log(5))])
def test_the_ends_of_the_scale(kind, even, collapsed):
    sub_keys = torch.eye(5).repeat(2, 1, 1)
    every_pair = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    query = 100 * torch.nn.functional.one_hot(every_pair, 5).float().view(25, 1, 10)
    for queries, expected in ((query, even), (query[:1].expand(25, 1, 10), collapsed)):
        _, expert_ids = product_key_top_k(queries, sub_keys, 1)
        torch.testing.assert_close(balance_loss(kind, queries, sub_keys, expert_ids), torch.tensor(float(expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_where_every_token_is_padding_loss_and_gradients_are_finite(kind, num_tokens):
    query, sub_keys = random_keys(num_tokens=num_tokens, dtype=torch.float32)
    _, expert_ids = product_key_top_k(query, sub_keys, 2)
    loss = balance_loss(kind, query, sub_keys, expert_ids, torch.zeros(num_tokens, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss)
    assert not query.grad.any()
    assert not sub_keys.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_underflow_leave_gradients_finite(kind):
    query, sub_keys = random_keys(dtype=torch.float32)
    _, expert_ids = product_key_top_k(query, sub_keys, 2)
    gradients = torch.autograd.grad(balance_loss(kind, query * 1e4, sub_keys, expert_ids), (query, sub_keys))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_scores(monkeypatch, kind):
    sub_keys = torch.randn(2, 512, 8, requires_grad=True)
    monkeypatch.setitem(MAX_TILE_SCORES, "cpu", 64 * 4 * 512)  # 64 tokens a tile

    def peak(num_tokens):
        query = torch.randn(num_tokens, 4, 16, requires_grad=True)
        expert_ids = torch.zeros(num_tokens, 4, 2, dtype=torch.int64)
        return reference.peak_memory(lambda: balance_loss(kind, query, sub_keys, expert_ids).backward())

    scores_of_one_token = 2 * 4 * 512 * 4  # bytes, both codebooks
    assert (peak(1024) - peak(128)) / (1024 - 128) < scores_of_one_token / 4


@pytest.mark.parametrize("kind", KINDS)
def test_descending_a_balance_loss_evens_out_which_rows_and_columns_are_retrieved(tiny_config, kind):
    layer = PeerLayer(tiny_config(balance_loss=kind, query_norm="none"))
    hidden = torch.randn(64, 32) + 2 * torch.randn(32)  # tokens that are alike, and want the same experts
    optimizer = torch.optim.Adam(layer.retrieval.parameters(), lr=0.01)
    largest = []
    for _ in range(60):
        aux_losses = AuxiliaryLosses()
        layer(hidden, aux_losses=aux_losses)
        aux_losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        _, expert_ids = layer.retrieval(hidden)
        hits = torch.stack([expert_ids // 8, expert_ids % 8]).flatten(1)
        largest.append(max(torch.bincount(h, minlength=8).max().item() for h in hits) / hits.shape[1])
    assert largest[-1] < largest[0] / 1.5  # even would be 1 / 8


HEADS = {
    PeerForCausalLM: lambda tokens: {"labels": tokens},
    PeerForSequenceClassification: lambda tokens: {"labels": torch.tensor([0, 1, 2])},
    PeerForTokenClassification: lambda tokens: {"labels": tokens % 3},
    PeerForQuestionAnswering: lambda tokens: {
        "start_positions": torch.tensor([0, 1, 2]),
        "end_positions": torch.tensor([3, 4, 5]),
    },
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_every_head_has_the_weighted_sum_of_its_layers_losses(tiny_config, tokens, head, training):
    options = {"num_labels": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
    model = head(tiny_config(balance_loss="switch", router_aux_loss_coef=0.5, **options)).train(training)
    plain = head(tiny_config(**options)).train(training)
    plain.load_state_dict(model.state_dict())
    outputs, expected = (each(tokens, **HEADS[head](tokens)) for each in (model, plain))
    assert expected.aux_loss is None
    assert 2 <= outputs.aux_loss < 8  # two layers, each between even and one expert of eight rows for all
    torch.testing.assert_close(outputs.loss, expected.loss + 0.5 * outputs.aux_loss)
    in_order = model(tokens, return_dict=False, **HEADS[head](tokens))
    torch.testing.assert_close(in_order[0], outputs.loss)
    torch.testing.assert_close(in_order[-1], outputs.aux_loss)
    if training:
        (outputs.loss - expected.loss).backward()
        assert all(layer.mlp.retrieval.sub_keys.grad.any() for layer in model.model.layers if layer.is_sparse)


def test_labels_given_by_position_count_too(tiny_config, tokens):
    model = PeerForSequenceClassification(tiny_config(balance_loss="switch", num_labels=3)).eval()
    labels = torch.tensor([0, 1, 2])
    by_position = model(tokens, None, None, None, None, labels)
    assert torch.equal(by_position.loss, model(tokens, labels=labels).loss)
    assert by_position.aux_loss is not None


@pytest.mark.parametrize("head", HEADS)
def test_generation_and_evaluation_without_labels_do_not_pay(tiny_config, tokens, monkeypatch, head):
    def never(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(retrieval_peer, "balance_loss", never)
    model = head(tiny_config(balance_loss="switch")).eval()
    assert model(tokens).aux_loss is None
    if head is PeerForCausalLM:
        model.generate(tokens, max_new_tokens=2, do_sample=False)


def test_in_training_the_loss_is_there_without_labels_for_trainers_that_compute_their_own(tiny_config, tokens):
    outputs = PeerForCausalLM(tiny_config(balance_loss="uniformity")).train()(tokens)
    assert outputs.loss is None
    assert outputs.aux_loss.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(tiny_config, tokens, kind):
    model = PeerForCausalLM(tiny_config(balance_loss=kind, mlp_layer_types=["sparse", "dense", "dense"]))
    right = torch.cat([tokens, torch.full((3, 6), 98)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(3, 6, dtype=torch.long)], dim=1)
    for training in (True, False):
        model.train(training)
        padded = model(right, attention_mask=mask, labels=right.masked_fill(mask == 0, -100))
        torch.testing.assert_close(padded.aux_loss, model(tokens, labels=tokens).aux_loss)


def loss_and_gradients(model, **inputs):
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_config, tokens, use_reentrant):
    model = PeerForCausalLM(
        tiny_config(balance_loss="switch", router_aux_loss_coef=1.0, mlp_layer_types=["sparse"] * 3)
    )
    checkpointed = copy.deepcopy(model).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = loss_and_gradients(model.train(), input_ids=tokens, labels=tokens)
    torch.testing.assert_close(loss_and_gradients(checkpointed, input_ids=tokens, labels=tokens), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", [PeerForCausalLM, PeerForTokenClassification])
def test_training_compiles_to_one_graph(tiny_config, tokens, head, checkpointing):
    torch._dynamo.reset()
    model = head(tiny_config(balance_loss="switch", num_labels=99)).train()
    expected = loss_and_gradients(copy.deepcopy(model), input_ids=tokens, labels=tokens)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(compiled, input_ids=tokens, labels=tokens)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close((loss, gradients), expected, rtol=1e-4, atol=1e-5)


def test_implementations_agree(tiny_config, tokens):
    pytest.importorskip("numba")
    model = PeerForCausalLM(tiny_config(balance_loss="switch", router_aux_loss_coef=1.0)).train()
    results = []
    for name in ("eager", "cpu"):
        model.set_experts_implementation(name)
        model.zero_grad()
        results.append(loss_and_gradients(model, input_ids=tokens, labels=tokens))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_balance_losses_are_float32_in_half_precision(tiny_config, tokens, kind):
    model = PeerForCausalLM(tiny_config(balance_loss=kind)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens, labels=tokens)
    half = copy.deepcopy(model).bfloat16()(tokens, labels=tokens)
    for outputs in (mixed, half):
        assert outputs.aux_loss.dtype == torch.float32
        torch.testing.assert_close(outputs.aux_loss, model(tokens).aux_loss, rtol=0.02, atol=0.002)  # rounded inputs
        outputs.loss.backward()


def test_the_mean_of_probabilities_is_the_same_under_autocast():
    query, sub_keys = random_keys(dtype=torch.float32)
    weights = torch.full((7,), 1 / 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = mean_probabilities(query, sub_keys, weights)
    assert torch.equal(probabilities, mean_probabilities(query, sub_keys, weights))


def test_micro_batches_weigh_by_the_tokens_they_predict(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(balance_loss="switch", router_aux_loss_coef=1.0)).eval()
    labels = tokens.clone()
    labels[0, 2:] = -100  # one prediction, of 23 in all
    total = labels[:, 1:].ne(-100).sum()
    for row, share in ((0, 1 / 23), (1, 11 / 23)):
        outputs = model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=total)
        mean = model(tokens[row : row + 1], labels=labels[row : row + 1])
        torch.testing.assert_close(outputs.aux_loss, mean.aux_loss)
        torch.testing.assert_close(outputs.loss, mean.loss * share)


def equal_rows(num_rows, labels):
    """Rows that are all alike: else the balance loss of a batch is no mean over its rows."""
    return [{"input_ids": torch.arange(1, 13), "labels": labels}] * num_rows


def trained(model, folder, rows, save=False, **settings):
    """The weights after one SGD step on `rows`, all of them."""
    arguments = TrainingArguments(
        str(folder), max_steps=1, optim="sgd", max_grad_norm=0.0, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1.0, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    if save:
        trainer.save_model()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (PeerForCausalLM, torch.arange(1, 13)),
        (PeerForSequenceClassification, torch.tensor(2)),  # a mean over the micro-batch
        (PeerForTokenClassification, torch.arange(12) % 3),
    ],
)
def test_four_micro_batches_of_two_train_as_one_batch_of_eight(tiny_config, tmp_path, head, labels):
    rows = equal_rows(8, labels)
    model = head(tiny_config(balance_loss="switch", router_aux_loss_coef=1.0, num_labels=3))
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    whole = trained(whole, tmp_path, rows, per_device_train_batch_size=8)
    parts = trained(parts, tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    before = dict(model.named_parameters())
    assert any((whole[name] - before[name]).abs().max() > 1e-3 for name in whole if "sub_keys" in name)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], msg=lambda m, name=name: f"{name}: {m}")


SCRIPT = """
import sys
import torch
from test_auxiliary_losses_peer import equal_rows, trained
from modeling_peer import PeerForCausalLM

folder, batch_size = sys.argv[1:]
model, rows = PeerForCausalLM.from_pretrained(folder), equal_rows(8, torch.arange(1, 13))
trained(model, folder, rows, per_device_train_batch_size=int(batch_size), save=True)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config(balance_loss="switch", router_aux_loss_coef=1.0))
    weights = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        model.save_pretrained(folder)
        process = run_processes(num_processes, SCRIPT, str(folder), str(8 // num_processes))
        assert process.returncode == 0, process.stderr[-3000:]
        weights.append(dict(PeerForCausalLM.from_pretrained(folder).named_parameters()))
    torch.testing.assert_close(*weights)


def test_predictions_are_not_gathered_with_the_losses(tiny_config, tmp_path, tokens):
    model = PeerForCausalLM(tiny_config(balance_loss="switch"))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True))
    predictions = trainer.predict([{"input_ids": row, "labels": row} for row in tokens]).predictions
    assert predictions.shape == (3, 12, 99)

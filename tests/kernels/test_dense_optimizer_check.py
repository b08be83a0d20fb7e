# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""An optimizer that does not support row-sparse gradients is named in an error with the setting and the way out."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_peer import PeerForCausalLM
from modeling_peer.training import PeerTrainer, RowSparseAdamW

TOKENS = torch.arange(40).view(2, 20)
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


@pytest.fixture(params=["eager", None])
def model(request, tiny_config):
    return PeerForCausalLM(tiny_config(row_sparse_gradients=True, experts_implementation=request.param)).train()


class OtherTrainer(Trainer):
    """A Trainer subclass without support for sparse gradients."""


def train(kind, model, folder, **settings):
    defaults = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = kind(model, TrainingArguments(str(folder), **(defaults | settings)), train_dataset=ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [Trainer, OtherTrainer])
def test_a_trainer_whose_optimizer_cannot_take_them_is_refused_at_its_first_step(model, tmp_path, kind):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"torch.optim.AdamW supports dense gradients only.*PeerTrainer"):
        train(kind, model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "embed" in name)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_plain_trainer_clips_them_as_it_clips_dense_ones(model, tmp_path, max_grad_norm):
    found = []
    for row_sparse in (False, True):
        trained = copy.deepcopy(model)
        trained.config.row_sparse_gradients = row_sparse
        trainer = train(
            Trainer, trained, tmp_path, optim="sgd", learning_rate=0.5, max_grad_norm=max_grad_norm, logging_steps=1
        )
        found.append((trainer.state.log_history[0]["grad_norm"], trained.model.layers[1].mlp.experts.up_embed))
    (norm, table), (row_sparse_norm, row_sparse_table) = found
    assert row_sparse_norm == pytest.approx(norm, rel=1e-5)
    assert (row_sparse_table - table).norm() <= 1e-6 * table.norm()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_a_loop_clips_them_as_it_clips_dense_ones(model, foreach, norm_type):
    norms, gradients = [], []
    for row_sparse in (False, True):
        trained = copy.deepcopy(model)
        trained.config.row_sparse_gradients = row_sparse
        trained(TOKENS, labels=TOKENS).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.1, norm_type, foreach=foreach))
        gradient = trained.model.layers[1].mlp.experts.up_embed.grad
        gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
    assert (norms[1] - norms[0]).abs() <= 1e-5 * norms[0]
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_the_ways_out_that_the_message_names_train(model, tmp_path):
    class Both(PeerTrainer, OtherTrainer):
        pass

    for kind in (PeerTrainer, Both):
        assert isinstance(train(kind, copy.deepcopy(model), tmp_path).optimizer.optimizer, RowSparseAdamW)
    model.config.row_sparse_gradients = False
    train(Trainer, model, tmp_path)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_an_optimizer_of_dense_gradients_says_what_made_them_sparse(model, kind):
    optimizer = kind(model.parameters(), lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(
        ValueError, match=rf"table \(64, 32\) .*torch.optim.{kind.__name__} supports dense gradients only. Train"
    ):
        optimizer.step()
    RowSparseAdamW(model.parameters()).step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_of_torch_that_take_them_go_on(model, kind):
    optimizer = kind(model.parameters(), lr=0.1)
    table = model.model.layers[1].mlp.experts.up_embed
    before = table.detach().clone()
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not torch.equal(table, before)


def test_sparse_gradients_of_others_are_none_of_our_business(model):
    model(TOKENS, labels=TOKENS).loss.backward()
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        torch.optim.Adam(embedding.parameters()).step()


def test_evaluation_within_a_plain_trainer_is_no_training(model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    assert Trainer(model, arguments, eval_dataset=ROWS).evaluate()["eval_loss"] > 0

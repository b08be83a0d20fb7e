# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Steps that are measured alone: they do what Trainer's steps do, with each recipe's batch and optimizer."""

import pytest
import torch
from training_helpers import (
    TINY_PEER,
    private_cache,  # noqa: F401  a fixture
    write_inputs,
)
from transformers import TrainerCallback

from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.loading import load_config
from modeling_peer.optim import RowSparseAdamW
from modeling_peer.training import measured_steps
from modeling_peer.training.language_model_trainer import LanguageModelTrainer
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.measured_steps import MeasuredModel, time_training_steps
from modeling_peer.training.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("private_cache")
ROUNDS = 3


@pytest.fixture(autouse=True)
def turns_of_one_step(monkeypatch):
    monkeypatch.setattr(measured_steps, "SECONDS_IN_A_ROW", 0.0)


@pytest.fixture
def recorded(monkeypatch):
    """Every measured step, with its model as it is after each call, and the examples of the calls."""
    calls = []

    class Recording(measured_steps._TrainingStep):
        def __call__(self, examples):
            super().__call__(examples)
            weights = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
            calls.append((self, examples, weights))

    monkeypatch.setattr(measured_steps, "_TrainingStep", Recording)
    return calls


def recipe_in(folder, config=TINY_PEER, **fields):
    recipe = parse_recipe([*write_inputs(folder, config), "--max_steps", "2", "--output_dir", str(folder / "out")])
    return recipe.with_fields(fields)


def measure(**recipes):
    models = {name: MeasuredModel(recipe, load_config(recipe.model)) for name, recipe in recipes.items()}
    return time_training_steps(models, num_threads=1, repeats=ROUNDS, seconds_each=60)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"row_sparse_gradients": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"max_grad_norm": 0.01},  # clips every step
        {"model_overrides": {"is_causal": False}},  # masked tokens, some examples with more labels than others
    ],
)
def test_a_measured_step_leaves_the_weights_that_a_step_of_trainer_leaves(tmp_path, recorded, monkeypatch, fields):
    # Without BatchNorm, which cancels the bias of queries: its gradient is rounding, and Adam makes a step of that.
    recipe = recipe_in(tmp_path, TINY_PEER | {"query_norm": "none"}, experts_implementation="eager", **fields)
    monkeypatch.setattr(measured_steps, "LEARNING_RATE", recipe.run.learning_rate)
    measure(only=recipe)
    examples = [examples for _, examples, _ in recorded[:2]]
    rows = [{name: step[name][i] for name in step} for step in examples for i in range(len(step["input_ids"]))]
    # the first two steps of a run on the same examples in the same order
    monkeypatch.setattr(LanguageModelTrainer, "_get_train_sampler", lambda self, *_: range(len(rows)))
    trained = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            trained.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    original = LanguageModelTrainer.__init__
    monkeypatch.setattr(
        LanguageModelTrainer,
        "__init__",
        lambda self, *args, **kwargs: original(self, *args, **kwargs | {"train_dataset": rows}),
    )
    train_language_model(recipe, callbacks=[Record()])
    # Sums of gradients differ by 1e-9 between the two, which Adam enlarges where a gradient is almost 0. Other
    # examples or another optimizer move weights by 1e-2, the learning rate.
    for (_, _, measured), expected in zip(recorded[:2], trained, strict=True):
        for name, weight in expected.items():
            torch.testing.assert_close(measured[name], weight, rtol=0, atol=1e-4)


def test_models_are_measured_in_turn_each_with_its_own_optimizer_and_new_examples(tmp_path, recorded):
    dense = recipe_in(tmp_path, eval_strategy="steps", eval_steps=1)  # as in a study; nothing is evaluated here
    times = measure(dense=dense, sparse=dense.with_fields({"row_sparse_gradients": True}))
    assert {name: one.repeats for name, one in times.items()} == {"dense": ROUNDS, "sparse": ROUNDS}
    assert all(0 < one.lower_quartile_ms <= one.median_ms <= one.upper_quartile_ms for one in times.values())
    steps = [step for step, _, _ in recorded]
    first, second = dict.fromkeys(steps)
    warmed_up = 4  # two calls of each
    assert steps[warmed_up:] == [first, second] * ROUNDS
    optimizers = [type(step.trainer.optimizer.optimizer) for step in (first, second)]
    assert optimizers == [torch.optim.AdamW, RowSparseAdamW]
    shapes = {tuple(examples["input_ids"].shape) for _, examples, _ in recorded}
    assert shapes == {(4, 32)}
    assert len({tuple(examples["input_ids"].flatten().tolist()) for _, examples, _ in recorded}) == len(recorded)


def test_a_turn_of_a_fast_model_has_several_steps_in_a_row(tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(measured_steps, "SECONDS_IN_A_ROW", 60.0)  # limited to 64 steps
    recipe = recipe_in(tmp_path)
    models = {name: MeasuredModel(recipe, load_config(recipe.model)) for name in ("first", "second")}
    time_training_steps(models, num_threads=1, repeats=1, seconds_each=60)
    steps = [step for step, _, _ in recorded][4:]  # after two calls of each
    first, second = dict.fromkeys(steps)
    assert steps == [first] * 64 + [second] * 64


def test_weights_stay_and_the_threads_are_those_asked_for_and_then_as_before(tmp_path, recorded, monkeypatch):
    seen = []
    interleave = measured_steps.interleave
    monkeypatch.setattr(
        measured_steps, "interleave", lambda *args: (seen.append(torch.get_num_threads()), interleave(*args))[1]
    )
    before = torch.get_num_threads()
    recipe = recipe_in(tmp_path)
    time_training_steps({"a": MeasuredModel(recipe, load_config(recipe.model))}, before + 1, ROUNDS, 60)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    (_, _, first), *_, (_, _, last) = recorded
    for name, weight in first.items():
        torch.testing.assert_close(last[name], weight, rtol=0, atol=1e-5)


def test_models_that_do_not_fit_into_memory_together_are_an_error_with_their_names(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(measured_steps, "build_model", fail)
    recipe = recipe_in(tmp_path)
    with pytest.raises(SettingsError, match=r"all 2 models in memory \(dense, peer\), and they do not fit"):
        measure(dense=recipe, peer=recipe)

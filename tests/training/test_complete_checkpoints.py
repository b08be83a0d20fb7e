# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints stand whole or not at all, and where a run is resumed makes no difference to what it does."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    some_text,
    train,
    write_inputs,
)
from transformers import Trainer, TrainingArguments

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.run_files import UNFINISHED
from modeling_peer.training.checkpoint_folders import find_damage, newest_checkpoint
from modeling_peer.training.complete_checkpoints import CompleteCheckpoints

pytestmark = pytest.mark.usefixtures("private_cache")


def history(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 14),  # within the second pass: 10 steps are one
        ({}, 10),  # between two passes
        ({"gradient_accumulation_steps": 3, "logging_steps": 5}, 3),  # within a pass, a step and a logged mean
        ({"streaming": True}, 4),  # within the first pass of a shuffled stream
        ({"streaming": True, "shuffle_buffer": 0}, 14),  # within the second
        ({"streaming": True, "dataloader_num_workers": 1}, 14),
    ],
)
def test_a_resumed_run_sees_the_examples_and_logs_the_losses_it_would_have(tmp_path, settings, steps):
    inputs = [*write_inputs(tmp_path, text=some_text(280)), "--validation_percent=0"]
    inputs += ["--log_expert_usage=false"]  # counted anew by every process
    settings = {"max_steps": 16, "save_steps": steps, **settings}
    train(inputs, output_dir=tmp_path / "whole", **settings)
    train(
        inputs,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{steps}",
        **settings,
    )
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    weights = [Path(tmp_path, name, "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


class Line(torch.nn.Module):
    """Two parameters, so that a test of folders takes no time."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.line(x) - labels).square().mean()}


class CheckpointTrainer(CompleteCheckpoints, Trainer):
    """What anybody may have: a Trainer with the mixin, a model that is none of ours."""


@pytest.fixture
def new_trainer(tmp_path):
    def build(trainer_class=CheckpointTrainer, **settings):
        torch.manual_seed(0)
        settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "report_to": "none", **settings}
        arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, **settings)
        rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(24)]
        return trainer_class(Line(), arguments, train_dataset=rows, eval_dataset=rows[:4])

    return build


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_whole_checkpoint_is_resumed_and_the_others_named(new_trainer, out, caplog):
    new_trainer().train()
    (out / "checkpoint-6" / "scheduler.pt").unlink()
    (out / UNFINISHED / "checkpoint-8").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"cannot resume from .*checkpoint-6: it has no scheduler.pt"):
        new_trainer().train(resume_from_checkpoint=str(out / "checkpoint-6"))
    newest, passed_over = newest_checkpoint(out)
    assert Path(newest).name == "checkpoint-4"
    assert passed_over == [
        f"{UNFINISHED}/checkpoint-8 (its save or deletion was interrupted)",
        "checkpoint-6 (it has no scheduler.pt)",
    ]
    trainer = new_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert f"not resumed, because incomplete: {'; '.join(passed_over)}" in caplog.text
    assert f"deleting what an interrupted save left: {UNFINISHED}/checkpoint-8" in caplog.text
    assert find_damage(out / "checkpoint-6") is None  # written again, and whole
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        shutil.rmtree(out / name)
    with pytest.raises(SettingsError, match="nothing to resume: no checkpoint"):
        new_trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_to_be_replaced_is_there_after_a_kill_between_the_renames(new_trainer, out):
    new_trainer().train()
    (out / UNFINISHED / "checkpoint-6").mkdir(parents=True)
    (out / "checkpoint-6").rename(out / UNFINISHED / "replaced-checkpoint-6")
    newest, passed_over = newest_checkpoint(out)
    assert Path(newest).name == "checkpoint-6"
    assert passed_over == [f"{UNFINISHED}/checkpoint-6 (its save or deletion was interrupted)"]
    (out / "checkpoint-4").rename(out / UNFINISHED / "replaced-checkpoint-4")
    new_trainer(max_steps=2).train()
    assert find_damage(out / "checkpoint-4") is None
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("limit", [1, 2])
def test_checkpoints_are_deleted_damaged_ones_first_and_only_when_a_new_one_is_whole(
    new_trainer, out, limit, monkeypatch
):
    new_trainer(max_steps=4).train()
    for step in (8, 10):  # newer than what the next run will save, by number and by time
        shutil.copytree(out / "checkpoint-4", out / f"checkpoint-{step}")
        (out / f"checkpoint-{step}" / "optimizer.pt").unlink()

    def full_disk(self, folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointTrainer, "_save_scaler", full_disk)
        with pytest.raises(SettingsError, match=r"cannot save .*checkpoint-6: OSError: .*No space left on device"):
            new_trainer(save_total_limit=limit).train(resume_from_checkpoint=True)
    assert names(out) == ["checkpoint-10", "checkpoint-2", "checkpoint-4", "checkpoint-8"]

    new_trainer(save_total_limit=limit).train(resume_from_checkpoint=True)
    assert names(out) == ["checkpoint-4", "checkpoint-6"][-limit:]


def test_the_best_checkpoint_is_known_by_its_final_name_and_kept(new_trainer, out):
    losses = itertools.count(1.0)  # the first is the best

    class Graded(CheckpointTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": next(losses)}

    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    trainer = new_trainer(Graded, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-2")
    saved = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(out / "checkpoint-2")


def test_a_checkpoint_is_pushed_under_its_final_name(new_trainer, out, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, names(out))))
    trainer = new_trainer(max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(out / "checkpoint-2"), ["checkpoint-2"])]


def test_every_file_of_a_checkpoint_is_missed(new_trainer, out):
    trainer = new_trainer(max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # of half precision
    trainer.train()
    checkpoint = out / "checkpoint-2"
    files = set(names(checkpoint))
    assert {"scaler.pt", "rng_state.pth", "optimizer.pt", "scheduler.pt", "model.safetensors"} < files
    for name in files - {"checkpoint_files.json"}:
        (checkpoint / name).rename(out / name)
        assert find_damage(checkpoint) == f"it has no {name}"
        content = (out / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1])
        assert find_damage(checkpoint).startswith(f"{name} is ")
        (checkpoint / name).write_bytes(content)
        assert find_damage(checkpoint) is None


def test_a_checkpoint_of_transformers_own_trainer_is_resumed_unless_a_part_is_missing(new_trainer, out):
    new_trainer(Trainer, max_steps=2).train()
    assert find_damage(out / "checkpoint-2") is None
    new_trainer().train(resume_from_checkpoint=True)
    shutil.rmtree(out)
    new_trainer(max_steps=2, save_only_model=True).train()
    with pytest.raises(SettingsError, match=r"no complete checkpoint: checkpoint-2 \(it has no optimizer.pt\)"):
        new_trainer().train(resume_from_checkpoint=True)


def test_a_final_save_that_fails_leaves_model_tokenizer_and_state_as_they_were(new_trainer, out, monkeypatch):
    trainer = new_trainer(max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {"model.safetensors", "training_args.bin", "trainer_state.json"} <= before.keys()
    with torch.no_grad():
        trainer.model.line.weight += 1
    trainer.state.global_step = 9

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(SettingsError, match="No space left on device"):
        trainer.save_model()
    with pytest.raises(OSError, match="No space left on device"):
        trainer.save_state()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

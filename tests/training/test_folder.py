# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: what overwriting clears and when, and which checkpoint a run is resumed from."""

import json
import shutil

import pytest
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    train,
    write_inputs,
)

from modeling_peer.console.errors import SettingsError
from modeling_peer.training.language_modeling import LanguageModelTrainer

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


@pytest.fixture
def run_folder(tmp_path, inputs):
    """A finished run of two steps with a checkpoint of each."""
    train(inputs, output_dir=tmp_path / "out", max_steps=2, save_steps=1)
    return tmp_path / "out"


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_overwriting_deletes_nothing_when_the_new_run_is_refused(run_folder, inputs):
    before = names(run_folder)
    with pytest.raises(SettingsError, match="no such file"):
        train([*inputs, "--train_file=nope.txt"], output_dir=run_folder, overwrite_output_dir=True)
    for source in (
        {"model": run_folder},
        {"tokenizer": run_folder / "checkpoint-1"},
        {"resume_from_checkpoint": "last"},
    ):
        with pytest.raises(SettingsError, match=r"lies in --output_dir .*, which --overwrite_output_dir clears"):
            train(inputs, output_dir=run_folder, overwrite_output_dir=True, **source)
    assert names(run_folder) == before


def test_an_overwriting_run_that_dies_leaves_no_weights_beside_its_tokenizer(run_folder, inputs, monkeypatch):
    (run_folder / "checkpoint-notes").mkdir()
    (run_folder / "_unfinished" / "checkpoint-9").mkdir(parents=True)
    (run_folder / "checkpoint-7").symlink_to(run_folder / "checkpoint-notes")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModelTrainer, "train", die)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, output_dir=run_folder, overwrite_output_dir=True)
    left = {name for name in names(run_folder) if not name.endswith(".py")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "run_settings.json"}
    assert left == {"checkpoint-notes", "checkpoint-7", "training_args.bin"} | tokenizer


@pytest.mark.parametrize(
    ("name", "remains", "damage"),
    [
        ("trainer_state.json", None, "it has no trainer_state.json"),
        ("trainer_state.json", 20, "trainer_state.json is damaged or cut short"),
        ("config.json", None, "it has no config.json"),
        ("tokenizer.json", None, "it has no tokenizer.json"),
        ("model.safetensors", None, "it has no model.safetensors"),
        ("model.safetensors", 5000, "model.safetensors is damaged or cut short"),
        ("optimizer.pt", None, "it has no optimizer.pt"),
        ("optimizer.pt", 1000, "optimizer.pt is damaged or cut short"),
        ("scheduler.pt", 0, "scheduler.pt is damaged or cut short"),
    ],
)
def test_the_newest_complete_checkpoint_is_resumed(run_folder, inputs, capsys, name, remains, damage):
    newest = run_folder / "checkpoint-2"
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if remains is not None:
        (newest / name).write_bytes(content[:remains])
    with pytest.raises(SettingsError, match=rf"cannot resume from .*checkpoint-2: {damage}"):
        train(inputs, output_dir=run_folder, max_steps=2, resume_from_checkpoint=newest)
    train(inputs, output_dir=run_folder, max_steps=2, resume_from_checkpoint="last", save_strategy="no")
    printed = capsys.readouterr().out
    assert f"not resumed, because incomplete: checkpoint-2 ({damage})" in printed
    assert f"resuming from {run_folder / 'checkpoint-1'}" in printed


def test_with_no_complete_checkpoint_there_is_nothing_to_resume(run_folder, inputs):
    shutil.rmtree(run_folder / "checkpoint-1")
    (run_folder / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(SettingsError, match=r"resume: no complete checkpoint: checkpoint-2 \(it has no optimizer"):
        train(inputs, output_dir=run_folder, resume_from_checkpoint="last")


def test_a_run_is_not_resumed_as_another_network(run_folder, inputs):
    words = [*inputs, "--model_overrides", "num_sub_keys=16", "expert_act=relu"]
    with pytest.raises(SettingsError, match=r"expert_act was 'gelu', is 'relu'; .*num_sub_keys was 8, is 16"):
        train(words, output_dir=run_folder, max_steps=3, resume_from_checkpoint="last")


def test_a_run_resumed_on_other_blocks_says_so(run_folder, inputs, capsys):
    settings = {"output_dir": run_folder, "max_steps": 3, "save_strategy": "no"}
    train(inputs, **settings, resume_from_checkpoint="last")
    assert "differs from the resumed run" not in capsys.readouterr().out
    train(inputs, **settings, resume_from_checkpoint="last", block_size=16, per_device_train_batch_size=2)
    printed = capsys.readouterr().out
    assert "differs from the resumed run: block_size was 32, is 16" in printed
    assert "differs from the resumed run: examples_per_step was 4, is 2" in printed
    assert json.loads((run_folder / "run_settings.json").read_text())["block_size"] == 16

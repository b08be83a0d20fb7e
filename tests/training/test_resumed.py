# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A resumed run does what is left, no step more, with the settings that it is given now."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import (
    as_command_line,
    last_json,
    private_cache,  # noqa: F401  a fixture
    run_script,
    train,
    write_inputs,
)
from transformers import TrainingArguments

from modeling_peer import PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import DataArguments
from modeling_peer.hub.loading import ModelArguments
from modeling_peer.training import PeerTrainer, PeerTrainingArguments, resumed_settings
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.resumed_settings import ANNOUNCED, TREATMENT_OF, find_changes, stored_arguments

pytestmark = pytest.mark.usefixtures("private_cache")
TEXT = torch.randint(0, 99, (32, 16), generator=torch.Generator().manual_seed(0))
BLOCKS = [{"input_ids": tokens, "labels": tokens} for tokens in TEXT]


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return PeerForCausalLM(tiny_config(num_sub_keys=4))


def state_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())


def logged(folder, name):
    return [entry[name] for entry in state_of(folder)["log_history"] if name in entry]


def assert_same_weights(folder, other):
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, load_file(other / "model.safetensors")[name]), name


def arguments(folder, kind=PeerTrainingArguments, **settings):
    defaults = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return kind(str(folder), **(defaults | settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 6},  # within the first pass
        {"max_steps": -1, "num_train_epochs": 1},
        {"max_steps": -1, "num_train_epochs": 0.5},  # Trainer begins a whole pass
        {"max_steps": 6, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_finished_run_that_is_resumed_twice_trains_no_step_more(tmp_path, inputs, length):
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:3000], encoding="utf-8")
    out, kept = tmp_path / "out", tmp_path / "kept"
    settings = {"output_dir": out, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, **length}
    first = train(inputs, **settings).summary
    shutil.copytree(out, kept)
    for _ in range(2):
        (out / "train_lm_results.json").unlink()
        again = train(inputs, **settings, resume_from_checkpoint="last").summary
        assert state_of(out)["global_step"] == state_of(kept)["global_step"] == again["steps"]
        assert_same_weights(out, kept)
        assert json.loads((out / "train_lm_results.json").read_text()) == again  # what the kill had prevented
        for name in ("validation_bits_per_byte", "train_loss", "eval_loss", "tokens"):
            assert again[name] == first[name]


def test_a_run_past_the_steps_that_are_asked_for_is_left_as_it_is(tmp_path, inputs):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=4, save_steps=4)
    shutil.copytree(out, tmp_path / "kept")
    train(inputs, output_dir=out, max_steps=2, save_steps=4, resume_from_checkpoint="last")
    assert state_of(out)["global_step"] == 4
    assert_same_weights(out, tmp_path / "kept")


@pytest.mark.parametrize("kind", [TrainingArguments, PeerTrainingArguments])
def test_a_program_that_resumes_a_finished_run_trains_no_step_more(tmp_path, model, kind):
    for resume in (None, True, str(tmp_path / "out" / "checkpoint-4")):
        trainer = PeerTrainer(model, arguments(tmp_path / "out", kind), train_dataset=BLOCKS)
        trainer.train(resume_from_checkpoint=resume)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        if resume is None:
            expected = weights
        assert trainer.state.global_step == 4
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.slow
def test_the_plain_loop_resumes_as_trainer_does(tmp_path, inputs):
    out = tmp_path / "out"
    words = [*inputs, *as_command_line(output_dir=out, max_steps=4, save_steps=2, row_sparse_gradients=True)]
    first = last_json(run_script("train_lm_accelerate.py", *words))
    shutil.copytree(out, tmp_path / "kept")
    words.append("--resume_from_checkpoint=last")
    assert last_json(run_script("train_lm_accelerate.py", *words)) == first
    assert_same_weights(out, tmp_path / "kept")
    process = run_script("train_lm_accelerate.py", *words, "--max_steps=5", "--learning_rate=0.0001")
    assert last_json(process)["steps"] == 5
    assert "used from this step on: learning_rate was 0.01, is 0.0001" in process.stdout
    assert "learning rate 0.0001\n" in process.stdout
    process = run_script("train_lm_accelerate.py", *words, "--max_steps=6", "--table_optimizer_state=bfloat16")
    assert process.returncode == 2
    assert "table_optimizer_state was 'float32', is 'bfloat16'" in process.stderr.splitlines()[-1]


# of each setting that is taken: what is logged at the first step after resuming, or what the groups then have
@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        ({"learning_rate": 1e-6}, "learning_rate", 1e-6),
        ({"learning_rate": 1e-6}, "table_learning_rate", 2e-6),
        ({"table_learning_rate_multiple": 5.0}, "table_learning_rate", 0.05),
        ({"lr_scheduler_type": "linear"}, "learning_rate", 0.005),  # half of the steps are left
        ({"lr_scheduler_type": "linear", "max_steps": 8}, "learning_rate", 0.0075),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, "learning_rate", 0.005),
    ],
    ids=str,
)
def test_a_new_rate_or_schedule_is_used_from_the_first_step_on(tmp_path, inputs, capsys, changed, name, expected):
    settings = {"output_dir": tmp_path / "out", "save_steps": 2, "table_learning_rate_multiple": 2.0}
    train(inputs, **settings, max_steps=2)
    capsys.readouterr()
    train(inputs, **(settings | {"max_steps": 4} | changed), resume_from_checkpoint="last")
    assert logged(tmp_path / "out", name)[2] == pytest.approx(expected)
    printed = capsys.readouterr().out
    for field_name in changed:
        assert f"used from this step on: {field_name} was " in printed


@pytest.mark.parametrize("row_sparse", [False, True])
def test_new_betas_and_decay_are_those_of_the_optimizer(tmp_path, model, row_sparse, capsys):
    changed = {"weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-4}
    settings = {"row_sparse_gradients": row_sparse}
    PeerTrainer(model, arguments(tmp_path, max_steps=2, **settings), train_dataset=BLOCKS).train()
    trainer = PeerTrainer(model, arguments(tmp_path, **settings, **changed), train_dataset=BLOCKS)
    trainer.train(resume_from_checkpoint=True)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {group["betas"] for group in groups.values()} == {(0.5, 0.9)}
    assert {group["eps"] for group in groups.values()} == {1e-4}
    assert (groups["dense"]["weight_decay"], groups["expert_tables"]["weight_decay"]) == (0.3, 0.0)
    assert "weight_decay was 0.0, is 0.3" in capsys.readouterr().out


def test_a_rate_without_a_formula_goes_on_by_the_ratio_of_the_old_and_the_new(tmp_path, model):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}

    def trained(resume, **others):
        options = arguments(tmp_path, **settings, **others)
        trainer = PeerTrainer(model, options, train_dataset=BLOCKS, eval_dataset=BLOCKS[:4])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trained(None, max_steps=2, learning_rate=0.01)
    assert trained(True, learning_rate=0.001).optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    settings["lr_scheduler_type"] = "linear"
    with pytest.raises(SettingsError, match="lr_scheduler_type was 'reduce_lr_on_plateau', is 'linear'"):
        trained(True, learning_rate=0.001, max_steps=6)


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused', is 'sgd'"),
        ({"optim": "adafactor"}, "optim was 'adamw_torch_fused', is 'adafactor'"),
        ({"row_sparse_gradients": True}, "row_sparse_gradients was False, is True"),
        ({"row_sparse_gradients": True, "table_optimizer_state": "factored"}, "table_optimizer_state was 'float32'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "older"])
def test_another_kind_of_optimizer_or_of_state_is_refused(tmp_path, inputs, changed, words, stored):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=2)
    if not stored:  # a checkpoint from before the settings stood in it
        words = "the optimizer"
        for path in out.rglob("run_settings.json"):
            path.write_text(json.dumps({"block_size": 32}))
        (out / "checkpoint-2" / "checkpoint_files.json").unlink()
    with pytest.raises(SettingsError, match=rf"{words}.*Resume with the"):
        train(inputs, output_dir=out, max_steps=4, resume_from_checkpoint="last", **changed)


def test_another_state_of_tables_is_refused_by_a_program_too(tmp_path, model):
    settings = {"row_sparse_gradients": True}
    PeerTrainer(model, arguments(tmp_path, **settings), train_dataset=BLOCKS).train()
    options = arguments(tmp_path, **settings, table_optimizer_state="bfloat16", max_steps=6)
    with pytest.raises(SettingsError, match="table_optimizer_state was 'float32', is 'bfloat16'"):
        PeerTrainer(model, options, train_dataset=BLOCKS).train(resume_from_checkpoint=True)


def test_fused_and_plain_adamw_go_on_from_each_others_checkpoints(tmp_path, inputs, capsys):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=2)
    train(inputs, output_dir=out, max_steps=3, optim="adamw_torch", resume_from_checkpoint="last")
    assert "optim was" not in capsys.readouterr().out


def test_what_changes_the_examples_is_announced_and_a_tokenizer_stays(tmp_path, inputs, capsys):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=2)
    changed = {"seed": 3, "per_device_train_batch_size": 2, "tokenizer": "train", "gradient_accumulation_steps": 2}
    train(inputs, output_dir=out, max_steps=3, resume_from_checkpoint="last", dtype="bfloat16", **changed)
    printed = capsys.readouterr().out
    assert "differs from the resumed run: seed was 42, is 3" in printed
    assert "differs from the resumed run: per_device_train_batch_size was 4, is 2" in printed
    assert "differs from the resumed run: gradient_accumulation_steps was 1, is 2" in printed
    assert "kept from the resumed run: tokenizer was 'bytes', is 'train'" in printed
    assert "used from this step on: dtype was 'float32', is 'bfloat16'" in printed


def test_new_steps_of_logging_and_saving_are_used(tmp_path, inputs):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=2)
    train(inputs, output_dir=out, max_steps=6, save_steps=3, logging_steps=2, resume_from_checkpoint="last")
    assert (out / "checkpoint-3").is_dir()
    assert not (out / "checkpoint-4").exists()
    assert [entry["step"] for entry in state_of(out)["log_history"] if "loss" in entry] == [1, 2, 4, 6]


def test_every_setting_is_taken_refused_kept_announced_or_harmless():
    fields = [f.name for group in (ModelArguments, DataArguments, RunArguments) for f in dataclasses.fields(group)]
    listed = [name for names in resumed_settings.TREATMENTS.values() for name in names]
    assert sorted(set(listed)) == sorted(listed), "a field has one treatment"
    # one that is in no row is announced; a new one of Transformers is to be thought about, and until then is safe
    missing = [name for name in fields if name not in TREATMENT_OF]
    assert missing == [], f"announced by default: {missing}"


def test_a_field_that_nobody_has_thought_of_is_announced(tmp_path):
    @dataclass
    class Later(TrainingArguments):
        quantum: str | None = field(default=None)

    before, now = (stored_arguments(arguments(tmp_path, Later, quantum=value)) for value in ("a", "b"))
    (tmp_path / "run_settings.json").write_text(json.dumps({"arguments": before}))
    assert list(find_changes(tmp_path, {"arguments": now})) == [(ANNOUNCED, "quantum was 'a', is 'b'")]


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"arguments": []}', '{"arguments": null}', "3", ""])
def test_settings_that_cannot_be_read_are_not_compared(tmp_path, text):
    (tmp_path / "run_settings.json").write_text(text)
    assert list(find_changes(tmp_path, {"arguments": {"seed": 1}, "data": "x"})) == []

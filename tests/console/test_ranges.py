# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Whatever number, type or file a setting is given: a run that works, or one line that names it."""

import dataclasses
import json
import math
import shutil

import pytest
from training_helpers import (
    TINY_PEER,
    private_cache,  # noqa: F401  a fixture
    run_script,
    train,
    write_inputs,
)

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import DataArguments
from modeling_peer.evaluation.checkpoints import EvaluationArguments
from modeling_peer.evaluation.generation import GenerationArguments
from modeling_peer.hub.loading import ModelArguments, load_preset
from modeling_peer.studies.compare_runs import read_run
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.checkpoint_folders import LIST_OF_FILES
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("private_cache")
GROUPS = (ModelArguments, DataArguments, RunArguments, EvaluationArguments, GenerationArguments)
UNUSUAL = (math.nan, math.inf, -math.inf, -1, 0, 0.5, 10**400, 2**63, -(10**400))
# what means something, and is not the default's kind of number
NOT_WRONG = {
    ("max_steps", -1),
    ("local_rank", -1),
    *((name, 0) for name in ("learning_rate", "weight_decay", "table_weight_decay", "warmup_steps", "eval_delay")),
    *((name, 0) for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha")),
    *((name, 0) for name in ("label_smoothing_factor", "save_total_limit", "seed", "data_seed", "local_rank")),
    *(
        (name, 0)
        for name in ("dataloader_num_workers", "shuffle_buffer", "validation_percent", "temperature", "top_k")
    ),
}


def number_fields(group):
    return [
        f.name
        for f in dataclasses.fields(group)
        if f.init and any(word in str(f.type) for word in ("int", "float")) and "str" not in str(f.type)
    ]


NUMBERS = [(group, name) for group in GROUPS for name in number_fields(group)]


@pytest.mark.parametrize(("group", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_number_that_cannot_work_is_refused_by_its_name(tmp_path, group, name):
    others = {"output_dir": str(tmp_path), "use_cpu": True} if group is RunArguments else {}
    for value in UNUSUAL:
        finite = isinstance(value, int) or math.isfinite(value)
        must_be = not finite or abs(value) > 2**53 or (value in (-1, 0) and (name, value) not in NOT_WRONG)
        said = refusal(lambda value=value: group(**others, **{name: value}))
        assert said or not must_be, f"{name}={value} is accepted"
        assert said is None or name in said


def refusal(call):
    """What is said against it; None where it works. Transformers says a few things itself."""
    try:
        call()
    except ValueError as error:  # a SettingsError is one
        return str(error)
    return None


@pytest.mark.parametrize("name", number_fields(RunArguments) + number_fields(DataArguments))
def test_no_number_on_the_command_line_ends_in_a_traceback(name):
    for word in ("nan", "inf", "-1", "0", "1e30", "x", "", "true", "[1]", "1" + "0" * 400):
        said = refusal(lambda word=word: parse_recipe(["--use_cpu", "true", f"--{name}={word}"]))
        assert said is None or name in said


WRONG_SETTINGS = [
    (["--lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type"),  # lacks num_decay_steps
    (["--lr_scheduler_kwargs", '{"num_cycels": 2}', "--lr_scheduler_type=cosine"], "num_cycels"),
    (["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs"),
    (["--lr_scheduler_kwargs", "{"], "lr_scheduler_kwargs|JSON|Expecting"),
    (["--optim=adamw_bnb_8bit"], "bnb|bitsandbytes"),  # not installed
    (["--optim=nothing"], "nothing"),
    (["--optim_args", "a"], "optim_args|pack"),
    (["--table_learning_rate_schedule=decaying", "--lr_scheduler_type=reduce_lr_on_plateau"], "schedule"),
    (["--gradient_accumulation_steps=0"], r"--gradient_accumulation_steps \(0\) must be at least 1"),
    (["--learning_rate=nan"], r"--learning_rate \(nan\) must be at least 0"),
    (["--max_steps=0"], r"--max_steps \(0\) must be at least 1, or -1"),
    (["--fsdp_config", "nowhere.json", "--fsdp", "full_shard"], "nowhere.json|fsdp|FSDP"),
    (["--deepspeed", "nowhere.json"], "deepspeed|DeepSpeed|nowhere"),
    (["--model_overrides", "vocab_size=1000000000000000"], "vocab_size|allocat|memory|overflow"),
    (["--model_overrides", "hidden_size=NaN"], "hidden_size"),
    (["--model_overrides", "num_sub_keys=Infinity"], "num_sub_keys"),
    (["--model_overrides", "num_attention_heads=0"], "num_attention_heads|zero"),
    (["--model_overrides", "num_hidden_layers=-1"], "num_hidden_layers|layer"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_SETTINGS, ids=lambda value: str(value)[:60])
def test_settings_that_cannot_work_together_are_refused(tmp_path, words, message):
    words = [*write_inputs(tmp_path), *words]
    steps = [] if "max_steps" in str(words) else ["--max_steps=2"]
    with pytest.raises(SettingsError, match=message):
        train_language_model(parse_recipe([*words, *steps, f"--output_dir={tmp_path / 'out'}"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1, 2]", "learning_rate must be one value; got a list of 2"),
        ("learning_rate: {a: 1}", "argument --learning_rate.*: invalid float value"),
        ("learning_rate: yes", "argument --learning_rate.*: invalid float value: 'true'"),
        ("learning_rate: .nan", r"--learning_rate \(nan\) must be at least 0"),
        ("learning_rate: .inf", r"--learning_rate \(inf\) must be finite"),
        ("max_steps: 1.5", "argument --max_steps.*: invalid int value: '1.5'"),
        ("max_steps: [", "is not valid YAML"),
        ("max_steps: 2020-01-01", "max_steps must be text, a number, true or false: .* date"),
        ("run_name: 2020-13-45", "is not valid YAML"),
        ("run_name: !!set {a, b}", "run_name must be text, a number, true or false: .* set"),
        ("run_name: !!binary aGVsbG8=", "run_name must be text, a number, true or false: .* bytes"),
        ("run_name: &a [*a]", "run_name must be one value"),
        ("model_overrides: &a [*a]", "model_overrides must be text, .*[Cc]ircular|recursion"),
        ("bf16: maybe", "--bf16"),
        ("optim: 3", "--optim: invalid choice"),
        ("1: 2", "unknown field 1"),
        ("null: 2", "unknown field None"),
        ("? [1, 2]\n: 3", "is not valid YAML|unknown field"),
        ("null", "must be a mapping of fields to values; it holds a NoneType"),
        ("3", "it holds a int"),
        ("", "it holds a NoneType"),
        ("seed: !!python/object:os.system x", "is not valid YAML"),
        ("model: peer_tiny\nmodel_overrides: 3", "model_overrides takes key=value pairs or a JSON object; got '3'"),
    ],
)
def test_a_recipe_with_values_of_other_types_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        train_language_model(parse_recipe([str(tmp_path / "recipe.yaml"), f"--output_dir={tmp_path / 'out'}"]))


def test_a_script_without_recipes_refuses_a_word_for_a_number_in_one_line():
    with pytest.raises(SettingsError, match=r"argument --stride: invalid int value: 'x'\.$"):
        parse_arguments(EvaluationArguments, ["--stride", "x"])


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", '"peer"', '{"model_type": 3}', '{"model_type": []}'])
def test_a_configuration_of_another_type_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(SettingsError, match=r"model\.json"):
        load_preset(str(tmp_path / "model.json"))


NUMBERS_OF_A_MODEL = [name for name, value in TINY_PEER.items() if isinstance(value, int)]


@pytest.mark.parametrize("name", NUMBERS_OF_A_MODEL)
@pytest.mark.parametrize("value", ["x", None, [1], {}, 1.5], ids=str)
def test_a_field_of_another_type_is_refused_or_works(tmp_path, name, value):
    (tmp_path / "model.json").write_text(json.dumps(TINY_PEER | {name: value}))
    said = refusal(lambda: load_preset(str(tmp_path / "model.json")))
    assert said is None or "model.json" in said


JSON_FILES = ("trainer_state.json", "config.json", LIST_OF_FILES, "tokenizer.json", "unlogged_loss_0.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the checkpoints of its steps 2 and 4, the words to resume it with, and its cache."""
    folder = tmp_path_factory.mktemp("finished")
    words = write_inputs(folder)
    train(words, output_dir=folder / "out", max_steps=4, save_steps=2)
    return folder / "out", words


SLOW_TEXTS = [pytest.param(text, marks=pytest.mark.slow) for text in ("[]", "3", '"x"', "")]


@pytest.mark.parametrize("text", ["null", '{"a": ', "{}", *SLOW_TEXTS])
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_checkpoint_whose_json_is_of_another_type_is_passed_over(tmp_path, finished, capsys, file, text):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "checkpoint-4" / file).write_text(text)
    settings = {"output_dir": out, "max_steps": 5, "save_strategy": "no", "resume_from_checkpoint": "last"}
    said = refusal(lambda: train(finished[1], **settings))
    if text == "{}" and said:  # an object, but not one that the file can be
        assert file in said or "tokenizer" in said or "checkpoint-4" in said
        return
    assert said is None
    if text != "{}":
        assert "not resumed, because incomplete: checkpoint-4 (" in capsys.readouterr().out
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 5


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"arguments": 3}'])
def test_stored_settings_of_another_type_do_not_stop_a_run_that_is_resumed(tmp_path, finished, text):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "run_settings.json").write_text(text)
    for name in ("run_settings.json", LIST_OF_FILES):  # as of an older version
        (out / "checkpoint-4" / name).unlink()
    train(finished[1], output_dir=out, max_steps=5, resume_from_checkpoint="last", save_strategy="no")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("train_lm_results.json", text) for text in ("null", "[]", "{", "3")),
        *(("trainer_state.json", text) for text in ("null", "[]", "{", "3", "{}", '{"log_history": 3}')),
    ],
)
def test_damaged_results_are_not_compared(tmp_path, finished, file, text):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / file).write_text(text)
    with pytest.raises(SettingsError, match=r"the results in .* are damaged"):
        read_run(out)


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "words", [["--gradient_accumulation_steps", "0"], ["--learning_rate", "nan"], ["--max_steps", "x"]], ids=str
)
def test_the_script_ends_with_one_line_and_status_two(tmp_path, words):
    process = run_script("train_lm.py", *write_inputs(tmp_path), "--output_dir", str(tmp_path / "out"), *words)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr

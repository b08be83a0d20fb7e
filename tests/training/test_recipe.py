# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Settings: dataclass, recipe, command line, and what is said when they are wrong."""

import dataclasses
import importlib

import pytest
from training_helpers import REPOSITORY

import modeling_peer.training
from modeling_peer import PeerForCausalLM
from modeling_peer.console.command_line import Overrides, parse_arguments
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_yaml
from modeling_peer.data.corpus import DataArguments
from modeling_peer.evaluation.checkpoints import EvaluationArguments
from modeling_peer.evaluation.generation import GenerationArguments
from modeling_peer.hub.loading import ModelArguments, load_preset
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.recipe import parse_recipe

GROUPS = (ModelArguments, DataArguments, RunArguments, EvaluationArguments, GenerationArguments)


def write_recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    path = write_recipe(tmp_path, "learning_rate: 5e-4\nseed: 1\nbf16: false\nmax_steps: -1\ntext_column: null\n")
    recipe = parse_recipe([path, "--seed", "2"])
    assert (recipe.run.learning_rate, recipe.run.seed, recipe.data.text_column) == (0.0005, 2, "text")
    assert recipe.run.output_dir == "runs/recipe"
    assert recipe.settings == {"learning_rate": 0.0005, "seed": 2, "output_dir": "runs/recipe"}


def test_overrides_of_the_recipe_and_of_the_command_line_add_up(tmp_path):
    path = write_recipe(tmp_path, "model_overrides: {num_sub_keys: 64, mlp_layer_types: [dense, sparse]}\n")
    recipe = parse_recipe([path, "--model_overrides", "num_sub_keys=32", "expert_act=relu"])
    overrides = recipe.model.model_overrides
    assert overrides == {"num_sub_keys": 32, "mlp_layer_types": ["dense", "sparse"], "expert_act": "relu"}


def test_overrides_and_prompts_given_several_times_add_up(tmp_path):
    path = write_recipe(tmp_path, "model_overrides: {query_dim: 8}\n")
    recipe = parse_recipe([path, "--model_overrides", "a=1", "--seed", "2", "--model_overrides", "b=2", "c=3"])
    assert recipe.model.model_overrides == {"query_dim": 8, "a": 1, "b": 2, "c": 3}
    assert parse_arguments(GenerationArguments, ["--prompt", "a", "--prompt", "b", "c"]).prompt == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        (EvaluationArguments, "stride", 0, "at least 1"),
        (EvaluationArguments, "context_length", -1, "at least 1"),
        (EvaluationArguments, "batch_size", 0, "at least 1"),
        (EvaluationArguments, "max_bytes", 0, "at least 1"),
        (DataArguments, "max_evaluation_bytes", 0, "at least 1"),
        (DataArguments, "validation_percent", 100.5, "from 0 to 100"),
        (DataArguments, "validation_percent", -5.0, "from 0 to 100"),
        (RunArguments, "per_device_train_batch_size", 0, "at least 1"),
        (RunArguments, "max_train_minutes", 0.0, "more than 0"),
        (GenerationArguments, "max_new_tokens", 0, "at least 1"),
        (GenerationArguments, "temperature", -0.1, "at least 0"),
        (GenerationArguments, "temperature", float("nan"), "at least 0"),
        (GenerationArguments, "top_k", -1, "at least 0"),
        (GenerationArguments, "top_p", 0.0, "more than 0 and at most 1"),
        (GenerationArguments, "top_p", 2.0, "more than 0 and at most 1"),
    ],
)
def test_a_value_out_of_range_is_refused_before_any_work(group, field, value, message):
    with pytest.raises(SettingsError, match=rf"--{field} \({value}\) must be {message}"):
        group(**{field: value})


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff")
    with pytest.raises(SettingsError, match=r"recipe.yaml is not UTF-8 text: invalid start byte at byte 7"):
        parse_recipe([str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (['{"mlp_layer_types": ["dense"], "query_dim": 8}'], {"mlp_layer_types": ["dense"], "query_dim": 8}),
        (["query_norm=none", "share_sub_keys=false"], {"query_norm": "none", "share_sub_keys": False}),
        (['mlp_layer_types=["sparse"]'], {"mlp_layer_types": ["sparse"]}),
    ],
)
def test_overrides_are_pairs_or_json(words, expected):
    assert Overrides(words) == Overrides(*words) == expected


def test_text_named_on_the_command_line_stands_for_the_recipes():
    recipe = parse_recipe(["wikitext2", "--train_file", "mine.txt"])
    assert (recipe.data.train_file, recipe.data.dataset_name, recipe.data.dataset_config) == ("mine.txt", None, None)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("learnin_rate: 1", [], r"unknown field 'learnin_rate'. Did you mean 'learning_rate'\?"),
        ("seed: 1", ["--train-fil=x"], r"unknown argument '--train-fil=x'. Did you mean 'train_file'\?"),
        ("- a list", [], "must be a mapping of fields to values; it holds a list"),
        ("seed: [", [], "is not valid YAML"),
        ("seed: 1", ["stray"], "unknown argument 'stray'"),
    ],
)
def test_a_wrong_field_is_refused_with_the_nearest_name(tmp_path, text, words, message):
    with pytest.raises(SettingsError, match=message):
        parse_recipe([write_recipe(tmp_path, text), *words])


def test_a_missing_recipe_is_refused_with_those_there_are():
    with pytest.raises(
        SettingsError, match=r"no file 'nope.yaml'.*enwiki2015, finetune, llama_enwiki2015, mixed, .*, wikitext2"
    ):
        parse_recipe(["nope.yaml"])


def test_an_unknown_argument_of_a_script_without_recipes_is_refused_too():
    with pytest.raises(SettingsError, match=r"Did you mean 'max_bytes'\?"):
        parse_arguments(EvaluationArguments, ["--max_byte", "3"])
    assert parse_arguments(GenerationArguments, ["--prompt", "a", "b"]).prompt == ["a", "b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_head": 128}, r"num_experts_per_head \(128\) exceeds num_sub_keys \(64\)"),
        ({"num_sub_key": 8}, r"PeerConfig has no field 'num_sub_key'. Did you mean 'num_sub_keys'\?"),
        ({"num_sub_keys": "many"}, "num_sub_keys"),
    ],
)
def test_a_wrong_override_is_refused_with_the_numbers(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_preset("peer_tiny", overrides)


def test_the_configuration_of_a_saved_model_counts_as_a_preset(tmp_path, tiny_config):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert load_preset(str(tmp_path / "config.json"), {"num_sub_keys": 16}).num_peer_experts == 256


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configuration/training").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_is_read(path):
    recipe = parse_recipe([str(path)])
    assert recipe.run.output_dir == f"runs/{path.stem}"
    if recipe.model.model:
        config = load_preset(recipe.model.model, recipe.model.model_overrides)
        assert recipe.data.block_size <= config.max_position_embeddings


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_has_a_help_text(group):
    assert [f.name for f in dataclasses.fields(group) if f.init and not f.metadata.get("help")] == []


@pytest.mark.parametrize("group", [ModelArguments, EvaluationArguments, GenerationArguments])
def test_the_help_offers_no_expert_code_that_does_not_exist(group):
    assert "eager, or a registered name." in group.__dataclass_fields__["experts_implementation"].metadata["help"]


def test_training_without_its_packages_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "evaluate" else name)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: evaluate.*pip install -e '\.\[train\]'"):
        importlib.reload(modeling_peer.training)


@pytest.mark.parametrize(("text", "value"), [("4e-3", 0.004), ("1e13", 1e13), ("-2.5E+3", -2500.0), ("1e", "1e")])
def test_numbers_of_a_recipe_are_numbers(tmp_path, text, value):
    (tmp_path / "recipe.yaml").write_text(f"learning_rate: {text}\n")
    assert read_yaml(tmp_path / "recipe.yaml") == {"learning_rate": value}

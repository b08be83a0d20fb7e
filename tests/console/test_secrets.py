# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""No file of a run holds a token or a password, and what is pushed is pushed with it."""

import argparse
import json
from concurrent.futures import Future
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers.trainer
from huggingface_hub import RepoUrl
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    train,
    write_inputs,
)
from transformers import TrainingArguments

from modeling_peer import PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.secrets import is_secret, without_secrets
from modeling_peer.training import PeerTrainer
from modeling_peer.training.private_settings import pickled_without_secrets
from modeling_peer.training.recipe import parse_recipe
from modeling_peer.training.resumed_settings import stored_arguments

pytestmark = pytest.mark.usefixtures("private_cache")
TOKEN = "hf_" + "SECRETsecret123"


@pytest.fixture
def hub(monkeypatch):
    """Calls of the Hub by name, each with its token; nothing leaves the machine."""
    calls = {}

    def upload_folder(self, **options):
        calls.setdefault("upload_folder", []).append(options["token"])
        done = Future()
        done.set_result(None)
        return done

    def create_repo(self, *args, **options):
        calls.setdefault("create_repo", []).append(options.get("token"))
        return RepoUrl("https://huggingface.co/me/model")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda *args, **kwargs: {"name": "me"})
    for name in ("create_repo", "upload_folder"):
        if hasattr(transformers.trainer, name):  # older releases import the functions
            api = huggingface_hub.HfApi()
            monkeypatch.setattr(transformers.trainer, name, getattr(api, name))
    return calls


def files_with(folder, text):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_that_pushes_every_save_writes_its_token_to_no_file(tmp_path, hub, capfd):
    words = write_inputs(tmp_path)
    options = {"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": "all_checkpoints", "hub_token": TOKEN}
    options |= {"report_to": "tensorboard", "max_steps": 2, "save_steps": 1, "log_level": "info"}
    train(words, output_dir=tmp_path / "out", **options)
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert files_with(tmp_path, TOKEN) == []
    assert set(hub["create_repo"]) == set(hub["upload_folder"]) == {TOKEN}
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err


def test_a_program_with_plain_arguments_writes_its_token_to_no_file(tmp_path, hub, tiny_config):
    tokens = torch.arange(16)
    rows = [{"input_ids": tokens, "labels": tokens}] * 8
    settings = {"hub_token": TOKEN, "push_to_hub": True, "hub_model_id": "me/model", "max_steps": 2, "save_steps": 1}
    options = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="tensorboard", **settings)
    trainer = PeerTrainer(PeerForCausalLM(tiny_config()), options, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert files_with(tmp_path, TOKEN) == []
    assert options.hub_token == TOKEN
    assert set(hub["upload_folder"]) == {TOKEN}
    for path in (tmp_path / "training_args.bin", tmp_path / "checkpoint-2" / "training_args.bin"):
        loaded = torch.load(path, weights_only=False)
        assert type(loaded) is TrainingArguments
        assert (loaded.hub_token, loaded.max_steps, loaded.hub_model_id) == (None, 2, "me/model")


def test_outside_of_a_save_arguments_are_pickled_whole(tmp_path):
    options = argparse.Namespace(hub_token=TOKEN, nested={"api_key": "x", "plain": [1]})
    with pickled_without_secrets(argparse.Namespace):
        torch.save(options, tmp_path / "inside")
    torch.save(options, tmp_path / "outside")
    loaded = [torch.load(tmp_path / name, weights_only=False) for name in ("inside", "outside")]
    assert loaded[0] == argparse.Namespace(hub_token=None, nested={"api_key": "<hidden>", "plain": [1]})
    assert loaded[1] == options


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "token", "wandb_api_key", "password", "api-key"])
def test_a_setting_is_secret_by_its_name(name):
    assert is_secret(name)
    assert without_secrets({"a": [{name: "x"}]}) == {"a": [{name: "<hidden>"}]}


@pytest.mark.parametrize(
    "name", ["include_num_input_tokens_seen", "average_tokens_across_devices", "max_new_tokens", "tokenizer", "key"]
)
def test_a_setting_that_only_sounds_like_one_is_kept(name):
    assert without_secrets({name: "x"}) == {name: "x"}


def test_tokens_and_passwords_within_a_text_are_hidden():
    text = f"https://user:pass@host/data and {TOKEN}, but not hf_hub"
    assert without_secrets(text) == "https://<hidden>@host/data and <hidden>, but not hf_hub"


@pytest.mark.parametrize("words", [["--hub_token", TOKEN], [f"--hub_token={TOKEN}"]])
def test_neither_the_settings_of_a_run_nor_those_compared_have_the_token(words):
    recipe = parse_recipe([*words, "--run_name", TOKEN, "--model_overrides", f'a="{TOKEN}"'])
    stored = stored_arguments(recipe.model, recipe.data, recipe.run)
    assert TOKEN not in json.dumps([recipe.settings, stored])
    assert recipe.run.hub_token == TOKEN


@pytest.mark.parametrize("words", [f"--hub_tokn={TOKEN}", TOKEN, "--hub_tokn=s3cret"])
def test_a_token_under_a_mistyped_name_is_not_printed(words):
    with pytest.raises(SettingsError, match="unknown argument") as refused:
        parse_recipe(["--seed", "1", words])
    assert TOKEN not in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_a_recipe_s_token_is_used_and_shown_nowhere(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"hub_token: {TOKEN}\n")
    recipe = parse_recipe([str(tmp_path / "recipe.yaml")])
    assert recipe.run.hub_token == TOKEN
    assert "hub_token" not in recipe.settings
    assert SimpleNamespace(**recipe.settings)  # nothing else is lost

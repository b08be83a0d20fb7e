# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Uploads that cannot work are one sentence: before training, or after it with the folder of the saved model."""

import json
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import _http
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    train,
    write_inputs,
)
from transformers import AutoModelForCausalLM, Trainer

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.scripts import run_script
from modeling_peer.hub.pushing import explained_creation, require_login
from modeling_peer.training import language_modeling

pytestmark = pytest.mark.usefixtures("private_cache")
TOKEN = "hf_" + "SECRETsecret123"


def refused(status: int, text: str) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)  # its constructor takes the HTTP library's own response
    Exception.__init__(error, text)
    error.response = SimpleNamespace(status_code=status)
    return error


def raising(error: Exception):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.fixture
def no_network(monkeypatch):
    """The Hub is asked, and no request leaves the machine."""
    requests = []

    def refuse(*args, **kwargs):
        requests.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(_http.get_session()), "send", refuse)
    return requests


@pytest.fixture
def logged_in(monkeypatch):
    """The token is known, and the repository exists; nothing was uploaded yet."""

    def init_hf_repo(self, *args, **kwargs):
        self.hub_model_id, self.push_in_progress = "me/model", None

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda *args, **kwargs: {"name": "me"})
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (TOKEN, r"the Hub cannot be reached \(OSError: no route to host\)\. Try again with a network\. Or leave"),
        ("", r"needs a token, and none was found\. Run `hf auth login` or set HF_TOKEN\. Or leave --push_to_hub out"),
    ],
)
def test_without_a_network_or_a_token_a_push_is_refused_before_the_data_are_read(
    tmp_path, monkeypatch, no_network, token, message
):
    monkeypatch.setattr(language_modeling, "load_corpus", raising(AssertionError("read the data")))
    monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: token or None)
    began = time.monotonic()
    with pytest.raises(SettingsError, match=f"--push_to_hub:? {message}") as error:
        train(write_inputs(tmp_path), output_dir=tmp_path / "out", max_steps=1, push_to_hub=True)
    assert time.monotonic() - began < 20, "retries"
    # the library may have a question of its own before its first request
    assert len([request for request in no_network if "whoami" in repr(request)]) == (1 if token else 0)
    assert "\n" not in str(error.value)


def test_where_the_hub_must_not_be_asked_a_push_is_refused(monkeypatch):
    with pytest.raises(SettingsError, match=r"--push_to_hub: the Hub cannot be reached \(OfflineModeIsEnabled: "):
        require_login(TOKEN)  # HF_HUB_OFFLINE, set by `private_cache`


def test_a_token_that_the_hub_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", raising(refused(401, f"Invalid token {TOKEN}.\n\nRequest 1")))
    with pytest.raises(SettingsError, match=r"the Hub refused the token \(HfHubHTTPError: Invalid") as error:
        require_login(TOKEN)
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_asked_too_often_says_nothing_about_the_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", raising(refused(429, "Too many requests")))
    require_login(TOKEN)


def test_a_missing_token_is_known_by_its_class(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", raising(LocalTokenNotFoundError("not logged in")))
    with pytest.raises(SettingsError, match="hf auth login"):
        require_login(None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(403, "You don't have the rights."), "the Hub did not create 'you/model' .*don't have the rights"),
        (OSError("no route to host"), "cannot be reached"),
    ],
)
def test_a_repository_that_cannot_be_created_is_one_sentence(error, message):
    with pytest.raises(SettingsError, match=message), explained_creation("you/model"):
        raise error


def test_a_name_that_no_repository_can_have_is_refused_before_training(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda *args, **kwargs: {"name": "me"})
    monkeypatch.setattr(Trainer, "train", raising(AssertionError("training began")))
    settings = {"push_to_hub": True, "hub_model_id": "me/a--b", "hub_token": TOKEN}
    with pytest.raises(SettingsError, match="--hub_model_id 'me/a--b' is not a valid name"):
        train(write_inputs(tmp_path), output_dir=tmp_path / "out", max_steps=1, **settings)


@pytest.mark.usefixtures("logged_in", "no_network")
def test_a_model_that_could_not_be_uploaded_is_saved_and_the_error_names_its_folder(tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": TOKEN, "hub_strategy": "end"}
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(write_inputs(tmp_path), output_dir=out, max_steps=1, **settings).summary)
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the model is saved in {out}, but it was not uploaded to the Hub (")
    assert f"hf upload me/model {out} . --exclude 'checkpoint-*/*' --exclude '_*'" in last
    assert AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "train_lm_results.json").read_text())["steps"] == 1
    assert (out / "README.md").is_file()


@pytest.mark.usefixtures("logged_in")
def test_a_save_that_fails_before_the_upload_keeps_its_own_message(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "push_to_hub", raising(SettingsError("the disk is full")))
    settings = {"push_to_hub": True, "hub_strategy": "end"}
    with pytest.raises(SettingsError, match=r"^the disk is full$"):
        train(write_inputs(tmp_path), output_dir=tmp_path / "out", max_steps=1, **settings)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A name of something that is not there is refused at once, without the network, with the nearest that is."""

import json
import time

import huggingface_hub
import pytest
from huggingface_hub.utils import _http
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    train,
    write_inputs,
)

from modeling_peer.console import names
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import locate_model
from modeling_peer.data.text_files import find_text_files
from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint
from modeling_peer.evaluation.generation import GenerationArguments, generate_from_checkpoint
from modeling_peer.hub.loading import load_checkpoint
from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs
from modeling_peer.studies.study_recipe import parse_study
from modeling_peer.training.recipe import parse_recipe


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The Hub would be asked, if somebody asked: the requests made. Its cache is empty, and so is the folder."""
    requests = []

    def refuse(*args, **kwargs):
        requests.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(type(_http.get_session()), "send", refuse)
    monkeypatch.chdir(tmp_path)
    names._ask_hub.cache_clear()
    began = time.monotonic()
    yield requests
    assert time.monotonic() - began < 20, "retries"
    names._ask_hub.cache_clear()


MISTYPED = [
    ("per_tiny", r"Did you mean 'peer_tiny'\?"),
    ("peer_tyni", r"Did you mean 'peer_tiny'\?"),
    ("runs/quickstrat", r"Did you mean 'runs/quickstart'\?"),
    ("quickstart", r"Did you mean 'runs/quickstart'\?"),
    ("runs/quickstart/checkpoint-3", r"no such folder\. Did you mean 'runs/quickstart/checkpoint-30'\?"),
    ("./nowhere", "no such folder"),
    ("/nowhere/at/all", "no such folder"),
    ("~/nowhere", "no such folder"),
    ("a/b/c", "no such folder"),
    ("gpt2", "no such folder.* openai-community/gpt2"),
    ("x" * 300, "no such folder"),
    ("mine/modle", r"Did you mean 'mine/model'\?"),
]


@pytest.fixture
def folders(tmp_path):
    for name in ("runs/quickstart/checkpoint-30", "mine/model"):
        (tmp_path / name).mkdir(parents=True)


@pytest.mark.parametrize(("name", "message"), MISTYPED)
def test_a_mistyped_model_to_train_is_refused_without_the_network(online, folders, name, message):
    with pytest.raises(SettingsError, match=f"(?s)cannot open .*{message}"):
        train(["--model", name], output_dir="out", use_cpu=True, report_to="none")
    assert online == []


@pytest.mark.parametrize(("name", "message"), MISTYPED[2:])
def test_a_mistyped_checkpoint_is_refused_without_the_network(online, folders, name, message):
    with pytest.raises(SettingsError, match=f"(?s)cannot load .*{message}"):
        load_checkpoint(name)
    assert online == []


@pytest.mark.parametrize("name", ["peer_tiny", "peer_tiny.json", "peer_mini"])
def test_a_configuration_is_no_checkpoint(online, name):
    message = r"is a configuration, without weights. Train it first: peer train --model peer_"
    for use, arguments in (
        (generate_from_checkpoint, GenerationArguments(model=name)),
        (evaluate_checkpoint, EvaluationArguments(model=name)),
    ):
        with pytest.raises(SettingsError, match=message):
            use(arguments)
    assert online == []


@pytest.mark.parametrize("name", ["peer_tny", "per_tiny"])
def test_the_nearest_configuration_is_not_offered_where_a_checkpoint_is_wanted(online, name):
    with pytest.raises(SettingsError, match="no such folder") as refused:
        load_checkpoint(name)
    assert "Did you mean" not in str(refused.value)
    assert online == []


@pytest.mark.usefixtures("private_cache")
def test_a_run_that_stopped_before_its_first_save_is_named_as_such(tmp_path):
    inputs = write_inputs(tmp_path)
    for name, settings in (("unsaved", {"save_strategy": "no"}), ("unfinished", {})):
        train(inputs, output_dir=tmp_path / name, max_steps=1, **settings)
        for file in ("config.json", "model.safetensors"):  # as when it is killed
            (tmp_path / name / file).unlink()
    shown = r"unsaved holds a run that has saved no model yet: .*--overwrite_output_dir; --save_steps"
    for use in (load_checkpoint, lambda model: train(inputs, model=model, output_dir=tmp_path / "out")):
        with pytest.raises(SettingsError, match=shown):
            use(str(tmp_path / "unsaved"))
        with pytest.raises(SettingsError, match=r"has not ended. Name its newest checkpoint, .*/checkpoint-1, or"):
            use(str(tmp_path / "unfinished"))
    assert load_checkpoint(str(tmp_path / "unfinished" / "checkpoint-1"))


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    (tmp_path / "study" / "first").mkdir(parents=True)
    (tmp_path / "study" / "notes.txt").touch()
    with pytest.raises(SettingsError, match=r"no model in it \(no config.json\); it holds: first, notes.txt"):
        locate_model(str(tmp_path / "study"), trained=True)
    (tmp_path / "study" / "first" / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"Did you mean '.*study/first'\?"):
        locate_model(str(tmp_path / "study"), trained=True)
    with pytest.raises(SettingsError, match="it is a file"):
        locate_model(str(tmp_path / "study" / "notes.txt"), trained=True)


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", '"peer"', "\ufffd"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_checkpoint_whose_json_is_of_another_type_is_refused_by_the_file(tmp_path, file, text):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "peer"}))
    (tmp_path / file).write_text(text)
    with pytest.raises(SettingsError, match=rf"{file} (must hold a JSON object|is damaged or cut short)"):
        load_checkpoint(str(tmp_path))


def test_a_repository_of_the_hub_is_asked_for_once_when_there_is_no_network(online):
    for use in (load_checkpoint, lambda name: locate_model(name, trained=False)):
        with pytest.raises(SettingsError, match=r"the Hub cannot be reached \(OSError: no route to host\)"):
            use("somebody/model")
    # the library may have a question of its own before its first request
    assert len([request for request in online if "somebody/model" in repr(request)]) == 2, "retries"


def test_a_repository_in_the_cache_is_loaded_when_there_is_no_network(online, tmp_path):
    folder = tmp_path / "hub" / "models--somebody--model"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert locate_model("somebody/model", trained=True) == str(snapshot)


@pytest.mark.usefixtures("private_cache")
def test_offline_a_repository_that_is_not_in_the_cache_is_one_sentence():
    names._ask_hub.cache_clear()
    with pytest.raises(SettingsError, match=r"nor in the Hub's cache, and HF_HUB_OFFLINE is set") as refused:
        load_checkpoint("somebody/model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "byte"}, r"cannot load a tokenizer from 'byte': no such folder.*Did you mean 'bytes'\?"),
        ({"tokenizer": "./tok"}, r"cannot load a tokenizer from './tok': no such folder"),
        ({"train_file": "txt.txt"}, r"no such file or folder: txt.txt .* Did you mean 'text.txt'\?"),
        (
            {"resume_from_checkpoint": "out/checkpoint-1"},
            r"cannot resume from out/checkpoint-1: no such folder",
        ),
    ],
    ids=str,
)
def test_other_mistyped_names_of_a_run_are_refused_without_the_network(online, tmp_path, settings, message):
    words = [word for word in write_inputs(tmp_path) if "--tokenizer" not in word]
    with pytest.raises(SettingsError, match=message):
        train(words, output_dir="out", **settings)
    assert online == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python_stdlb", r"Did you mean 'python_stdlib'\?"),
        ("wikitext", "Data sets of the Hub are owner/name, such as Salesforce/wikitext"),
        ("./data/corpus", "no such folder"),
        ("runs/data", "no such folder"),
    ],
)
def test_a_mistyped_data_set_is_refused_without_the_network(online, name, message):
    with pytest.raises(SettingsError, match=f"cannot open data set {name!r}: .*{message}"):
        train(["--model", "peer_tiny", "--dataset_name", name], output_dir="out", use_cpu=True, report_to="none")
    with pytest.raises(SettingsError, match=f"cannot open data set {name!r}: .*{message}"):
        evaluate_checkpoint(EvaluationArguments(model="peer_tiny", dataset_name=name))
    assert online == []


def test_a_data_set_of_the_hub_is_asked_for_once_when_there_is_no_network(online):
    with pytest.raises(SettingsError, match="the Hub cannot be reached"):
        train(["--model", "peer_tiny", "--dataset_name", "a/b"], output_dir="out", use_cpu=True, report_to="none")
    assert len([request for request in online if "a/b" in repr(request)]) == 1, "retries"


def test_recipes_studies_and_runs_to_compare_are_offered_the_nearest(online, folders):
    with pytest.raises(SettingsError, match=r"no file 'quickstrat'.* Did you mean 'quickstart'\?"):
        parse_recipe(["quickstrat"])
    with pytest.raises(SettingsError, match=r"no file 'smok'.* Did you mean 'smoke'\?"):
        parse_study(["smok"])
    with pytest.raises(SettingsError, match=r"nothing matches runs/quickstrat.* Did you mean 'runs/quickstart'\?"):
        compare_runs(ComparisonArguments(runs=["a=runs/quickstrat"]))
    with pytest.raises(SettingsError, match="no such file or folder"):
        find_text_files("nowhere/at/all.txt")
    assert online == []

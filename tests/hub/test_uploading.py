# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Uploads from this process: one commit, what is sent and deleted, and failures in one sentence."""

import os

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, USER, Hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.hub.exported_card import validate_card
from modeling_peer.hub.pushing import require_login
from modeling_peer.hub.uploading import upload_files

REPO = f"{USER}/model"
CARD = "---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# A card\n"


WITHOUT_XET = "hf_xet is not installed; huggingface_hub needs it on x86-64 and ARM only"


def connect(server, monkeypatch):
    """Make it the Hub of this process: what the library reads from the environment at its import is set."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", server.xet is None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to, without storage of chunks."""
    with Hub() as server:
        connect(server, monkeypatch)
        yield server


@pytest.fixture
def files(tmp_path):
    """Two small files and two large ones, of which the second comes in parts."""
    contents = {
        "README.md": CARD.encode(),
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": os.urandom(1000),
        "model-layer-001-experts.safetensors": os.urandom(700_000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def test_all_files_are_one_commit_and_large_ones_are_announced(hub, files):
    lines = []
    upload = upload_files(files, REPO, announce=lines.append)
    assert upload.url == f"{hub.url}/{REPO}"
    assert upload.commit == hub.repositories[REPO].commits[-1][0]
    assert len(hub.repositories[REPO].commits) == 2  # the first is the Hub's own
    assert {name: hub.files(REPO)[name] for name in files} == {name: path.read_bytes() for name, path in files.items()}
    assert lines == [
        "1 of 2: model-00001-of-00002.safetensors, 1,000 bytes",
        "2 of 2: model-layer-001-experts.safetensors, 700,000 bytes",
        "commit: 2 small files, 2 large ones",
    ]
    assert not hub.repositories[REPO].private


def test_only_what_changed_is_sent_and_files_of_the_former_model_are_deleted(hub, files, tmp_path):
    upload_files(files, REPO)
    (tmp_path / "notes.txt").write_text("put there by hand")
    huggingface_hub.HfApi().upload_file(path_or_fileobj=tmp_path / "notes.txt", path_in_repo="notes.txt", repo_id=REPO)
    stored = list(hub.stored)
    del files["model-00001-of-00002.safetensors"]
    files["config.json"].write_text('{"model_type": "peer"}')
    upload = upload_files(files, REPO)
    assert upload.deleted == ["model-00001-of-00002.safetensors"]
    assert hub.stored == stored
    assert set(hub.files(REPO)) == {*files, "notes.txt", ".gitattributes"}


def test_a_repository_that_changed_meanwhile_is_not_overwritten(hub, files, tmp_path):
    upload_files(files, REPO)
    (tmp_path / "model-layer-001-experts.safetensors").write_bytes(os.urandom(10))

    def commit_something_else(count):
        hub.add_commit(hub.repositories[REPO], hub.repositories[REPO].commits[-1][1], "someone else's")

    hub.before_large = commit_something_else
    with pytest.raises(
        CommandFailed, match=r"the upload to someone/model failed \(.*412.*A commit has happened since"
    ):
        upload_files(files, REPO)
    assert hub.repositories[REPO].messages[-1] == "someone else's"


def test_an_upload_that_the_hub_refuses_says_how_to_go_on(hub, files):
    hub.before_large = lambda count: 403 if count == 1 else None
    with pytest.raises(CommandFailed, match="large files that have arrived are not sent again") as error:
        upload_files(files, REPO)
    assert "\n" not in str(error.value)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.before_large = lambda count: None
    upload_files(files, REPO)
    assert len(hub.stored) == len(set(hub.stored)) == 2


def test_nothing_that_is_to_be_private_goes_into_a_public_repository(hub, files):
    upload_files(files, REPO)
    (files["config.json"]).write_text("private matters")
    with pytest.raises(SettingsError, match="--private: someone/model exists and is public"):
        upload_files(files, REPO, private=True)
    assert hub.files(REPO)["config.json"] == b"{}"
    upload_files(files, f"{USER}/other", private=True)
    assert hub.repositories[f"{USER}/other"].private


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("else/model", CommandFailed, "the upload to else/model failed .*don't have the rights"),
        ("someone/a--b", SettingsError, "--repo_id 'someone/a--b' is not a valid name"),
    ],
)
def test_a_repository_that_cannot_be_created_is_one_sentence(hub, files, name, kind, message):
    with pytest.raises(kind, match=message):
        upload_files(files, name)


def test_a_token_is_tried_before_anything_is_checked(hub, monkeypatch):
    require_login(None, "peer export")
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "x")
    with pytest.raises(SettingsError, match="peer export: the Hub refused the token") as error:
        require_login(None, "peer export", "A way out.")
    assert str(error.value).endswith("A way out.")
    assert TOKEN[:-1] not in str(error.value)


def test_the_hub_is_asked_whether_it_takes_the_card(hub):
    validate_card(ModelCard(CARD))
    wrong = ModelCard(CARD.replace("mit", "mine-1.0").replace("text-generation", "thinking"))
    with pytest.raises(
        SettingsError, match=r'the Hub refuses the card: "license" must be one of .* "pipeline_tag" is'
    ):
        validate_card(wrong)
    assert hub.requests == [("POST", "/api/validate-yaml")] * 2


def test_a_server_without_storage_of_chunks_is_named_with_the_way_out(hub, files, monkeypatch):
    """The client does not go back to whole files by itself where hf_xet is installed."""
    pytest.importorskip("hf_xet", reason=WITHOUT_XET)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(CommandFailed, match="has no Xet storage, set HF_HUB_DISABLE_XET=1"):
        upload_files(files, REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_chunks_are_sent_once_and_become_the_same_files(files, monkeypatch, tmp_path):
    """As the client uploads by default; the second large file is refused at first."""
    pytest.importorskip("hf_xet", reason=WITHOUT_XET)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    weights = {"zeros": torch.zeros(50_000), "noise": torch.randn(300, 300)}  # runs, and words with bytes alike
    save_file(weights, files["model-layer-001-experts.safetensors"])
    with Hub(xet=True) as server:
        connect(server, monkeypatch)
        server.before_large = lambda count: 400 if count == 1 else None
        with pytest.raises(CommandFailed, match="large files that have arrived are not sent again"):
            upload_files(files, REPO)
        assert set(server.files(REPO)) == {".gitattributes"}
        server.before_large = lambda count: None
        upload_files(files, REPO)
        assert {name: server.files(REPO)[name] for name in files} == {
            name: path.read_bytes() for name, path in files.items()
        }
        names = [name for name, _ in server.xorbs_sent]
        assert len(names) == len(set(names)) == 2
        # and they are compressed on their way
        assert sum(size for _, size in server.xorbs_sent) < sum(path.stat().st_size for path in files.values())

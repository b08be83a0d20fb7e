# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Of a folder, the model is sent; by-products of training are left out; secrets, pickles and strays are refused."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint_peer import TRAVELLING_FILES

from modeling_peer import PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.hub.leaks import OVERLAP, find_secret
from modeling_peer.hub.sent_files import find_model_files, is_replaced

# in two parts, so that no scanner takes this file for a leak
HUB_TOKEN = "hf_" + "AbCdEfGh12" * 3 + "abcd"
SECRETS = {
    "a Hugging Face token": f"login({HUB_TOKEN!r})",
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "an AWS access key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a Google API key": "AIza" + "a1B2c" * 7,
    "an API key": "sk-" + "a1B2" * 10,
    "a Slack token": "xoxb-" + "1234567890" * 3,
    "a password in a URL": "https://me:" + "secret@example.com/data",
    "a password or key": '"hub_token": ' + '"abcdefghijkl"',
}


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A model as `peer train` leaves it: weights, code, tokenizer, card and by-products."""
    PeerForCausalLM(tiny_config(vocab_size=257)).save_pretrained(tmp_path, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# A card\n")
    torch.save({"a": 1}, tmp_path / "training_args.bin")
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20").mkdir()
    torch.save({"a": 1}, tmp_path / "checkpoint-20" / "optimizer.pt")
    (tmp_path / "runs").mkdir()
    return tmp_path


def test_a_run_is_sent_without_its_by_products(folder):
    found = find_model_files(folder)
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    assert set(found.sent) == {
        *("config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors.index.json", *shards, *TRAVELLING_FILES),
    }
    assert found.left_out == ["checkpoint-20/", "runs/", "trainer_state.json", "training_args.bin"]
    assert found.size() == sum((folder / name).stat().st_size for name in found.sent)
    assert f"| {len(found.sent)} files | {found.size():,} |" in found.table()


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_in_a_file_is_refused_by_its_line_and_not_repeated(folder, what):
    (folder / "README.md").write_text(f"# A card\n\nx = {SECRETS[what]}\n")
    with pytest.raises(SettingsError, match=f"README.md: line 3 holds {what}") as error:
        find_model_files(folder)
    assert SECRETS[what] not in str(error.value)


def test_a_secret_is_found_where_two_blocks_meet_and_in_metadata_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_peer.hub.leaks.BLOCK", 2 * OVERLAP)
    for start in (0, 2 * OVERLAP - 10, 5 * OVERLAP):
        (tmp_path / "merges.txt").write_text("\n" * start + HUB_TOKEN)
        assert find_secret(tmp_path / "merges.txt") == f"line {start + 1} holds a Hugging Face token"
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"run": HUB_TOKEN})
    assert find_secret(tmp_path / "a.safetensors") == "line 1 holds a Hugging Face token"


@pytest.mark.parametrize("name", [".env", ".env.local", "id_rsa", "server.pem", "token", "credentials.json", ".netrc"])
def test_a_file_named_as_a_secret_is_refused_whatever_it_holds(folder, name):
    (folder / name).write_text("nothing")
    with pytest.raises(SettingsError, match=rf"{re.escape(name)}: its name is that of a file of secrets"):
        find_model_files(folder, also=[name])


def test_nothing_of_a_clean_model_is_taken_for_a_secret(folder):
    assert [name for name, path in find_model_files(folder).sent.items() if find_secret(path)] == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra.pt", "data.pkl", "vectors.npy", "looks_harmless.txt"])
def test_a_pickle_is_refused_by_name_or_content_and_cannot_be_added(folder, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    for also in ([], [name]):
        with pytest.raises(SettingsError, match=rf"{name} is a pickle, .* Save weights as safetensors"):
            find_model_files(folder, also)
    torch.save({"a": 1}, folder / "looks_harmless.txt")  # a zip archive around a pickle
    with pytest.raises(SettingsError, match=r"looks_harmless\.txt is a pickle"):
        find_model_files(folder)


def test_stray_files_are_all_named_and_may_be_added_by_name(folder):
    (folder / "notes.txt").write_text("buy milk")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.svg").write_text("<svg/>")
    with pytest.raises(SettingsError, match="has 2 files that will not be sent") as error:
        find_model_files(folder)
    assert "send it with --also notes.txt." in str(error.value)
    assert "send it with --also plots/loss.svg." in str(error.value)
    sent = find_model_files(folder, also=["notes.txt", "plots/loss.svg"]).sent
    assert {"notes.txt", "plots/loss.svg"} <= set(sent)
    with pytest.raises(SettingsError, match=r"--also note.txt: no such file in .* Did you mean 'notes.txt'\?"):
        find_model_files(folder, also=["note.txt"])


def test_weights_that_are_not_the_models_or_are_missing_are_refused(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    content = (folder / first).read_bytes()
    (folder / "model-of-yesterday.safetensors").write_bytes(content)
    with pytest.raises(SettingsError, match="from_pretrained does not read these weights"):
        find_model_files(folder)
    (folder / "model-of-yesterday.safetensors").unlink()
    (folder / first).unlink()
    with pytest.raises(SettingsError, match=rf"has damaged weights\. {first} is missing"):
        find_model_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SettingsError, match="has no weights in safetensors"):
        find_model_files(folder)


def test_expert_tables_in_files_of_their_own_are_weights(tmp_path):
    names = ["model-00001-of-00001.safetensors", "model-layer-007-experts.safetensors"]
    for name in names:
        save_file({name: torch.zeros(2)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))
    assert set(find_model_files(tmp_path).sent) == {*names, "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("model.safetensors", True),
        ("model-layer-007-experts.safetensors", True),
        ("model.safetensors.index.json", True),
        ("layer_peer.py", True),
        ("README.md", False),
        ("onnx/model.safetensors", False),  # someone else's folder
        ("notes.txt", False),
    ],
)
def test_weights_and_code_of_the_former_model_are_replaced_and_nothing_else(name, replaced):
    assert is_replaced(name) == replaced

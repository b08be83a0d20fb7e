# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A flipped bit of a checkpoint is noticed before anything goes on with it, and the file is named."""

import json
import random
import shutil
import zipfile

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM, checkpoint_peer, checksums_peer
from modeling_peer.checksums_peer import stored_checksum
from modeling_peer.damage_peer import find_safetensors_damage, verify_checkpoint
from modeling_peer.training.checkpoint_folders import LIST_OF_FILES, find_damage, staged_checkpoint


def flip(path, place, bit=6):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_sub_keys": 8, "num_experts_per_head": 4}
    sizes |= {"vocab_size": 99, "intermediate_size": 48, "num_hidden_layers": 2, "query_dim": 16}
    PeerForCausalLM(PeerConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_saved_file_has_its_checksum_and_the_tensors_it_would_have_without(saved, tmp_path, monkeypatch):
    assert verify_checkpoint(saved) == {"model.safetensors": True}
    loaded = PeerForCausalLM.from_pretrained(saved)
    assert load_file(saved / "model.safetensors").keys() == loaded.state_dict().keys()
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    monkeypatch.setattr(checksums_peer, "BLOCK", 64)  # the tensors move in many blocks, not in one
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_flip_anywhere_is_noticed_by_loading_or_changes_nothing(folder):
    """Of a header, too: there it may make another tensor's name, which Transformers initialises anew."""
    file, draw = folder / "model.safetensors", random.Random(0)
    whole, tensors = file.read_bytes(), load_file(file)
    header = int.from_bytes(whole[:8], "little")
    places = [draw.randrange(8 + header, len(whole)) for _ in range(10)]
    digits = 8 + len(checksums_peer.CHECKSUM_START)
    places += [*range(8), *range(digits, digits + 8), *(draw.randrange(8 + header) for _ in range(30))]
    for place in places:
        flip(file, place, bit := draw.randrange(8))
        told = ""
        try:
            PeerForCausalLM.from_pretrained(folder)
        except OSError as error:
            told = str(error)
        if told:
            assert "model.safetensors" in told, (place, bit)
        else:  # of what stands before the eight digits
            assert 8 <= place < digits, (place, bit)
            assert all(torch.equal(value, tensors[name]) for name, value in load_file(file).items())
        file.write_bytes(whole)


def test_large_files_are_verified_on_request_only(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_peer, "CHECKED_BYTES", 1000)
    flip(folder / "model.safetensors", -9)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match=r"model\.safetensors was saved with the checksum"):
        AutoModelForCausalLM.from_pretrained(folder, verify_checksums=True)
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"model\.safetensors was saved with the checksum"):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, verify_checksums=False)
    with pytest.raises(OSError, match=r"model\.safetensors was saved with the checksum"):
        verify_checkpoint(folder)


def test_a_program_that_writes_other_tensors_with_the_same_metadata_makes_no_false_alarm(folder):
    file = folder / "model.safetensors"
    tensors = {name: value + 1 for name, value in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for _ in range(8):  # metadata come in any order
        save_file(tensors, file, metadata=metadata)
        assert stored_checksum(file) is None
    AutoModelForCausalLM.from_pretrained(folder)
    assert verify_checkpoint(folder) == {"model.safetensors": False}


class TestTheFileThatWasLoadedIsNamed:
    def test_of_a_variant(self, folder):
        PeerForCausalLM.from_pretrained(folder).save_pretrained(folder, variant="other")
        flip(folder / "model.other.safetensors", -9)
        AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(OSError, match=r"model\.other\.safetensors was saved"):
            AutoModelForCausalLM.from_pretrained(folder, variant="other")

    def test_of_shards(self, folder):
        PeerForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        shards = sorted(folder.glob("model-*.safetensors"))
        assert verify_checkpoint(folder) == dict.fromkeys((shard.name for shard in shards), True)
        (folder / "another.safetensors").write_bytes(b"of no model")
        for shard in shards[1:3]:
            flip(shard, -9)
        with pytest.raises(OSError, match=rf"{shards[1].name} was saved .*{shards[2].name} was saved") as error:
            AutoModelForCausalLM.from_pretrained(folder)
        assert "another" not in str(error.value)

    def test_of_a_subfolder(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "repo" / "inner")
        shutil.copytree(folder, tmp_path / "repo", dirs_exist_ok=True)
        inner = tmp_path / "repo" / "inner" / "model.safetensors"
        inner.write_bytes(inner.read_bytes()[:-100])
        size = inner.stat().st_size
        with pytest.raises(OSError, match=rf"model\.safetensors is {size} bytes long"):
            PeerForCausalLM.from_pretrained(tmp_path / "repo", subfolder="inner")
        PeerForCausalLM.from_pretrained(tmp_path / "repo")

    def test_of_the_hubs_cache(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        flip(folder / "model.safetensors", -9)
        repo = tmp_path / "cache" / "models--some--peer"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
        with pytest.raises(OSError, match=r"model\.safetensors was saved with the checksum"):
            PeerForCausalLM.from_pretrained("some/peer", cache_dir=tmp_path / "cache", local_files_only=True)


def header_of(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 8 + b"{}",  # a length of 2**64 - 1
        (1 << 40).to_bytes(8, "little") + b"{}" * 50,
        header_of(b"[1, 2]"),
        header_of(b"null"),
        header_of(b"7"),
        header_of(b'{"a": 3}'),
        header_of(b'{"a": null}'),
        header_of(b'{"a": {}}'),
        header_of(b'{"a": {"data_offsets": []}}'),
        header_of(b'{"a": {"data_offsets": ["x", "y"]}}'),
        header_of(b'{"a": {"data_offsets": {"1": 2}}}'),
        header_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'),
        header_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, NaN]}}'),
        header_of(b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}') + b"1234",
        header_of(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}') + b"1234",
        header_of(b"[" * 200_000),
        header_of(b'{"\xff\xfe": 1}'),
        header_of(b'{"__metadata__": {"crc32": "'),
        header_of(b'{"__metadata__": {"crc32": "zzzzzzzz"}}'),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_no_header_makes_the_report_itself_fail(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    damage = find_safetensors_damage(folder / "model.safetensors")
    assert damage is not None
    assert "model.safetensors" in damage
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PeerForCausalLM.from_pretrained(folder)


class TestTrainingCheckpoints:
    def fill(self, folder, saved):
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / "trainer_state.json").write_text('{"global_step": 2}')
        for name in ("scheduler.pt", "rng_state.pth", "optimizer.pt"):
            torch.save({"state": torch.randn(500)}, folder / name)

    @pytest.fixture
    def listed(self, saved, tmp_path):
        with staged_checkpoint(tmp_path / "checkpoint-2", True, lambda: None) as staged:
            self.fill(staged, saved)
        return tmp_path / "checkpoint-2"

    @pytest.fixture
    def unlisted(self, saved, tmp_path):
        self.fill(tmp_path / "checkpoint-2", saved)
        return tmp_path / "checkpoint-2"

    def test_a_flip_in_any_listed_file_is_noticed(self, listed):
        assert find_damage(listed) is None
        draw = random.Random(0)
        for path in sorted(path for path in listed.iterdir() if path.stat().st_size):
            whole = path.read_bytes()
            for _ in range(6):
                flip(path, draw.randrange(len(whole)), draw.randrange(8))
                damage = find_damage(listed)
                assert damage, path.name
                assert path.name in damage or path.name == LIST_OF_FILES, damage
                path.write_bytes(whole)
        assert find_damage(listed) is None

    def test_without_a_list_every_file_is_asked_for_its_own_checksum(self, unlisted):
        assert find_damage(unlisted) is None
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            whole = (unlisted / name).read_bytes()
            place = len(whole) // 2
            if name != "model.safetensors":
                with zipfile.ZipFile(unlisted / name) as archive:  # beside the tensors a zip has room that is not read
                    place = next(info for info in archive.infolist() if info.filename.endswith("data/0")).header_offset
                    place += 200
            flip(unlisted / name, place)
            assert f"{name} " in find_damage(unlisted)
            assert find_damage(unlisted, contents=False) is None
            (unlisted / name).write_bytes(whole)

    def test_a_list_of_an_older_release_has_sizes_alone(self, listed):
        entries = json.loads((listed / LIST_OF_FILES).read_text())
        (listed / LIST_OF_FILES).write_text(json.dumps({name: entry["bytes"] for name, entry in entries.items()}))
        assert find_damage(listed) is None
        flip(listed / "model.safetensors", -9)
        assert "model.safetensors was saved with the checksum" in find_damage(listed)

    @pytest.mark.parametrize("content", ["[]", "3", '{"a": null}', '{"a": {"bytes": 3}}', '{"a": "b"}', "[" * 200_000])
    def test_a_list_of_another_kind_is_damage(self, listed, content):
        (listed / LIST_OF_FILES).write_text(content)
        assert LIST_OF_FILES in find_damage(listed)

    def test_a_checkpoint_whose_new_name_is_refused_stays_what_it_was(self, listed, saved, monkeypatch):
        before = {path.name: path.read_bytes() for path in listed.iterdir()}
        genuine = type(listed).rename

        def rename(self, target):
            if self.name == listed.name and self.parent.name == "_unfinished":
                raise OSError("Input/output error")
            return genuine(self, target)

        monkeypatch.setattr(type(listed), "rename", rename)
        with (
            pytest.raises(OSError, match="Input/output error"),
            staged_checkpoint(listed, True, lambda: None) as staged,
        ):
            self.fill(staged, saved)
        assert {path.name: path.read_bytes() for path in listed.iterdir()} == before

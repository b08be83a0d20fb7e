# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables have safetensors files of their own, which any reader finds by the index; an index that lies is
refused."""

import json
import os
import re
import shutil

import pytest
import torch
from model_helpers import load_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from modeling_peer import (
    PeerForCausalLM,
    PeerModel,
    checksums_peer,
    quantise_expert_tables,
    table_shards_peer,
    verify_checkpoint,
)
from modeling_peer.checksums_peer import read_header, stored_checksum
from modeling_peer.configuration_peer import SPARSE_MLPS, TABLE_MLPS
from modeling_peer.mapped_memory_peer import PAGE

TABLES = ("down_embed", "up_embed")
DENSE_WEIGHTS, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
TABLES_OF_LAYER_1 = "model-layer-001-experts.safetensors"


@pytest.fixture(autouse=True)
def any_table_is_large(monkeypatch):
    monkeypatch.setattr(table_shards_peer, "MIN_BYTES", 0)


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config(mlp_layer_types=["dense", "sparse", "sparse"])).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def read_index(folder, name=INDEX):
    return json.loads((folder / name).read_text())


def change_index(folder, change):
    index = read_index(folder)
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_each_layers_tables_are_a_file_and_the_index_names_every_tensor(model, folder):
    files = {path.name: set(load_file(path)) for path in folder.glob("*.safetensors")}
    for layer in (1, 2):
        names = {f"model.layers.{layer}.mlp.experts.{table}" for table in TABLES}
        assert files.pop(f"model-layer-{layer:03d}-experts.safetensors") == names
    assert list(files) == [DENSE_WEIGHTS]
    assert any("sub_keys" in name for name in files[DENSE_WEIGHTS]), "retrieval is beside the dense weights"
    index = read_index(folder)
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert index["metadata"]["checksums"] == {
        path.name: stored_checksum(path) for path in folder.glob("*.safetensors")
    }


def test_a_file_of_tables_says_what_it_is_without_the_configuration(model, folder):
    table = model.model.layers[1].mlp.experts.up_embed
    with safe_open(folder / TABLES_OF_LAYER_1, framework="pt") as file:
        metadata = file.metadata()
        assert metadata.pop("crc32") == stored_checksum(folder / TABLES_OF_LAYER_1)
        shape = f"F32 {list(table.shape)}"
        expected = {"format": "pt", "model_type": "peer", "layer": "model.layers.1.mlp.experts"}
        assert metadata == expected | {"down_embed": shape, "up_embed": shape}
        assert torch.equal(file.get_slice("model.layers.1.mlp.experts.up_embed")[3:5], table[3:5])


def test_the_data_of_each_file_starts_at_a_page(folder):
    for path in folder.glob("*.safetensors"):
        assert min(tensor.start for tensor in read_header(path)[0].values()) % PAGE == 0


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
def test_only_layers_with_expert_tables_get_such_files(tiny_config, tmp_path, sparse_mlp):
    mixture = {"num_moe_experts": 4, "moe_intermediate_size": 16, "is_causal": sparse_mlp != "soft_moe"}
    mixture["num_rows_per_hash_head"] = 20_000
    model = PeerModel(tiny_config(sparse_mlp=sparse_mlp, **mixture))
    model.save_pretrained(tmp_path)
    tables = [path for path in tmp_path.glob("*.safetensors") if "experts" in path.name]
    assert len(tables) == (sparse_mlp in TABLE_MLPS)
    assert (tmp_path / INDEX).exists() == bool(tables)
    for name, value in PeerModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_small_tables_stay_in_the_one_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(table_shards_peer, "MIN_BYTES", 4 * 8192)  # two tables in two layers
    model.save_pretrained(tmp_path / "large")
    monkeypatch.setattr(table_shards_peer, "MIN_BYTES", 4 * 8192 + 1)
    model.save_pretrained(tmp_path / "small")
    assert (tmp_path / "large" / INDEX).exists()
    assert [path.name for path in (tmp_path / "small").glob("*.safetensors*")] == ["model.safetensors"]
    assert verify_checkpoint(tmp_path / "small") == {"model.safetensors": True}


def test_a_variant_has_files_and_an_index_of_its_own(model, folder):
    with torch.no_grad():
        model.model.layers[2].mlp.experts.up_embed.add_(1)
    model.save_pretrained(folder, variant="other")
    assert set(read_index(folder, "model.safetensors.index.other.json")["weight_map"].values()) == {
        "model.other-00001-of-00001.safetensors",
        "model.other-layer-001-experts.safetensors",
        "model.other-layer-002-experts.safetensors",
    }
    loaded = [AutoModelForCausalLM.from_pretrained(folder, variant=variant) for variant in (None, "other")]
    first, other = (one.model.layers[2].mlp.experts.up_embed for one in loaded)
    torch.testing.assert_close(first + 1, other)


def test_tables_larger_than_a_shard_may_be_are_files_each(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="9KB")  # a table has 8,192 bytes
    files = sorted(path.name for path in tmp_path.glob("model-layer-001-experts*"))
    assert files == [f"model-layer-001-experts-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path in tmp_path.glob("*.safetensors"):
        tensors = read_header(path)[0].values()
        assert len(tensors) == 1 or sum(tensor.num_bytes for tensor in tensors) <= 9000
    for name, value in load_weights(tmp_path).items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_copy_into_the_layout_depends_on_no_size_of_blocks(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums_peer, "BLOCK", 100)
    model.save_pretrained(tmp_path / "again")
    for path in folder.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_plain_checkpoint_of_one_file_loads_and_is_saved_in_the_layout(model, folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(load_weights(folder), plain / "model.safetensors", metadata={"format": "pt"})
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification):
        loaded = auto_class.from_pretrained(plain)
        table = getattr(loaded, "model", loaded).layers[1].mlp.experts.up_embed
        assert torch.equal(table, model.model.layers[1].mlp.experts.up_embed)
    model.save_pretrained(plain)
    assert {path.name for path in plain.glob("*.safetensors")} == {path.name for path in folder.glob("*.safetensors")}


class TestAnIndexThatDoesNotFit:
    def refused(self, folder, message):
        for load in (AutoModelForCausalLM.from_pretrained, PeerModel.from_pretrained):
            with pytest.raises(OSError, match=message):
                load(folder)
        with pytest.raises(OSError, match=message):
            verify_checkpoint(folder)

    def test_swapped_files_of_two_layers(self, folder):
        first, second = (folder / f"model-layer-00{i}-experts.safetensors" for i in (1, 2))
        first.rename(folder / "kept")
        second.rename(first)
        (folder / "kept").rename(second)
        self.refused(folder, r"model-layer-001-experts\.safetensors was saved with the checksum \w{8}, and")

    def test_a_file_of_another_save(self, model, folder, tmp_path):
        with torch.no_grad():
            model.model.layers[1].mlp.experts.up_embed.add_(1)
        model.save_pretrained(tmp_path / "later")
        shutil.copy(tmp_path / "later" / TABLES_OF_LAYER_1, folder)
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + " was saved with the checksum")

    def test_a_missing_and_a_renamed_file(self, folder):
        (folder / TABLES_OF_LAYER_1).rename(folder / "model-layer-009-experts.safetensors")
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + " is missing")

    def test_a_tensor_that_is_not_where_it_is_looked_for(self, folder):
        def move(index):
            index["weight_map"]["model.layers.1.mlp.experts.up_embed"] = DENSE_WEIGHTS

        change_index(folder, move)
        self.refused(folder, re.escape(DENSE_WEIGHTS) + r" lacks 'model\.layers\.1\.mlp\.experts\.up_embed' \(1 ")

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "inner/x.safetensors"])
    def test_a_file_outside_the_folder(self, folder, name):
        shutil.copy(folder / TABLES_OF_LAYER_1, folder.parent / "outside.safetensors")

        def leave(index):
            for tensor, file in index["weight_map"].items():
                if file == TABLES_OF_LAYER_1:
                    index["weight_map"][tensor] = name

        change_index(folder, leave)
        self.refused(folder, r"which is not a file beside it")

    def test_a_tensor_that_the_index_does_not_name(self, folder):
        """It would be initialised at random, or loaded in spite of the index."""
        change_index(folder, lambda index: index["weight_map"].pop("model.layers.1.mlp.experts.up_embed"))
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + r" has 'model\.layers\.1\.mlp\.experts\.up_embed' \(1 ")

    def test_a_checksum_that_is_not_the_files(self, folder):
        change_index(folder, lambda index: index["metadata"]["checksums"].update({TABLES_OF_LAYER_1: "0" * 8}))
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + r" was saved with the checksum \w{8}, and .*00000000")

    def test_a_link_is_followed_and_what_it_points_to_is_compared(self, folder, tmp_path):
        """The cache of the Hub consists of links, so a link out of the folder is no damage by itself."""
        file = folder / TABLES_OF_LAYER_1
        file.rename(tmp_path / "blob")
        file.symlink_to(tmp_path / "blob")
        AutoModelForCausalLM.from_pretrained(folder)
        assert verify_checkpoint(folder)[TABLES_OF_LAYER_1]
        shutil.copy(folder / "model-layer-002-experts.safetensors", tmp_path / "blob")
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + " was saved with the checksum")
        (tmp_path / "blob").unlink()
        self.refused(folder, re.escape(TABLES_OF_LAYER_1) + " is missing")

    @pytest.mark.parametrize("content", ["", "[]", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 9999])
    def test_an_index_that_is_none(self, folder, content):
        (folder / INDEX).write_text(content)
        self.refused(folder, r"model\.safetensors\.index\.json")

    def test_a_table_of_another_program_without_checksum_is_taken(self, model, folder):
        file = folder / TABLES_OF_LAYER_1
        save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        experts = (one.model.layers[1].mlp.experts.up_embed for one in (model, loaded))
        torch.testing.assert_close(next(experts) + 1, next(experts))
        assert verify_checkpoint(folder)[TABLES_OF_LAYER_1] is False


class TestADamagedTableFile:
    def rewritten(self, folder, change):
        """As by another program: with a header that fits, and without a checksum."""
        file = folder / TABLES_OF_LAYER_1
        tensors = load_file(file)
        name = "model.layers.1.mlp.experts.up_embed"
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})

    @pytest.mark.parametrize(
        "load", [AutoModelForCausalLM.from_pretrained, PeerModel.from_pretrained, verify_checkpoint]
    )
    @pytest.mark.parametrize("kept", [0, 7, 500, -1])  # nothing, less than a size, part of the header, all but a byte
    def test_a_truncated_one_is_named_with_its_size(self, folder, load, kept):
        file = folder / TABLES_OF_LAYER_1
        os.truncate(file, kept % file.stat().st_size)
        with pytest.raises(OSError, match=re.escape(f"{TABLES_OF_LAYER_1} is {file.stat().st_size} bytes long")):
            load(folder)

    @pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, verify_checkpoint])
    def test_a_flipped_bit_is_found_by_the_checksum(self, folder, load):
        file = folder / TABLES_OF_LAYER_1
        content = bytearray(file.read_bytes())
        content[-5] ^= 4
        file.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(TABLES_OF_LAYER_1) + r" was saved .*its content changed"):
            load(folder)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool], ids=str)
    def test_a_dtype_that_no_table_has_is_refused(self, folder, dtype):
        self.rewritten(folder, lambda table: table.to(dtype))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.up_embed in model-layer-001.* has the dtype"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_integers_where_the_configuration_has_floats_are_refused(self, folder):
        self.rewritten(folder, lambda table: table.to(torch.int8))
        with pytest.raises(
            ValueError, match=r"stored with expert_table_format='int8', and the configuration has None"
        ):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("change", [lambda table: table[:-1], lambda table: table.T], ids=["rows", "transposed"])
    def test_another_shape_is_refused(self, folder, change):
        self.rewritten(folder, change)
        with pytest.raises(RuntimeError, match=r"do not fit the configuration.*gives both shapes"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_scales_of_another_dtype_are_refused(self, model, tmp_path):
        quantise_expert_tables(model, "int8").save_pretrained(tmp_path)
        file = tmp_path / TABLES_OF_LAYER_1
        tensors = load_file(file)
        scales = "model.layers.1.mlp.experts.up_scale"
        save_file({**tensors, scales: tensors[scales].to(torch.int32)}, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"up_scale in model-layer-001.* has the dtype I32, which must be one of F32"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path)

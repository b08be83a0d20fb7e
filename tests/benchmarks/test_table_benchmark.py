# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of tables in files: what it writes, what it drops, what it counts, and one tiny run of all."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from modeling_peer import PeerForCausalLM
from modeling_peer.benchmarks import disk, hot_rows, report, table_files, table_tasks, tables
from modeling_peer.benchmarks.settings import parse_settings
from modeling_peer.benchmarks.table_tasks import PlacedModel, summarize
from modeling_peer.console.errors import SettingsError
from modeling_peer.mapped_memory_peer import PAGE, is_mapped_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "checkpoints"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tables are mapped on Linux only")


@pytest.fixture
def written(tiny_config, tmp_path, monkeypatch):
    """A configuration, and a folder with random tables whose blocks are smaller than a table."""
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1000)
    config = tiny_config(tie_word_embeddings=True)
    table_files.write_random_checkpoint(tmp_path / "model", config, torch.float32, seed=0)
    return config, tmp_path / "model"


def test_a_random_checkpoint_loads_whole_and_has_the_deviations_of_a_new_model(written):
    config, folder = written
    model, notes = PeerForCausalLM.from_pretrained(folder, table_placement="mapped", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    experts = next(layer.mlp.experts for layer in model.model.layers if layer.is_sparse)
    new = PeerForCausalLM(config)
    expected = next(layer.mlp.experts for layer in new.model.layers if layer.is_sparse)
    for name in ("down_embed", "up_embed"):
        table = getattr(experts, name)
        assert is_mapped_file(table.data_ptr())
        assert table.data_ptr() % PAGE == 0 or name == "up_embed"  # the first table starts a page
        assert float(table.detach().std()) == pytest.approx(float(getattr(expected, name).detach().std()), rel=0.1)
    assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_a_folder_without_an_index_counts_as_unfinished_and_is_not_overwritten(written):
    config, folder = written
    assert table_files.is_complete(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert not table_files.is_complete(folder)
    with pytest.raises(SettingsError, match="has files, but no complete checkpoint"):
        table_files.write_random_checkpoint(folder, config, torch.float32, seed=0)


def test_a_disk_with_too_little_space_is_refused_with_numbers(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**20, 2**20, 2**10))
    with pytest.raises(SettingsError, match=r"takes .* GiB, and .* has 0\.0 GiB free.*--folder"):
        table_files.write_random_checkpoint(tmp_path / "model", tiny_config(), torch.float32, seed=0)


@pytest.mark.parametrize("fields", [{"gated_experts": True}, {"sparse_mlp": "product_key_memory"}], ids=str)
def test_other_tables_are_refused(tiny_config, tmp_path, fields):
    with pytest.raises(SettingsError, match="plain PEER layers only"):
        table_files.write_random_checkpoint(tmp_path, tiny_config(**fields), torch.float32, seed=0)


def test_dropped_pages_are_read_again_as_they_were(written):
    _, folder = written
    files = table_files.table_files(folder)
    model = PlacedModel(folder, "mapped", files, seed=0)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model.model(tokens).logits
    if not disk.cached_bytes(files):
        pytest.skip("this system does not say which pages are cached")
    full = disk.cached_bytes(files)
    model.drop_pages()
    if disk.cached_bytes(files) > full // 2:  # the page of the header stays: the model's reader maps it too
        pytest.skip("this file system is in memory")
    with torch.no_grad():
        assert torch.equal(model.model(tokens).logits, before)
    assert disk.cached_bytes(files)


def test_random_reads_stay_within_the_files(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for i, file in enumerate(files):
        file.write_bytes(bytes(PAGE * (i + 1)))
    for at_once in (1, 4):
        rates = disk.random_reads_per_second(files, num_bytes=1000, at_once=at_once, num_reads=16, seed=0)
        assert set(rates) >= {"requested"}
        assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("row_bytes", "expected"),
    [(PAGE // 4, 2), (PAGE, 3), (2 * PAGE, 6)],  # rows 0, 1 and 8: two pages of four rows; a page or two each
)
def test_pages_are_counted_once_in_each_table(written, monkeypatch, row_bytes, expected):
    model = PlacedModel(written[1], "mapped", [], seed=0)
    ids = torch.tensor([[[[0, 1], [8, 0]]]])
    monkeypatch.setattr(model, "model", lambda *args, **kwargs: type("Output", (), {"expert_ids": [ids]}))
    model.row_bytes = row_bytes
    assert model.pages(torch.tensor([[1]])) == 2 * expected


def test_a_summary_is_the_median_and_the_ninth_decile_in_milliseconds():
    assert summarize([0.001 * i for i in range(11)]) == {"median_ms": 5, "ninth_decile_ms": 9, "repeats": 11}


def test_hot_rows_of_the_shipped_checkpoint_serve_more_than_their_part():
    found = hot_rows.shares_of_hot_rows(str(EXAMPLES / "peer_bytes"), str(EXAMPLES / "held_out.txt"), max_tokens=2048)
    assert found["num_experts"] == 576
    assert [one["experts"] for one in found["shares"]] == [1, 2, 6, 17, 58]
    served = [one["share_of_reads"] for one in found["shares"]]
    assert served == sorted(served)
    assert served[-1] > 2 * found["shares"][-1]["part_of_pool"]
    assert all(one["share_of_reads"] <= one["best_possible"] for one in found["shares"])


@pytest.mark.parametrize("name", ["cpu", "smoke", "tables_32gib"])
def test_every_file_of_sizes_has_a_part_for_tables(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(tables.TablesBenchmark, "tables", [name, "--repeats", "4"])
    assert (settings.repeats, settings.command) == (4, f"peer bench-tables {name} --repeats 4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trained_model": "x"}, "belong together"),
        ({"disk_reads": 9}, "at least 256"),
        ({"cold_tokens": 0}, "at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(SettingsError, match=message):
        tables.TablesBenchmark(**fields)


def test_a_benchmark_of_tables_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    words = ["smoke", "--folder", str(folder), "--output_file", str(tmp_path / "tables.json")]
    settings = parse_settings(tables.TablesBenchmark, "tables", words)

    def in_this_process(function, *arguments):
        return table_tasks.probe_start(*arguments)

    monkeypatch.setattr(tables, "in_new_process", in_this_process)
    try:
        result = tables.bench_tables(settings)
    except SettingsError as error:
        if "stay in the page cache" not in str(error):
            raise
        pytest.skip("this file system is in memory")
    assert json.loads((tmp_path / "tables.json").read_text()) == {k: v for k, v in result.items() if k != "path"}
    assert report.tables_markdown(result) in capsys.readouterr().out
    assert [(one["placement"], one["pages"]) for one in result["start"]] == [
        ("mapped", "cold"),
        ("mapped", "warm"),
        ("memory", "cold"),
        ("memory", "warm"),
    ]
    assert [task["task"] for task in result["tasks"]] == ["decode", "prefill"]
    assert all(set(task["contenders"]) == {"mapped", "memory"} for task in result["tasks"])
    assert result["cold"]["decode"]["pages_per_call"] > 0
    assert result["cold"]["decode"]["percent_of_disk"] > 0
    assert table_files.is_complete(folder)  # kept for the next run
    settings.model_overrides["num_sub_keys"] = 32
    with pytest.raises(SettingsError, match="bytes of tables, and the settings ask for"):
        tables.bench_tables(settings)

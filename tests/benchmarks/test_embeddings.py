# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer bench-embeddings` at a small size: the state has the bytes that docs/training.md names."""

import json

import pytest

from modeling_peer.benchmarks import embeddings
from modeling_peer.benchmarks.embeddings import EmbeddingsBenchmark, bench_embeddings, measure_embedding
from modeling_peer.console.errors import SettingsError
from peer_command import COMMANDS

SIZES = {"num_rows": 4096, "width": 16, "num_sequences": 2, "sequence_length": 8, "steps": 2, "rounds": 2}
BYTES_PER_WEIGHT_AND_ROW = {"dense": (8, 0), "float32": (8, 4), "bfloat16": (4, 4), "factored": (2, 8), "row": (0, 8)}


@pytest.fixture
def in_this_process(monkeypatch):
    """A new process imports for seconds; one test below starts them."""
    calls = []

    def measure(function, name, settings):
        calls.append(name)
        return measure_embedding(name, json.loads(json.dumps(settings)))

    monkeypatch.setattr(embeddings, "in_new_process", measure)
    return calls


def test_every_state_is_measured_in_turn_and_has_the_bytes_of_the_page(in_this_process, tmp_path, capsys):
    result = bench_embeddings(EmbeddingsBenchmark(**SIZES, threads=1, output_file=str(tmp_path / "result.json")))
    names = list(BYTES_PER_WEIGHT_AND_ROW)
    assert in_this_process == [*names, *reversed(names)]
    assert list(result["contenders"]) == names
    for name, (per_weight, per_row) in BYTES_PER_WEIGHT_AND_ROW.items():
        measured = result["contenders"][name]
        assert measured["state_mib"] == pytest.approx(4096 * (16 * per_weight + per_row) / 2**20, abs=1e-3)
        assert measured["milliseconds"]["repeats"] == 4
        assert measured["milliseconds"]["median_ms"] > 0
    written = json.loads((tmp_path / "result.json").read_text())
    assert {**written, "path": str(tmp_path / "result.json")} == result
    assert "output_file" not in written["settings"]
    assert "| row-sparse, row |" in capsys.readouterr().out
    assert COMMANDS["bench-embeddings"].summarize(result)["path"] == str(tmp_path / "result.json")


@pytest.mark.slow
def test_a_row_sparse_step_takes_less_memory_than_the_table_that_a_dense_one_copies():
    sizes = {**SIZES, "num_rows": 200_000, "width": 64, "rounds": 1}  # 49 MiB
    result = bench_embeddings(EmbeddingsBenchmark(**sizes, threads=1, contenders=["dense", "row"]))
    dense, row = (result["contenders"][name]["peak_mib"] for name in ("dense", "row"))
    assert row < dense - 2 * 48  # at least the gradient and a moment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ["rows"]}, "--contenders must be of dense, float32, bfloat16, factored, row; got rows"),
        ({"num_rows": 1}, "--num_rows .* at least 2"),
        ({"steps": 0}, "--steps .* at least 1"),
        ({"width": 10}, "attention heads|head"),
        ({"num_rows": 10**12}, "needs about .* GiB, and .* are free. Take fewer rows"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused_before_the_first_process(in_this_process, options, message):
    with pytest.raises(SettingsError, match=message):
        bench_embeddings(EmbeddingsBenchmark(**{**SIZES, **options}))
    assert in_this_process == []

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The last line of a command: short, JSON, with the path of the file that has the rest; whole if asked for."""

import json
import re
from dataclasses import replace

import pytest

from modeling_peer.benchmarks.model import ModelBenchmark
from modeling_peer.benchmarks.settings import default_output_file, parse_settings
from modeling_peer.console.errors import SettingsError
from peer_command import COMMANDS, describe, main

COSTS = ["costs", "--model", "peer_tiny", "--sequence_length", "64"]


def last_line(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_of_costs_has_the_totals_and_the_parts_only_if_asked_for(capsys):
    short = json.loads(last_line(capsys, *COSTS))
    full = json.loads(last_line(capsys, *COSTS, "--full_json"))
    assert "parts" in full
    assert short == {name: value for name, value in full.items() if name != "parts"}


def test_the_last_line_of_presets_has_their_names_and_the_rows_only_if_asked_for(capsys):
    names = json.loads(last_line(capsys, "presets"))["presets"]
    rows = json.loads(last_line(capsys, "presets", "--full-json"))["presets"]
    assert names == [row["preset"] for row in rows]
    assert "peer_mini" in names


def test_the_last_line_of_a_study_counts_runs_and_keeps_the_causes_of_failures():
    result = {"path": "s/study.json", "table": "s/table.md", "rows": [{"x": 1}] * 30}
    result |= {"done": ["dense-0"] * 27, "failed": {"peer-0": "diverged"}, "paused": [], "waiting": ["peer-1"]}
    short = COMMANDS["compare"].summarize(result)
    assert short["path"] == "s/study.json"
    assert short["done"] == 27
    assert short["waiting"] == 1
    assert short["failed"] == {"peer-0": "diverged"}  # the exit status depends on it
    assert "rows" not in short


def test_the_last_line_of_a_benchmark_has_its_file_and_counts():
    result = {
        "path": "runs/x.json",
        "benchmark": "layer",
        "missing": {},
        "cases": [1] * 30,
        "memory": [1],
        "scaling": [],
    }
    short = COMMANDS["bench-layer"].summarize(result)
    assert short == {"path": "runs/x.json", "benchmark": "layer", "missing": {}, "cases": 30, "memory": 1}


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.summarize])
def test_help_names_the_option_for_the_whole_result(name):
    assert "--full_json" in describe(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_code(name):
    assert not re.search(r"\{[^}]*[(.\[]", describe(name))


def test_a_command_with_a_short_result_has_no_such_option(capsys):
    assert "--full_json" not in describe("evaluate")
    with pytest.raises(SystemExit):
        main(["evaluate", "--full_json"])
    assert "unknown argument '--full_json'" in capsys.readouterr().err


def test_a_failed_run_still_decides_the_exit_status(monkeypatch, capsys):
    result = {"path": "", "table": "", "rows": [], "done": [], "paused": [], "waiting": []}
    result["failed"] = {"peer-0": "diverged"}
    command = replace(COMMANDS["compare"], function=lambda words: result)
    monkeypatch.setitem(COMMANDS, "compare", command)
    assert main(["compare", "smoke"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == result["failed"]


def test_a_benchmark_without_an_output_file_has_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(ModelBenchmark, "model", ["smoke"], "bench-usage")
    assert settings.output_file == "runs/benchmarks/bench-usage-smoke.json"
    assert (tmp_path / "runs" / "benchmarks").is_dir()
    assert settings.command == "peer bench-usage smoke"
    settings = parse_settings(ModelBenchmark, "model", ["smoke", "--output_file", str(tmp_path / "own.json")])
    assert settings.output_file == str(tmp_path / "own.json")
    assert settings.command.startswith("peer bench-model smoke")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SettingsError, match=r"cannot write to runs/benchmarks: .* Name an --output_file"):
        default_output_file("bench-layer-cpu")

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Runs side by side: means over seeds, what they cost, and refusals of what does not compare."""

import json
import math

import pytest
from training_helpers import (
    last_json,
    private_cache,  # noqa: F401  a fixture
    run_script,
    train,
    write_inputs,
)

from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs


def write_run(folder, eval_loss, losses=(3.0, 2.0), **summary):
    folder.mkdir(parents=True)
    facts = {"data": "text", "steps": 2, "tokens": 64, "parameters": 10, "versions": {}, "eval_loss": eval_loss}
    facts |= {"validation_bits_per_byte": 1.0, "seconds_per_step": 0.5, "peak_memory_bytes": 2**20} | summary
    (folder / "train_lm_results.json").write_text(json.dumps(facts))
    history = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 2, "eval_loss": 1}]}))


def compare(tmp_path, *groups, **options):
    return compare_runs(ComparisonArguments(runs=[f"{name}={tmp_path / name}-*" for name in groups], **options))


def test_a_group_has_the_mean_and_deviation_of_its_seeds_and_its_difference_from_the_first(tmp_path):
    for name, losses in (("dense", (2.0, 2.2)), ("sparse", (2.1, 2.4))):
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"{name}-{seed}", loss, peak_memory_bytes=(seed + 1) * 2**20)
    dense, sparse = compare(tmp_path, "dense", "sparse")["groups"]
    assert dense["validation_loss"] == pytest.approx([2.1, math.sqrt(0.02)], abs=1e-5)
    assert dense["difference"] == [0, 0]
    assert sparse["difference"] == pytest.approx([0.15, math.sqrt(0.005)], abs=1e-5)
    assert sparse["peak_memory_bytes"] == 2 * 2**20
    assert sparse["seconds_per_step"] == 0.5


def test_runs_without_a_partner_are_left_out_of_the_difference_and_the_table_says_so(tmp_path, capsys):
    for name, losses in (("dense", (2.0, 2.2)), ("sparse", (2.1,))):
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"{name}-{seed}", loss)
    dense, sparse = compare(tmp_path, "sparse", "dense")["groups"][::-1]
    assert (dense["pairs"], sparse["pairs"]) == (1, 1)
    table = capsys.readouterr().out
    assert "| paired difference from sparse |" in table
    assert "| -0.1000 (1 pair) |" in table
    assert "pairs" not in table.splitlines()[0]


def test_one_seed_has_no_deviation(tmp_path):
    write_run(tmp_path / "dense-0", 2.0)
    assert compare(tmp_path, "dense")["groups"][0]["validation_loss"] == [2.0, None]


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
def test_the_script_compares_and_draws_what_training_left(tmp_path):
    inputs = write_inputs(tmp_path)
    for seed in (0, 1):
        validation = {"eval_strategy": "steps", "eval_steps": 3, "validation_percent": 10}
        train(inputs, output_dir=tmp_path / f"peer-{seed}", max_steps=3, seed=seed, **validation)
    words = ["--runs", f"peer={tmp_path}/peer-*", "--output_file", str(tmp_path / "result.json")]
    words += ["--plot_file", str(tmp_path / "curves.png")]
    result = last_json(run_script("compare_runs.py", *words, "--full_json"))
    assert result.pop("path") == str(tmp_path / "result.json")
    assert result == json.loads((tmp_path / "result.json").read_text())
    (group,) = result["groups"]
    assert group["seeds"] == 2
    assert group["validation_loss"][1] > 0
    assert 0 < group["seconds_per_step"] < 60
    assert group["peak_memory_bytes"] > 2**26  # PyTorch alone takes more
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["missing=nowhere-*"], "nothing matches nowhere-"),
        (["nameless"], "takes name=folder"),
        (["short={}/short", "long={}/long"], "differ in steps"),
        (["unfinished={}/unfinished"], "holds no finished run .train_lm_results.json is missing"),
    ],
)
def test_runs_that_do_not_compare_are_refused(tmp_path, groups, message):
    write_run(tmp_path / "short", 2.0)
    write_run(tmp_path / "long", 2.0, steps=3)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(SettingsError, match=message):
        compare_runs(ComparisonArguments(runs=[group.format(tmp_path) for group in groups]))


def test_what_was_to_be_predicted_is_part_of_the_task(tmp_path):
    write_run(tmp_path / "old-0", 1.0)  # from when there was but one objective
    write_run(tmp_path / "causal-0", 2.0, objective="the next token")
    write_run(tmp_path / "masked-0", 3.0, objective="masked tokens, 15 % at a time")
    assert [row["seeds"] for row in compare(tmp_path, "old", "causal")["groups"]] == [1, 1]
    with pytest.raises(SettingsError, match="differ in objective"):
        compare(tmp_path, "causal", "masked")

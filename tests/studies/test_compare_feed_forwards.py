# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Feed-forwards side by side: runs in processes, interrupted and failing ones, the report, impossible recipes."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from training_helpers import REPOSITORY, TINY_PEER, as_command_line, run_script, some_text

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_yaml
from modeling_peer.console.run_files import list_checkpoints
from modeling_peer.costs.timing import Summary
from modeling_peer.hub.loading import load_config
from modeling_peer.studies import plan as planning
from modeling_peer.studies import step_times
from modeling_peer.studies import work_queue as queue
from modeling_peer.studies.compare_feed_forwards import compare_feed_forwards
from modeling_peer.studies.data import TOKENIZER_FOLDER, prepare_data
from modeling_peer.studies.plan import plan_runs, shared_recipe
from modeling_peer.studies.report import as_tables, make_rows, restore, write_report
from modeling_peer.studies.run import MODEL_FOLDER, PAUSED, run_in_process
from modeling_peer.studies.step_times import StepTimes
from modeling_peer.studies.study_recipe import FOLDER, parse_study
from modeling_peer.training import measured_steps

DATA = {"vocab_size": 257, "block_size": 32}
RECIPES = sorted(path.stem for path in (REPOSITORY / FOLDER).glob("*.yaml"))
STUDY = {
    "contenders": {
        "dense": {"model_overrides": {"mlp_layer_types": "dense"}},
        "peer": {"training": {"table_learning_rate_multiple": 4.0}},
    },
    "reference": "dense",
    "seeds": [0, 1],
    "training_tokens": 1280,  # 10 steps
    "evaluations": 4,
    "checkpoints": 4,
}


@pytest.fixture(scope="module", autouse=True)
def processes_that_start_fast(tmp_path_factory):
    """Forked from one that has imported everything and computed nothing; data sets have a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(queue, "START_METHOD", "forkserver")
        multiprocessing.set_forkserver_preload(["modeling_peer.studies.run"])
        yield


def write_study(folder, **changes):
    """A study's command line but for its output_dir; its files are in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(some_text(), encoding="utf-8")
    (folder / "held_out.txt").write_text(some_text(400, seed=1), encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(TINY_PEER))
    training = {"model": str(folder / "model.json"), "tokenizer": "bytes", "block_size": 32, "use_cpu": True}
    training |= {"per_device_train_batch_size": 4, "learning_rate": 0.01, "max_evaluation_examples": 8}
    (folder / "training.yaml").write_text(yaml.safe_dump(training))
    recipe = {**STUDY, "recipe": str(folder / "training.yaml"), **changes}
    (folder / "study.yaml").write_text(
        yaml.safe_dump({n: v for n, v in recipe.items() if v is not None}, sort_keys=False)
    )
    text = {"train_file": folder / "text.txt", "validation_file": folder / "held_out.txt"}
    return [str(folder / "study.yaml"), *as_command_line(**text)]


def plan(words, output_dir):
    """The runs of a study, its data prepared."""
    study = parse_study([*words, "--output_dir", str(output_dir)])
    output_dir.mkdir()
    recipe = shared_recipe(study)
    return plan_runs(study, prepare_data(recipe, load_config(recipe.model), output_dir), output_dir / TOKENIZER_FOLDER)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two contenders with two seeds: command line, folder, answer."""
    folder = tmp_path_factory.mktemp("study")
    words = [*write_study(folder), "--output_dir", str(folder / "out")]
    return SimpleNamespace(words=words, folder=folder / "out", answer=compare_feed_forwards(words))


def test_every_contender_is_trained_with_every_seed_seed_by_seed(finished):
    assert finished.answer["done"] == ["dense-0", "peer-0", "dense-1", "peer-1"]
    assert not any(finished.answer[name] for name in ("failed", "paused", "waiting"))
    study = read(finished.folder / "study.json")
    assert study["tokens_sha256"] == read(finished.folder / "data.json")["tokens_sha256"]
    for run in study["runs"]:
        assert run["steps"] == 10
        assert run["tokens"] == 10 * 4 * 32
        # every third step, and the last
        assert [point["step"] for point in run["curve"]] == [3, 6, 9, 10]
        seconds = [point["seconds"] for point in run["curve"]]
        assert 0 < seconds[0] < seconds[-1] == run["train_seconds"]
        assert run["curve"][-1]["training_flops"] == run["training_flops"]
        assert run["training_flops"] == 3 * run["forward_flops_per_token"] * run["tokens"]
        assert run["validation_bits_per_byte"] > 0
        assert run["peak_memory_bytes"] > 2**26
        assert ("unevenness_layer_0" in run["usage"]) == (run["contender"] == "peer")
        assert run["experts_implementation"] in ({None} if run["contender"] == "dense" else {"cpu", "eager"})
    dense, peer = finished.answer["rows"]
    assert peer["forward_flops_per_token"] == pytest.approx(dense["forward_flops_per_token"], rel=0.01)
    assert dense["against_reference"] == [0, 0]
    assert (dense["pairs"], peer["pairs"]) == (2, 2)
    assert read(finished.folder / "summary.json") == finished.answer


def test_a_finished_run_leaves_its_results_and_no_weights(finished):
    left = {path.name for path in (finished.folder / "peer-0").iterdir()}
    assert left == {"results.json", "run.json", "curve.json", "log.txt", "lock"}
    assert (finished.folder / "study.json").stat().st_size < 2**15
    for name in ("loss_by_tokens.png", "loss_by_training_flops.png", "loss_by_seconds.png"):
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_second_call_trains_nothing_and_says_the_same(finished, capsys):
    times = {path: path.stat().st_mtime_ns for path in finished.folder.glob("*/results.json")}
    assert compare_feed_forwards(finished.words) == finished.answer
    assert "4 runs: 4 done, 0 failed before, 0 to do" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_study_goes_on_elsewhere_and_with_more_workers(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "moved")
    write_study(tmp_path)  # the same text in other files
    text = {"train_file": tmp_path / "text.txt", "validation_file": tmp_path / "held_out.txt"}
    words = [finished.words[0], *as_command_line(**text)]
    answer = compare_feed_forwards([*words, "--output_dir", str(tmp_path / "moved"), "--num_workers", "2"])
    assert (answer["done"], answer["rows"]) == (finished.answer["done"], finished.answer["rows"])
    seeds = ["--seeds", "0", "7", "--contenders", "dense"]
    assert compare_feed_forwards([*words, "--output_dir", str(tmp_path / "moved"), *seeds])["done"] == [
        "dense-0",
        "dense-7",
    ]


def test_a_study_goes_on_where_only_the_file_with_all_runs_is_left(finished, tmp_path):
    folder = tmp_path / "left"
    folder.mkdir()
    study = read(finished.folder / "study.json")
    study["shared"]["save_steps"] = 7  # as an earlier version may have kept it
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    words = [*finished.words[:-1], str(folder)]
    with pytest.raises(SettingsError, match=r"learning_rate was 0\.01, is 0\.5"):
        compare_feed_forwards([*words, "--learning_rate", "0.5"])
    answer = compare_feed_forwards(words)
    assert (answer["done"], answer["rows"]) == (finished.answer["done"], finished.answer["rows"])
    assert (folder / "study.json").read_text() == (finished.folder / "study.json").read_text()
    (tmp_path / "text.txt").write_text(some_text(seed=3), encoding="utf-8")
    with pytest.raises(SettingsError, match="tokens_sha256 was"):
        compare_feed_forwards([*words, "--train_file", str(tmp_path / "text.txt")])


def test_a_study_that_goes_on_keeps_its_sizes_and_what_is_deleted_stays_deleted(finished, tmp_path, capsys):
    shutil.copy(finished.folder / "study.json", tmp_path)
    (tmp_path / "peer-1").mkdir()  # as a restoration leaves it that was killed
    restore(tmp_path)
    for name in ("shared.json", "fits.json", "data.json", "peer-1/results.json", "peer-1/run.json"):
        assert read(tmp_path / name) == read(finished.folder / name)
    assert read(tmp_path / "fits.json")
    shutil.rmtree(tmp_path / "peer-1")
    restore(tmp_path)
    assert not (tmp_path / "peer-1").exists()
    assert (
        "study.json names runs that have no folder, 1 in all (peer-1): they count as not done"
        in capsys.readouterr().out
    )


def test_a_report_needs_only_the_file_with_all_runs(finished, tmp_path):
    (tmp_path / "study.json").write_bytes((finished.folder / "study.json").read_bytes())
    words = [finished.words[0], "--output_dir", str(tmp_path), "--report_only"]
    answer = compare_feed_forwards(words)
    assert answer["rows"] == finished.answer["rows"]
    assert sorted(answer["done"]) == sorted(finished.answer["done"])
    assert not (tmp_path / "summary.json").exists()  # the folder of a committed study gets no new file
    assert (tmp_path / "table.md").read_text() == (finished.folder / "table.md").read_text()


def change_recipe(words, folder, change):
    """A study's command line with its recipe changed in place by `change`."""
    recipe = read_yaml(Path(words[0]))
    change(recipe)
    (folder / "changed.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return [str(folder / "changed.yaml"), *words[1:]]


def set_table_rate(recipe):
    recipe["contenders"]["peer"]["training"]["table_learning_rate_multiple"] = 2.0


def set_reference_width(recipe):
    recipe["contenders"]["dense"]["model_overrides"]["intermediate_size"] = 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (
            ["--learning_rate=0.02", "--contenders", "peer"],
            dict,
            "begun with other settings for all: learning_rate was",
        ),
        (["--model_overrides", "query_norm=none"], dict, r"for all: query_norm was 'batch_norm', is 'none'\. Name"),
        (["--contenders", "peer"], set_table_rate, r"peer-0 holds .* table_learning_rate_multiple was 4\.0, is 2\.0"),
        (
            ["--contenders", "peer"],
            set_reference_width,
            "dense-0 holds a run with other settings: intermediate_size was",
        ),
    ],
)
def test_a_study_goes_on_with_the_settings_that_it_began_with(finished, tmp_path, words, change, message):
    with pytest.raises(SettingsError, match=message):
        compare_feed_forwards(change_recipe([*finished.words, "--seeds", "7", *words], tmp_path, change))


def test_a_study_goes_on_with_the_data_that_it_began_with(finished, tmp_path):
    (tmp_path / "other.txt").write_text(some_text(401, seed=1), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"begun with other data: .*tokens_sha256 was '"):
        compare_feed_forwards([*finished.words, f"--validation_file={tmp_path / 'other.txt'}"])


@pytest.mark.slow
def test_a_study_that_was_refused_or_failed_can_be_begun_with_other_settings(tmp_path):
    words = [*write_study(tmp_path, training_tokens=None, seeds=[0]), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SettingsError, match="the length of a run is not set"):
        compare_feed_forwards(words)
    # no learning rate is small enough for these losses
    failed = compare_feed_forwards([*words, "--max_steps=2", "--learning_rate=1e38"])["failed"]
    assert sorted(failed) == ["dense-0", "peer-0"]
    assert compare_feed_forwards([*words, "--max_steps=2", "--num_workers", "2"])["done"] == ["dense-0", "peer-0"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "asked to stop"])
def test_a_run_that_was_interrupted_continues_as_if_nothing_had_happened(finished, tmp_path, how):
    words = [*write_study(tmp_path), "--contenders", "peer", "--seeds", "0"]
    (run,) = plan(words, tmp_path / "out")
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    # as many threads as a study gives a run: sums of another number of them may differ in their last bits
    process = context.Process(target=run_in_process, args=(run, stop, torch.get_num_threads(), False))
    process.start()
    while not list_checkpoints(run.folder / MODEL_FOLDER):
        assert process.is_alive(), (run.folder / "log.txt").read_text()
        time.sleep(0.001)
    process.kill() if how == "killed" else stop.set()
    process.join()
    assert process.exitcode == (-9 if how == "killed" else PAUSED)
    answer = compare_feed_forwards([*words, "--output_dir", str(tmp_path / "out")])
    assert answer["done"] == ["peer-0"]
    assert "resuming from" in (run.folder / "log.txt").read_text()
    undisturbed, continued = (
        read(folder / "peer-0" / "results.json") for folder in (finished.folder, tmp_path / "out")
    )
    assert continued["validation_loss"] == undisturbed["validation_loss"]
    for name in ("step", "loss"):
        assert [p[name] for p in continued["curve"]] == [p[name] for p in undisturbed["curve"]]
    assert continued["train_seconds"] > continued["curve"][0]["seconds"] > 0


@pytest.mark.slow
def test_one_contender_that_fails_is_reported_and_the_others_finish(tmp_path):
    contenders = {"broken": {"training": {"learning_rate": 1e30}}, **STUDY["contenders"]}
    words = write_study(tmp_path, contenders=contenders, seeds=[0])
    words += ["--contenders", "broken", "dense", "--output_dir", str(tmp_path / "out")]
    answer = compare_feed_forwards(words)
    assert answer["done"] == ["dense-0"]
    assert "training diverged" in answer["failed"]["broken-0"]
    assert "- broken-0 failed: training diverged" in (tmp_path / "out" / "table.md").read_text()
    process = run_script("compare_feed_forwards.py", *words)  # not tried again, and not forgotten
    assert process.returncode == 1, process.stderr
    assert list(json.loads(process.stdout.splitlines()[-1])["failed"]) == ["broken-0"]
    contenders["broken"]["training"]["learning_rate"] = 0.01  # mended: begun anew
    answer = compare_feed_forwards([*write_study(tmp_path, contenders=contenders, seeds=[0]), *words[3:]])
    assert answer["failed"] == {}
    assert sorted(answer["done"]) == ["broken-0", "dense-0"]


def test_a_study_without_time_left_begins_nothing(tmp_path):
    words = [*write_study(tmp_path), "--output_dir", str(tmp_path / "out"), "--max_minutes", "1e-6"]
    answer = compare_feed_forwards(words)
    assert answer["waiting"] == ["dense-0", "peer-0", "dense-1", "peer-1"]
    assert answer["rows"] == []


def fake_times(calls):
    """`time_training_steps` where a step takes as many ms as intermediate_size says; it notes its arguments."""

    def time_training_steps(models, num_threads, repeats, seconds_each):
        calls.append((models, num_threads))
        return {name: Summary(float(one.config.intermediate_size), 1.0, 2.0, repeats) for name, one in models.items()}

    return time_training_steps


def test_equal_time_is_fitted_with_the_batch_the_threads_and_the_optimizer_of_the_study(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(planning, "time_training_steps", fake_times(calls))
    contenders = {
        "dense": {"model_overrides": {"mlp_layer_types": "dense", "intermediate_size": 200}},
        "peer": {
            "model_overrides": {"mlp_layer_types": ["sparse", "dense"]},
            "training": {"row_sparse_gradients": True, "adam_beta2": 0.95},
        },
    }
    words = write_study(tmp_path, budget="time", contenders=contenders, training={"max_grad_norm": 0.5})
    runs = {run.group: run for run in plan([*words, "--num_workers", "1"], tmp_path / "out")}
    assert 190 <= runs["peer"].settings["architecture"]["intermediate_size"] <= 210
    for models, num_threads in calls:
        assert num_threads == torch.get_num_threads()
        for name, row_sparse, beta2 in (("candidate", True, 0.95), ("reference", False, 0.999)):
            run = models[name].recipe.run
            assert (run.train_batch_size, run.max_grad_norm) == (4, 0.5)
            assert (run.row_sparse_gradients, run.adam_beta2) == (row_sparse, beta2)
            assert models[name].recipe.data.block_size == 32
            assert models[name].config.vocab_size == 257  # of the study's tokenizer
    assert calls
    calls.clear()
    study = parse_study([*words, "--output_dir", str(tmp_path / "out")])
    data = read(tmp_path / "out" / "data.json")
    again = plan_runs(study, data, tmp_path / "out" / TOKENIZER_FOLDER)
    assert {run.name: run.settings for run in again}["peer-1"] == runs["peer"].settings
    assert not calls  # a second measurement would give another configuration


@pytest.mark.slow
def test_a_study_with_measured_steps_reports_them_and_goes_on_without_repeating_them(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_steps, "SECONDS_IN_A_ROW", 0.0)
    words = [*write_study(tmp_path, measure_step_time=True), "--output_dir", str(tmp_path / "out")]
    first = compare_feed_forwards([*words, "--seeds", "0"])
    (before, after) = read(tmp_path / "out" / "study.json")["step_times"]["measurements"]
    assert (before["when"], after["when"]) == ("before", "after")
    for one in (before, after):
        assert list(one["steps"]) == ["dense", "peer"]
        assert one["tokens_per_step"] == 4 * 32
        assert one["machine"]["threads"] == torch.get_num_threads()
        assert one["steps"]["dense"]["ratio"] == 1
        for step in one["steps"].values():
            assert 0 < step["summary"]["lower_quartile_ms"] <= step["summary"]["median_ms"]
    dense = first["rows"][0]["to_reference_loss"]
    step_ms = (before["steps"]["dense"]["summary"]["median_ms"] + after["steps"]["dense"]["summary"]["median_ms"]) / 2
    assert dense["measured_seconds"][0] == pytest.approx(10 * step_ms / 1000, rel=0.01)
    assert dense["seconds"][0] == pytest.approx(first["rows"][0]["train_seconds"], abs=0.051)  # a row has one decimal
    table = (tmp_path / "out" / "table.md").read_text()
    assert "to final loss of dense, s | the same by measured steps, s |" in table
    assert "each contender alone on the machine" in table

    calls = []
    monkeypatch.setattr(step_times, "time_training_steps", fake_times(calls))
    compare_feed_forwards([*words, "--seeds", "0"])
    compare_feed_forwards([*words, "--report_only"])
    assert not calls
    # more seeds: measured after them again, and not before them
    compare_feed_forwards([*words, "--max_minutes", "1e-6"])
    assert not calls
    compare_feed_forwards(words)
    assert len(calls) == 1
    kept, new = read(tmp_path / "out" / "study.json")["step_times"]["measurements"]
    assert kept == before
    assert new["steps"]["dense"]["summary"]["median_ms"] == 64.0  # the fake machine's
    assert (tmp_path / "out" / "table.md").read_text().count("- before the runs") == 1

    left = tmp_path / "left"  # only the file with all runs is left
    left.mkdir()
    shutil.copy(tmp_path / "out" / "study.json", left)
    compare_feed_forwards([*words[:-1], str(left)])
    assert len(calls) == 1
    assert (left / "study.json").read_text() == (tmp_path / "out" / "study.json").read_text()


def test_models_of_all_sizes_get_the_same_training_flops(tmp_path):
    sizes = {"small": {"model_overrides": {"hidden_size": 16}}, "base": None}
    words = write_study(tmp_path, sizes=sizes, training_tokens=None, training_flops=2e10, budget="none")
    runs = plan(words, tmp_path / "out")
    assert [run.name for run in runs[:4]] == ["small-dense-0", "small-peer-0", "base-dense-0", "base-peer-0"]
    for run in runs:
        flops = run.cost["steps"] * run.cost["tokens_per_step"] * run.cost["training_flops_per_token"]
        assert flops == pytest.approx(2e10, rel=0.02)
    assert runs[0].cost["steps"] > 2 * runs[2].cost["steps"]


@pytest.mark.slow
def test_bidirectional_contenders_predict_masked_tokens(tmp_path):
    contenders = {
        "dense": {"model_overrides": {"mlp_layer_types": "dense"}},
        "soft_moe": {"model_overrides": {"sparse_mlp": "soft_moe", "num_moe_experts": 4}},
    }
    shared = {"is_causal": False, "moe_intermediate_size": 16}
    words = write_study(tmp_path, contenders=contenders, model_overrides=shared, seeds=[0])
    answer = compare_feed_forwards([*words, "--output_dir", str(tmp_path / "out")])
    assert answer["done"] == ["dense-0", "soft_moe-0"]
    dense, soft_moe = answer["rows"]
    assert soft_moe["forward_flops_per_token"] == pytest.approx(dense["forward_flops_per_token"], rel=0.01)
    assert 1 < soft_moe["perplexity"][0] < 258
    assert soft_moe["bits_per_byte"] == [None, None]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "equal flops as dense; perplexity of masked tokens; mean" in table
    assert f"| soft_moe | 1 | {soft_moe['perplexity'][0]:.2f} | {soft_moe['against_reference'][0]:+.2f} | - |" in table


def some_run(contender, seed, perplexity, size=None, parameters=10, **facts):
    curve = [{"step": 1, "training_flops": 5, "seconds": 0.1, "loss": 2.0}]
    run = {"contender": contender, "seed": seed, "size": size, "validation_perplexity": perplexity, "curve": curve}
    run |= {"validation_bits_per_byte": 1.0, "seconds_per_step": 0.1, "train_seconds": 0.2, "steps": 2, "tokens": 64}
    run |= {"peak_memory_bytes": seed * 2**20, "training_flops": 100, "forward_flops_per_token": 2, "usage": {}}
    run |= {"settings": {"architecture": {}}}
    return run | {"total_parameters": parameters, "active_parameters": 5} | facts


def some_study(runs):
    place = {"machine": {"cpu": "a CPU", "threads": 1}, "versions": {"torch": "2", "transformers": "5"}}
    place["versions"] |= {"modeling_peer": "abc", "uncommitted_changes": False}
    facts = {"reference": "dense", "budget": "flops", "data": "text", "failed": {}}
    return {**facts, "places": [place], "runs": runs}


def test_a_difference_is_taken_seed_by_seed_and_only_where_both_are_done():
    runs = [some_run("dense", 0, 100.0), some_run("dense", 1, 50.0), some_run("peer", 1, 45.0)]
    study = some_study([*runs, some_run("peer", 2, 1.0, usage={"unevenness_layer_1": 1.0, "unevenness_layer_2": 2.0})])
    dense, peer = make_rows(study, StepTimes())
    assert peer["against_reference"] == [pytest.approx(-10), None]
    assert peer["unevenness"] == [1.5, None]
    assert dense["perplexity"] == [75.0, pytest.approx(35.355, abs=1e-3)]
    assert peer["peak_memory_bytes"] == 2 * 2**20
    table = as_tables(study, [dense, peer], StepTimes())
    assert dense["gap_along_the_run"] is peer["gap_along_the_run"] is None  # one evaluation is no line
    assert "| dense | 2 | 75.00 ± 35.36 | +0.00 ± 0.00 |" in table
    assert "| perplexity | paired difference from dense, % |" in table
    assert "| peer | 2 | 23.00 ± 31.11 | -10.00 (1 pair) |" in table
    assert "has the same seed" in table
    assert "a CPU, 1 thread a run" in table
    assert "| peer | 23.00 ± 31.11 | - | - | 1.500 | - |" in table


OLDER_STUDIES = sorted((REPOSITORY / "results" / "studies").glob("*/study.json"))


@pytest.mark.parametrize("path", OLDER_STUDIES, ids=lambda path: path.parent.name)
def test_a_study_from_before_step_times_were_measured_is_reported_with_what_it_has(path):
    study = read(path)
    rows = make_rows(study, StepTimes())
    table = as_tables(study, rows, StepTimes())
    assert f"| to final loss of {study['reference']}, s |" in table
    assert "measured steps" not in table
    assert "alone on the machine" not in table
    gaps = [row["gap_along_the_run"] for row in rows if row["contender"] != study["reference"]]
    assert gaps
    assert {gap["verdict"] for gap in gaps} <= {"grows", "holds", "shrinks"}
    for row in rows:
        assert row["to_reference_loss"]["pairs"] == row["pairs"]
        assert row["to_reference_loss"]["measured_seconds"] == [None, None]


def test_sizes_become_a_curve_of_perplexity_over_parameters(tmp_path):
    runs = [some_run(name, 0, 10.0, *size, steps=2 + 2 * (size == SIZES[0])) for name in NAMES for size in SIZES]
    rows = write_report(some_study(runs), tmp_path)
    assert [row["size"] for row in rows] == ["small", "large"] * 2
    assert "text; 64 tokens a run, 2 to 4 steps; equal flops as dense" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "iso_flop.png").read_bytes().startswith(b"\x89PNG")


NAMES, SIZES = ("dense", "peer"), (("small", 10), ("large", 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contendors": {}}, "unknown field 'contendors'. Did you mean 'contenders'"),
        ({"contenders": {"a": {"overrides": {}}}}, "unknown field 'overrides' of contenders a"),
        ({"contenders": {"a/b": {}, "dense": {}}}, "'a/b' names folders"),
        ({"contenders": None}, "required fields are missing: contenders"),
        ({"reference": "densest"}, "the reference must be one of dense, peer; got 'densest'. Did you mean 'dense'"),
        ({"budget": "money"}, "--budget .money. must be one of flops, parameters, time, none"),
        ({"seeds": [0.5]}, "seeds are whole numbers"),
        ({"training_tokens": "many"}, "must be a float"),
        ({"evaluations": True}, "evaluations .True. must be a int"),
        ({"measure_step_time": 1}, "measure_step_time .1. must be a bool"),
        ({"training_flops": 1e9}, "both say how long a run is"),
        ({"training": {"seed": 1}}, "training sets seed"),
        ({"contenders": {"dense": {"training": {"block_size": 8}}}}, "contender dense sets block_size"),
        ({"recipe": "nowhere.yaml"}, "no file 'nowhere.yaml'"),
        ({"training": {"learning_rat": 1}}, "Did you mean 'learning_rate'"),
        ({"training_tokens": None}, "the length of a run is not set"),
        ({"model_overrides": {"num_sub_kees": 4}}, "no field 'num_sub_kees'. Did you mean 'num_sub_keys'"),
        (
            {"contenders": {"dense": {}, "soft": {"model_overrides": {"sparse_mlp": "soft_moe"}}}, "budget": "none"},
            "(?s)contender soft: .*a causal model",
        ),
        (
            {
                "contenders": {"dense": {}, "moe": {"model_overrides": {"sparse_mlp": "top_k_moe"}}},
                "training": {"experts_implementation": "cpu"},
            },
            "contender moe: .*does not compute experts that are whole MLPs",
        ),
        ({"fit": ["hidden_size"]}, "contender peer: 'hidden_size' is no knob"),
        ({"contenders": {"dense": {}, "peer": {"model_overrides": {"query_dim": 4096}}}}, "contender peer: .*flops"),
        (
            {"contenders": {"dense": {}, "peer": {"training": {"gradient_accumulation_steps": 2}}}},
            "contender peer trains on 256 tokens a step, the others on 128",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_its_first_run(tmp_path, changes, message):
    words = [*write_study(tmp_path, **changes), "--output_dir", str(tmp_path)]
    with pytest.raises(SettingsError, match=message):
        plan_runs(parse_study(words), DATA, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contenders", "pear"], "--contenders must be one of dense, peer; got 'pear'. Did you mean 'peer'"),
        (["--seed", "3"], "--seed: a study sets this for each of its runs; see --seeds"),
        (["--num_workers", "0"], "--num_workers .0. must be at least 1"),
        (["--report_only"], "has no study.json"),
        (["--train_file=nowhere.txt"], "nowhere.txt"),
        (["--learning-rat=1"], "Did you mean 'learning_rate'"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(tmp_path, words, message):
    with pytest.raises(SettingsError, match=message):
        compare_feed_forwards([*write_study(tmp_path), "--output_dir", str(tmp_path / "out"), *words])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_repository_can_be_planned(tmp_path, name):
    study = parse_study([name, "--output_dir", str(tmp_path), "--use_cpu=true"])  # h200 wants bf16
    runs = plan_runs(study, {"vocab_size": 2048, "block_size": 256}, tmp_path)
    assert len(runs) == len(study.recipe.contenders) * max(1, len(study.recipe.sizes)) * len(study.recipe.seeds)
    assert f"compare_feed_forwards.py {name}" in (REPOSITORY / FOLDER / f"{name}.yaml").read_text()
    assert read_yaml(REPOSITORY / FOLDER / f"{name}.yaml")["reference"] == next(iter(study.recipe.contenders))

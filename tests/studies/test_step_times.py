# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time of a step before and after the runs of a study: what is measured when, and what the report says about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from modeling_peer.costs.timing import Summary
from modeling_peer.studies import step_times
from modeling_peer.studies.plan import PlannedRun
from modeling_peer.studies.step_time_report import step_time_parts
from modeling_peer.studies.step_times import AFTER, BEFORE, Measurement, StepClock, StepTime, StepTimes

PLACE = {
    "machine": {"cpu": "a CPU", "threads": 1},
    "versions": {"torch": "2", "transformers": "5", "modeling_peer": "abc", "uncommitted_changes": False},
}
DENSE_MS = 100.0


def planned(contender, seed=0, size=None, folder=Path(), learning_rate=1.0):
    settings = {"learning_rate": learning_rate, "architecture": {"name": contender}, "seed": seed}
    return PlannedRun(contender, size, seed, folder, settings, {"seed": seed}, {"tokens_per_step": 128})


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """A clock whose measurements only note what they were asked for: `clock.measured`."""
    noted = []

    def measure(when, runs, num_threads):
        noted.append((when, [run.group for run in runs]))
        steps = {
            run.contender: StepTime(Summary(DENSE_MS, 90.0, 110.0, 21), 1.0, step_times._hash_settings(run))
            for run in runs
        }
        return Measurement(when, runs[0].size, "2026-11-28T12:00:00+00:00", 128, **PLACE, steps=steps)

    monkeypatch.setattr(step_times, "measure", measure)
    references = {size: planned("dense", size=size) for size in (None, "small", "large")}
    clock = StepClock(tmp_path, references, num_threads=1)
    return clock, noted


def test_a_study_that_goes_on_does_not_repeat_the_measurement_before_its_runs(clock):
    clock, noted = clock
    runs = [planned(name, seed) for seed in (0, 1) for name in ("dense", "peer")]
    clock.measure_before(runs)
    clock.measure_before(runs[1:])
    assert noted == [("before", ["dense", "peer"])]
    clock.measure_after(runs)
    clock.measure_after(runs)
    assert noted[1:] == [("after", ["dense", "peer"])]


def test_more_runs_are_followed_by_another_measurement_after_them(clock):
    clock, noted = clock
    runs = [planned(name) for name in ("dense", "peer", "switch")]
    clock.measure_before(runs)
    clock.measure_after(runs)
    clock.measure_before([planned("peer", seed=1)])
    clock.measure_after(runs)
    assert noted == [
        ("before", ["dense", "peer", "switch"]),
        ("after", ["dense", "peer", "switch"]),
        ("after", ["dense", "peer"]),  # the last runs of dense and switch had ended before the first of these
    ]


def test_a_contender_that_joins_later_is_measured_beside_the_reference(clock):
    clock, noted = clock
    clock.measure_before([planned("dense"), planned("peer")])
    clock.measure_before([planned("switch")])
    assert noted == [("before", ["dense", "peer"]), ("before", ["dense", "switch"])]


def test_a_contender_with_changed_settings_is_measured_again_and_only_once(clock):
    clock, noted = clock
    clock.measure_before([planned("dense"), planned("peer")])
    changed = planned("peer", learning_rate=2.0)
    clock.measure_before([planned("dense"), changed])
    clock.measure_before([planned("dense"), changed])
    assert noted == [("before", ["dense", "peer"]), ("before", ["dense", "peer"])]
    found = clock._read().find(BEFORE, "peer", None)
    assert found.settings == step_times._hash_settings(changed)


def test_sizes_are_measured_apart_each_with_its_own_reference(clock):
    clock, noted = clock
    runs = [planned(name, size=size) for size in ("small", "large") for name in ("dense", "peer")]
    clock.measure_before(runs)
    assert noted == [("before", ["small-dense", "small-peer"]), ("before", ["large-dense", "large-peer"])]


def times(before, after=None, date="2026-11-28T12:00:00+00:00"):
    """Measurements with these ratios to dense, by contender; dense takes 100 ms."""
    measurements = []
    for when, ratios in ((BEFORE, before), (AFTER, after)):
        if ratios:
            steps = {
                name: StepTime(Summary(DENSE_MS * ratio, 95.0 * ratio, 108.0 * ratio, 21), ratio, "0")
                for name, ratio in {"dense": 1.0, **ratios}.items()
            }
            measurements.append(Measurement(when, None, date, 128, **PLACE, steps=steps))
    return StepTimes(measurements)


def test_what_is_read_from_the_file_is_what_was_written():
    written = times({"peer": 1.02}, {"peer": 1.01})
    assert StepTimes.of(written.as_dict()) == written
    assert StepTimes.of({}) == StepTimes()


def test_the_time_of_a_token_is_the_mean_of_both_measurements():
    both = times({"peer": 1.0}, {"peer": 1.2})
    assert both.ms_per_token("peer", None) == pytest.approx(110 / 128)
    assert times({"peer": 1.0}).ms_per_token("peer", None) == pytest.approx(100 / 128)
    assert both.ms_per_token("peer", "small") is None


def test_the_report_shows_both_measurements_with_quartiles_ratios_and_circumstances():
    about, table, circumstances, verdicts = step_time_parts(times({"peer": 1.02}, {"peer": 1.03}), "dense", "time")
    assert "ratio to dense" in about
    assert "| dense | 100.0 (95.0 to 108.0) | 1.000 | 100.0 (95.0 to 108.0) | 1.000 | +0.0 |" in table
    assert "| peer | 102.0 (96.9 to 110.2) | 1.020 | 103.0 (97.9 to 111.2) | 1.030 | +1.0 |" in table
    before, after = circumstances.splitlines()
    assert "- before the runs, 2026-11-28T12:00:00+00:00: dense, peer; 128 tokens a step, 21 turns of each" in before
    assert after.endswith("a CPU, 1 thread a run, torch 2, Transformers 5, commit abc.")
    assert verdicts == "- No ratio changed by more than 5 % between the measurements before and after the runs."


def test_a_ratio_that_changed_by_more_than_the_tolerance_is_named_with_its_numbers():
    *_, verdicts = step_time_parts(
        times({"peer": 1.0, "switch": 1.0}, {"peer": 1.049, "switch": 0.9}), "dense", "flops"
    )
    (line,) = verdicts.splitlines()
    assert "ratio of switch to dense changed from 1.000 before the runs to 0.900 after them, by -10.0 %" in line
    assert "tolerance is 5 %" in line


def test_a_contender_that_missed_the_budget_of_time_is_named_with_its_numbers():
    missed = times({"peer": 1.08}, {"peer": 1.07})
    *_, verdicts = step_time_parts(missed, "dense", "time")
    assert "**peer missed the budget before the runs:** its step took 1.080 times" in verdicts
    assert "**peer missed the budget after the runs:** its step took 1.070 times" in verdicts
    assert "missed" not in step_time_parts(missed, "dense", "flops")[-1]


def test_one_measurement_alone_is_no_check_and_none_is_no_section():
    *_, table, _, verdicts = step_time_parts(times({"peer": 1.0}), "dense", "time")
    assert "| peer | 100.0 (95.0 to 108.0) | 1.000 | - | - | - |" in table
    assert "no ratio was checked" in verdicts
    assert step_time_parts(StepTimes(), "dense", "time") == []


def test_a_contender_measured_fewer_times_than_another_shows_both_numbers():
    (one,) = times({"peer": 1.0}).measurements
    slow = replace(one.steps["peer"], summary=replace(one.steps["peer"].summary, repeats=5))
    parts = step_time_parts(StepTimes([replace(one, steps=one.steps | {"peer": slow})]), "dense", "time")
    assert "5-21 turns of each" in parts[2]

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time of a training step of each contender, measured before the runs of a study and again after them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

from modeling_peer.console.files import read_json, write_json
from modeling_peer.costs.budgets import TOLERANCES
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.costs.timing import Summary
from modeling_peer.hub.loading import load_config
from modeling_peer.studies.plan import PlannedRun
from modeling_peer.training.measured_steps import MeasuredModel, time_training_steps
from modeling_peer.training.recipe import build_recipe

STEP_TIMES_FILE = "step_times.json"
BEFORE, AFTER = "before", "after"
REPEATS = 21
SECONDS_EACH = 20.0
# The ratios before and after may differ by this share: what the budget of time allows a fit.
TOLERANCE = TOLERANCES["time"]


@dataclass(frozen=True)
class StepTime:
    """The time of a contender's step.

    Args:
        ratio: its median divided by that of the reference in the same measurement.
        settings: hash of the settings that the measured runs share.
    """

    summary: Summary
    ratio: float
    settings: str


@dataclass(frozen=True)
class Measurement:
    """One measurement: the steps of some contenders and of the reference at one size, in alternation.

    Args:
        when: "before" the runs or "after" them.
        date: when it ended, ISO 8601, in UTC.
        steps: by contender.
    """

    when: str
    size: str | None
    date: str
    tokens_per_step: int
    machine: dict[str, Any]
    versions: dict[str, Any]
    steps: dict[str, StepTime]


@dataclass(frozen=True)
class StepTimes:
    """All measurements of a study, in their order."""

    measurements: list[Measurement] = field(default_factory=list)

    @classmethod
    def of(cls, content: dict[str, Any]) -> "StepTimes":
        """From the content of `STEP_TIMES_FILE`; an empty one has no measurement."""
        return cls(
            [
                Measurement(**one | {"steps": {name: _step_time(step) for name, step in one["steps"].items()}})
                for one in content.get("measurements", [])
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The content of `STEP_TIMES_FILE`."""
        return {"measurements": [asdict(one) for one in self.measurements]}

    def find(self, when: str, contender: str, size: str | None) -> StepTime | None:
        """The first measurement of a contender before its runs, or the last one after them."""
        found = [
            one.steps[contender]
            for one in self.measurements
            if one.when == when and one.size == size and contender in one.steps
        ]
        return (found[0] if when == BEFORE else found[-1]) if found else None

    def ms_per_token(self, contender: str, size: str | None) -> float | None:
        """Median milliseconds of a step divided by its tokens: the mean of before and after, or the one there is."""
        medians = [step.summary.median_ms for when in (BEFORE, AFTER) if (step := self.find(when, contender, size))]
        return mean(medians) / self.measurements[0].tokens_per_step if medians else None

    def without(self, when: str, runs: Sequence[PlannedRun]) -> "StepTimes":
        """The measurements but for those of the contenders and sizes of `runs`, before or after them."""
        dropped = {(when, run.size, run.contender) for run in runs}
        left = [
            replace(one, steps={n: step for n, step in one.steps.items() if (one.when, one.size, n) not in dropped})
            for one in self.measurements
        ]
        return StepTimes([one for one in left if one.steps])


def _step_time(content: dict[str, Any]) -> StepTime:
    return StepTime(Summary(**content["summary"]), content["ratio"], content["settings"])


@dataclass(frozen=True)
class StepClock:
    """Measures what a study has not measured yet, and keeps it in the folder of the study.

    Args:
        references: the reference's run at each size. Its step is in every measurement.
        num_threads: CPU threads of a run.
    """

    study_dir: Path
    references: dict[str | None, PlannedRun]
    num_threads: int

    def measure_before(self, left: Sequence[PlannedRun]) -> None:
        """Measure the contenders of `left`, the runs to be trained, unless it was done in an earlier call.

        What was measured after earlier runs is dropped, because `left` will be the last ones.
        """
        contenders = _contenders(left)
        self._write(self._read().without(AFTER, contenders))
        self._measure(BEFORE, contenders)

    def measure_after(self, ended: Sequence[PlannedRun]) -> None:
        """Measure the contenders of `ended`, runs that are done, unless it was done since the last of them ended."""
        self._measure(AFTER, _contenders(ended))

    def _measure(self, when: str, contenders: Sequence[PlannedRun]) -> None:
        times = self._read()
        missing = [run for run in contenders if not _is_measured(times, when, run)]
        times = times.without(when, missing)  # measured with settings that were changed since
        for size in dict.fromkeys(run.size for run in missing):
            reference = self.references[size]
            runs = [reference, *(run for run in missing if run.size == size and run.contender != reference.contender)]
            times.measurements.append(measure(when, runs, self.num_threads))
            self._write(times)

    def _read(self) -> StepTimes:
        return StepTimes.of(read_json(self.study_dir / STEP_TIMES_FILE))

    def _write(self, times: StepTimes) -> None:
        write_json(self.study_dir / STEP_TIMES_FILE, times.as_dict())


def measure(when: str, runs: Sequence[PlannedRun], num_threads: int) -> Measurement:
    """Measure a step of each of these runs, of one size; the first is the reference's."""
    names = ", ".join(run.contender for run in runs)
    print(f"time of a step {when} the runs, in alternation: {names}", flush=True)
    recipes = {run.contender: build_recipe(run.fields) for run in runs}
    models = {name: MeasuredModel(recipe, load_config(recipe.model)) for name, recipe in recipes.items()}
    summaries = time_training_steps(models, num_threads, REPEATS, SECONDS_EACH)
    reference, device = runs[0], recipes[runs[0].contender].run.device
    steps = {
        run.contender: StepTime(
            summary=Summary(**summaries[run.contender].as_dict()),
            ratio=round(summaries[run.contender].median_ms / summaries[reference.contender].median_ms, 5),
            settings=_hash_settings(run),
        )
        for run in runs
    }
    for name, step in steps.items():
        print(f"  {name}: {step.summary.median_ms:.1f} ms, {step.ratio:.3f} of {reference.contender}", flush=True)
    return Measurement(
        when=when,
        size=reference.size,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tokens_per_step=reference.cost["tokens_per_step"],
        machine=describe_machine(device) | {"threads": num_threads},
        versions=describe_versions(),
        steps=steps,
    )


def _contenders(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """One run of each contender and size: a step is the same for every seed."""
    return list({run.group: run for run in runs}.values())


def _is_measured(times: StepTimes, when: str, run: PlannedRun) -> bool:
    step = times.find(when, run.contender, run.size)
    return step is not None and step.settings == _hash_settings(run)


def _hash_settings(run: PlannedRun) -> str:
    settings = {name: value for name, value in run.settings.items() if name != "seed"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

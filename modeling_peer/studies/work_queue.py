# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Run the planned runs of a study in processes, some at a time, until all are done or the time is over."""

import multiprocessing
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from statistics import mean

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json
from modeling_peer.console.tables import counted
from modeling_peer.studies.plan import PlannedRun, compared
from modeling_peer.studies.run import (
    FAILURE_FILE,
    PAUSED,
    RUN_FILE,
    RUN_RESULTS_FILE,
    run_in_process,
    write_failure,
)
from modeling_peer.studies.unchanged import describe_changes

# Each run has a new interpreter. So its peak memory is its own, and a killed run ends no other. CUDA and OpenMP would
# not survive a fork.
START_METHOD = "spawn"
SECONDS_BETWEEN_CHECKS = 0.5


@dataclass
class Tally:
    """Names of the runs by their state. Failed runs have their causes."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    paused: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


def select_runs(runs: Sequence[PlannedRun], retry_failed: bool) -> tuple[list[PlannedRun], Tally]:
    """Split the runs into those left to do and those that are done or have failed before.

    A failed run is continued if `retry_failed` is set. It starts again from the beginning if its settings changed.

    Raises:
        SettingsError: a run of the same contender and size, with any seed, has other settings.
    """
    left, tally = [], Tally()
    for run in runs:
        failure = read_json(run.folder / FAILURE_FILE)
        if failure and failure["settings"] != run.settings:
            shutil.rmtree(run.folder)
        elif failure and retry_failed:
            (run.folder / FAILURE_FILE).unlink()
        elif failure:
            tally.failed[run.name] = failure["cause"]
            continue
        require_same_settings(run)
        if (run.folder / RUN_RESULTS_FILE).is_file():
            tally.done.append(run.name)
        else:
            left.append(run)
    return left, tally


def require_same_settings(run: PlannedRun) -> None:
    """Raise SettingsError if `run`, or its group's run of another seed, was begun with other settings.

    The table averages over seeds, so these runs must differ in the seed only.
    """
    for folder in sorted(run.study_dir.glob(f"{run.group}-*")):
        counts = folder.name.removeprefix(f"{run.group}-").isdecimal() and not (folder / FAILURE_FILE).is_file()
        begun = read_json(folder / RUN_FILE).get("settings") if counts else None
        # an earlier version may have stored fields that are no longer compared
        if begun and (changes := describe_changes(compared(begun) | {"seed": run.seed}, run.settings)):
            raise SettingsError(
                f"{folder} holds a run with other settings: {changes}. Delete it, or name another --output_dir."
            )


def has_begun(study_dir: Path) -> bool:
    """Whether a folder has runs that have not failed."""
    return any(not path.with_name(FAILURE_FILE).is_file() for path in study_dir.glob(f"*/{RUN_FILE}"))


def work_off(
    runs: Sequence[PlannedRun],
    tally: Tally,
    num_workers: int,
    num_threads: int,
    keep_models: bool,
    deadline: float,
    after_each: Callable[[], None],
) -> None:
    """Train `runs` in order, `num_workers` at a time, and record their states in `tally`.

    Args:
        num_threads: CPU threads of each run.
        deadline: time of `time.monotonic()` at which running runs are saved and paused.
        after_each: called after each run that is done.
    """
    context = multiprocessing.get_context(START_METHOD)
    stop = context.Event()
    progress = _Progress(len(runs), num_workers)
    waiting, working = deque(runs), {}
    try:
        while waiting or working:
            try:
                if time.monotonic() > deadline:
                    stop.set()
                while waiting and len(working) < num_workers and not stop.is_set():
                    run = waiting.popleft()
                    process = context.Process(target=run_in_process, args=(run, stop, num_threads, keep_models))
                    process.start()
                    working[process.sentinel] = run, process, time.monotonic()
                    print(f"begins: {run.name}, {counted(run.cost['steps'], 'step')}; see {run.folder}", flush=True)
                if stop.is_set() and not working:
                    break
                for sentinel in connection.wait(list(working), timeout=SECONDS_BETWEEN_CHECKS):
                    run, process, began = working.pop(sentinel)
                    process.join()
                    _record(run, process.exitcode, stop.is_set(), tally)
                    progress.report(run, time.monotonic() - began, tally, waiting)
                    if run.name in tally.done:
                        after_each()
            except KeyboardInterrupt:
                if stop.is_set():
                    raise
                print("stopping after the runs are saved (interrupt again to kill them)", flush=True)
                stop.set()
    finally:
        for _, process, _ in working.values():
            process.kill()
        tally.waiting += [run.name for run in waiting]


def _record(run: PlannedRun, status: int, stopping: bool, tally: Tally) -> None:
    has_failed = (run.folder / FAILURE_FILE).is_file()
    if (run.folder / RUN_RESULTS_FILE).is_file():
        tally.done.append(run.name)
        return
    if status == PAUSED or (stopping and not has_failed):  # an interrupt can end a process that has just started
        tally.paused.append(run.name)
        return
    if not has_failed:
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        hint = ": out of memory, perhaps" if status == -signal.SIGKILL else ""
        write_failure(run, f"the process ended with {name}{hint}")
    tally.failed[run.name] = read_json(run.folder / FAILURE_FILE)["cause"]


class _Progress:
    """Prints the state of each run that ended, and an estimate of the time for the waiting runs."""

    def __init__(self, total: int, num_workers: int):
        self.total, self.num_workers = total, num_workers
        self.ended = 0
        self.seconds: dict[tuple[str, str | None], list[float]] = {}

    def report(self, run: PlannedRun, seconds: float, tally: Tally, waiting: Sequence[PlannedRun]) -> None:
        """Print one line. The seconds of a paused run are those of this call only."""
        self.ended += 1
        if run.name in tally.done:
            self.seconds.setdefault((run.contender, run.size), []).append(seconds)
            results = read_json(run.folder / RUN_RESULTS_FILE)
            words = f"perplexity {results['validation_perplexity']:.3f}"
        elif run.name in tally.paused:
            words = "saved, to be continued"
        else:
            words = f"FAILED: {tally.failed[run.name]}"
        left = ""
        if self.seconds and waiting:
            average = mean(value for values in self.seconds.values() for value in values)
            rest = sum(mean(self.seconds.get((r.contender, r.size), [average])) for r in waiting)
            left = f"; {len(waiting)} wait, about {rest / self.num_workers / 60:.0f} min"
        print(f"[{self.ended}/{self.total}] {run.name}: {words}, in {seconds:.0f} s{left}", flush=True)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compare feed-forwards at an equal budget: the function behind `peer compare`."""

import math
import time
from collections.abc import Sequence
from typing import Any

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.tables import counted
from modeling_peer.hub.loading import load_config
from modeling_peer.studies.data import TOKENIZER_FOLDER, prepare_data
from modeling_peer.studies.plan import (
    NOT_COMPARED,
    PlannedRun,
    group_name,
    plan_runs,
    shared_recipe,
    shared_settings,
)
from modeling_peer.studies.report import STUDY_FILE, TABLE_FILE, collect, read_study, restore, write_report
from modeling_peer.studies.step_times import StepClock
from modeling_peer.studies.study_recipe import Study, parse_study
from modeling_peer.studies.unchanged import SHARED_FILE, require_unchanged
from modeling_peer.studies.work_queue import Tally, has_begun, require_same_settings, select_runs, work_off

SUMMARY_FILE = "summary.json"


def compare_feed_forwards(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the remaining runs of a study, and report on all of its runs.

    Args:
        words: `recipe.yaml --field value ...`; see `parse_study`.

    Returns:
        Paths of the files, rows of the table, and the names of the runs that are done, failed, paused or waiting.

    Raises:
        SettingsError: the study cannot work. It is raised before the first run.
    """
    study = parse_study(words)
    if study.arguments.report_only:
        content = read_study(study.output_dir)
        done = [f"{group_name(run['contender'], run['size'])}-{run['seed']}" for run in content["runs"]]
        return _answer(study, write_report(content, study.output_dir), Tally(done=done))
    began = time.monotonic()
    tally = _train(study, began)
    answer = _answer(study, write_report(collect(study), study.output_dir), tally)
    write_json(study.output_dir / SUMMARY_FILE, answer)
    return answer


def _train(study: Study, began: float) -> Tally:
    try:
        study.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {study.output_dir}: {error.strerror}.") from error
    restore(study.output_dir)
    recipe = shared_recipe(study)
    data = prepare_data(recipe, load_config(recipe.model), study.output_dir)
    print(f"data: {data['data']}; {data['training_tokens']:,} tokens", flush=True)
    arguments, tokenizer = study.arguments, study.output_dir / TOKENIZER_FOLDER
    references = plan_runs(study, data, tokenizer, [study.recipe.reference])
    _require_same_study(study, references)  # before contenders are fitted to it, which can take minutes
    runs = plan_runs(study, data, tokenizer)
    left, tally = select_runs(runs, arguments.retry_failed)
    counts = f"{len(tally.done)} done, {len(tally.failed)} failed before, {len(left)} to do"
    print(f"{counted(len(runs), 'run')}: {counts}", flush=True)
    deadline = math.inf if arguments.max_minutes is None else began + 60 * arguments.max_minutes
    clock = StepClock(study.output_dir, {run.size: run for run in references}, arguments.num_threads)
    measures = study.recipe.measures_step_time
    if measures and left and time.monotonic() < deadline:
        clock.measure_before(left)
    work_off(
        left,
        tally,
        arguments.num_workers,
        arguments.num_threads,
        arguments.keep_models,
        deadline,
        after_each=lambda: write_report(collect(study), study.output_dir, announce=False),
    )
    if measures and not (tally.paused or tally.waiting):
        if time.monotonic() < deadline:
            clock.measure_after([run for run in runs if run.name in tally.done])
        else:
            print("the time of a step after the runs is measured by the next call of the same command", flush=True)
    return tally


def _require_same_study(study: Study, references: Sequence[PlannedRun]) -> None:
    """Raise SettingsError if the folder has runs whose settings differ from the planned ones."""
    if not has_begun(study.output_dir):
        (study.output_dir / SHARED_FILE).unlink(missing_ok=True)
    path, settings = study.output_dir / SHARED_FILE, shared_settings(study)
    require_unchanged(path, settings, "settings for all", ignored=NOT_COMPARED)
    for run in references:
        require_same_settings(run)  # the other contenders were fitted to its budget
    write_json(path, settings)


def _answer(study: Study, rows: list[dict[str, Any]], tally: Tally) -> dict[str, Any]:
    files = {"path": str(study.output_dir / STUDY_FILE), "table": str(study.output_dir / TABLE_FILE)}
    return {**files, "rows": rows, **vars(tally)}

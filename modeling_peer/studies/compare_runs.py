# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compare finished runs: the function behind `peer compare-runs`."""

import glob
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import no_such_folder
from modeling_peer.console.run_files import RESULTS_FILE
from modeling_peer.console.tables import as_markdown, mean_and_deviation, paired, with_deviation
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import NEXT_TOKEN

# If these differ, the losses belong to different tasks.
COMPARED = ("data", "objective", "steps", "tokens")


@dataclass
class ComparisonArguments:
    """The runs to compare. A group is one setting with several seeds."""

    runs: list[str] = field(
        metadata={
            "help": "Groups of finished runs, name=folder or name=pattern: dense=runs/dense-* sparse=runs/sparse-*"
        }
    )
    output_file: str | None = field(default=None, metadata={"help": "Write the result to this JSON file."})
    plot_file: str | None = field(default=None, metadata={"help": "Draw the loss curves to this PNG file."})


@dataclass
class Run:
    """One finished run: its summary, and its training loss at each logged step."""

    folder: Path
    summary: dict[str, Any]
    steps: list[int]
    losses: list[float]


def compare_runs(arguments: ComparisonArguments) -> dict[str, Any]:
    """Print a table of the groups. It has means and standard deviations over their runs.

    The result is also written and drawn if the arguments name files.

    Raises:
        SettingsError: a run is missing or not finished, or the runs differ in data, objective or length.
    """
    groups = dict(_read_group(word) for word in arguments.runs)
    _require_same_task([run for runs in groups.values() for run in runs])
    first = next(iter(groups.values()))
    rows = [{"runs": name, **_summarize(runs, first)} for name, runs in groups.items()]
    print(as_markdown([_printed(row, reference=rows[0]["runs"]) for row in rows]), flush=True)
    facts = {name: first[0].summary[name] for name in (*COMPARED, "versions")}
    result = {**facts, "groups": rows}
    if arguments.output_file:
        write_text(arguments.output_file, json.dumps(result, indent=1) + "\n")
    if arguments.plot_file:
        from modeling_peer.studies.loss_curves import plot_losses  # matplotlib is optional

        plot_losses(groups, arguments.plot_file)
    return {"path": arguments.output_file, **result}


def _read_group(word: str) -> tuple[str, list[Run]]:
    name, equals, pattern = word.partition("=")
    if not equals:
        raise SettingsError(f"--runs takes name=folder; got {word!r}.")
    folders = sorted(glob.glob(pattern))
    if not folders:
        raise SettingsError(f"--runs {word}: nothing matches {pattern}: {no_such_folder(pattern)}")
    return name, [read_run(Path(folder)) for folder in folders]


def read_run(folder: Path) -> Run:
    """Read the files that `peer train` wrote to its output_dir."""
    try:
        summary = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except FileNotFoundError as error:
        raise SettingsError(
            f"{folder} holds no finished run ({Path(error.filename).name} is missing). Finish it with "
            "--resume_from_checkpoint last."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"the results in {folder} are damaged: {RESULTS_FILE} or trainer_state.json ({type(error).__name__}: "
            f"{error}). Resume the run with --resume_from_checkpoint last, which writes them anew."
        ) from error
    if not isinstance(summary, dict) or not isinstance(history, list):
        raise SettingsError(
            f"the results in {folder} are damaged: {RESULTS_FILE} or trainer_state.json holds another type. Resume "
            "the run with --resume_from_checkpoint last, which writes them anew."
        )
    summary.setdefault("objective", NEXT_TOKEN)  # older runs had no other objective
    logged = [entry for entry in history if "loss" in entry]
    return Run(folder, summary, [entry["step"] for entry in logged], [entry["loss"] for entry in logged])


def _require_same_task(runs: Sequence[Run]) -> None:
    for name in COMPARED:
        values = {run.summary[name]: run.folder for run in runs}
        if len(values) > 1:
            listed = "; ".join(f"{folder}: {value}" for value, folder in values.items())
            raise SettingsError(f"the runs differ in {name}, so their losses do not compare ({listed}).")


def _summarize(runs: Sequence[Run], first: Sequence[Run]) -> dict[str, Any]:
    """Summary of one group.

    `difference` is its validation loss minus the first group's. Runs are paired in the order of their folder names.
    """
    losses = _values(runs, "eval_loss")
    pairs = list(zip(losses, _values(first, "eval_loss"), strict=False))
    return {
        "seeds": len(runs),
        "validation_loss": mean_and_deviation(losses),
        "difference": mean_and_deviation([one - other for one, other in pairs]),
        "pairs": len(pairs),
        "bits_per_byte": mean_and_deviation(_values(runs, "validation_bits_per_byte")),
        "seconds_per_step": median(_values(runs, "seconds_per_step") or [math.nan]),
        "peak_memory_bytes": max(_values(runs, "peak_memory_bytes"), default=None),
        "parameters": runs[0].summary["parameters"],
    }


def _values(runs: Sequence[Run], name: str) -> list[float]:
    return [run.summary[name] for run in runs if run.summary.get(name) is not None]


def _printed(row: dict[str, Any], reference: str) -> dict[str, Any]:
    """A row with its numbers formatted for a table."""
    cells = {}
    for name, value in row.items():
        if name == "pairs":  # beside the difference
            continue
        if name == "difference":
            name = f"paired difference from {reference}"
            value = paired(value, "+.4f", row["pairs"], row["seeds"])
        elif isinstance(value, list):
            value = with_deviation(value, ".4f")
        elif name == "peak_memory_bytes":
            name, value = "peak memory, MiB", "-" if value is None else round(value / 2**20)
        cells[name.replace("_", " ")] = value
    return cells

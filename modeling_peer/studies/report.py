# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The report of a study: one JSON file with all its runs, a table, and plots."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json
from modeling_peer.console.tables import as_markdown, counted, mean_and_deviation, paired, with_deviation
from modeling_peer.files_peer import write_text
from modeling_peer.studies.data import DATA_FILE, FACTS
from modeling_peer.studies.gaps import FITTED_FROM, gap_along_the_run
from modeling_peer.studies.places import hardware, software
from modeling_peer.studies.plan import FITS_FILE, group_name
from modeling_peer.studies.plots import plot_study
from modeling_peer.studies.run import FAILURE_FILE, RUN_FILE, RUN_RESULTS_FILE, USAGE
from modeling_peer.studies.step_time_report import step_time_parts
from modeling_peer.studies.step_times import STEP_TIMES_FILE, StepTimes
from modeling_peer.studies.study_recipe import Study
from modeling_peer.studies.time_to_loss import difference_at_equal_time, time_to_loss
from modeling_peer.studies.unchanged import SHARED_FILE
from modeling_peer.studies.validation_curve import ValidationCurve

STUDY_FILE = "study.json"
TABLE_FILE = "table.md"
# Other files of a study. `STUDY_FILE` contains each of them under this name.
WHOLE_FILES = {"shared": SHARED_FILE, "fits": FITS_FILE, "step_times": STEP_TIMES_FILE}


def collect(study: Study) -> dict[str, Any]:
    """Everything that the folder of a study holds, from all calls."""
    recipe = study.recipe
    names = [group_name(name, size) for size in recipe.sizes or [None] for name in recipe.contenders]
    folders = [path for name in names for path in sorted(study.output_dir.glob(f"{name}-*")) if _is_seed(path, name)]
    runs = [results for folder in folders if (results := read_json(folder / RUN_RESULTS_FILE))]
    places = []  # runs share machines and versions, so each pair is stored once
    for run in runs:
        place = {"machine": run.pop("machine"), "versions": run.pop("versions")}
        if place not in places:
            places.append(place)
        run["place"] = places.index(place)
    return {
        "reference": recipe.reference,
        "budget": recipe.budget,
        "training": recipe.training,
        **read_json(study.output_dir / DATA_FILE),
        **{name: read_json(study.output_dir / file) for name, file in WHOLE_FILES.items()},
        "places": places,
        "failed": {f.name: why["cause"] for f in folders if (why := read_json(f / FAILURE_FILE))},
        "runs": runs,
    }


def restore(folder: Path) -> None:
    """Write the files that `collect` read, in a folder where only `study.json` is left.

    Its finished runs then count as done. The study keeps refusing other data, settings and sizes.
    """
    study = read_json(folder / STUDY_FILE)
    if not study:
        return
    folders = [folder / f"{group_name(run['contender'], run['size'])}-{run['seed']}" for run in study["runs"]]
    if (folder / DATA_FILE).exists():
        gone = [path.name for path in folders if not path.exists()]
        if gone:
            names = ", ".join(gone[:3]) + ", ..." * (len(gone) > 3)
            print(
                f"{STUDY_FILE} names runs that have no folder, {len(gone)} in all ({names}): they count as not done. "
                f"To restore them, stop and delete {folder / DATA_FILE}.",
                flush=True,
            )
        return
    for run, run_folder in zip(study["runs"], folders, strict=True):
        run_folder.mkdir(exist_ok=True)
        write_json(run_folder / RUN_FILE, {"settings": run["settings"]})
        write_json(run_folder / RUN_RESULTS_FILE, run | study["places"][run.pop("place")])
    for name, file in WHOLE_FILES.items():
        if study.get(name):  # older studies lack it, and step times are not always measured
            write_json(folder / file, study[name])
    # Written last: once it exists, everything is restored, and a run deleted later stays deleted.
    write_json(folder / DATA_FILE, {name: study[name] for name in FACTS})


def read_study(folder: Path) -> dict[str, Any]:
    """Read the study that `write_report` wrote."""
    content = read_json(folder / STUDY_FILE)
    if not content:
        raise SettingsError(
            f"--report_only: {folder} has no {STUDY_FILE}. Train first, or name the --output_dir of the study."
        )
    return content


def write_report(study: dict[str, Any], folder: Path, announce: bool = True) -> list[dict[str, Any]]:
    """Write JSON, table and plots into `folder`, and return the rows of the table.

    Args:
        announce: print the table.
    """
    times = StepTimes.of(study.get("step_times", {}))
    rows = make_rows(study, times)
    gaps = [
        {"contender": row["contender"], "size": row["size"], **row["gap_along_the_run"]}
        for row in rows
        if row["gap_along_the_run"]
    ]
    write_json(folder / STUDY_FILE, study | {"gap_along_the_run": gaps})
    table = as_tables(study, rows, times)
    write_text(folder / TABLE_FILE, table + "\n")
    if announce:
        print(table, flush=True)
    if study["runs"]:
        plot_study(study, rows, times, folder)
    return rows


def make_rows(study: dict[str, Any], times: StepTimes) -> list[dict[str, Any]]:
    """One row for each contender and size: means and standard deviations over its seeds.

    `against_reference` is the mean paired difference from the reference, in percent of its perplexity. A pair is two
    runs of the same seed. `pairs` is their number. `at_equal_time` is the same at the reference's last second, on the
    examples of the curves. `to_reference_loss` is a `TimeToLoss`. `gap_along_the_run` is a `Gap`, or None for the
    reference and for runs with too few evaluations.
    """
    groups: dict[tuple, list[dict]] = {}
    for run in study["runs"]:
        groups.setdefault((run["size"], run["contender"]), []).append(run)
    curves = {group: {run["seed"]: ValidationCurve.of(run) for run in runs} for group, runs in groups.items()}
    rows = []
    for (size, contender), runs in groups.items():
        others = {run["seed"]: run["validation_perplexity"] for run in groups.get((size, study["reference"]), [])}
        ratios = [run["validation_perplexity"] / others[run["seed"]] for run in runs if run["seed"] in others]
        own, of_reference = (curves.get((size, name), {}) for name in (contender, study["reference"]))
        ms_per_token, reference_ms_per_token = (
            times.ms_per_token(name, size) for name in (contender, study["reference"])
        )
        reaching = time_to_loss(own, of_reference, ms_per_token)
        gap = None if contender == study["reference"] else gap_along_the_run(own, of_reference)
        peaks = _known(run["peak_memory_bytes"] for run in runs)
        steps = _known(run["seconds_per_step"] for run in runs)
        row = {
            "contender": contender,
            "size": size,
            "seeds": len(runs),
            "perplexity": mean_and_deviation([run["validation_perplexity"] for run in runs]),
            "against_reference": mean_and_deviation([100 * (ratio - 1) for ratio in ratios]),
            "pairs": len(ratios),
            "bits_per_byte": mean_and_deviation(_known(run["validation_bits_per_byte"] for run in runs)),
            "train_seconds": round(mean(run["train_seconds"] for run in runs), 1),
            "seconds_per_step": median(steps) if steps else None,
            "to_reference_loss": asdict(reaching),
            "at_equal_time": difference_at_equal_time(own, of_reference, ms_per_token, reference_ms_per_token),
            "gap_along_the_run": gap and asdict(gap),
            "peak_memory_bytes": max(peaks, default=None),
        }
        same = ("total_parameters", "active_parameters", "forward_flops_per_token", "training_flops", "tokens")
        row |= {name: runs[0][name] for name in same}
        for figure in USAGE:
            row[figure] = mean_and_deviation([value for run in runs for value in _of_layers(run["usage"], figure)])
        rows.append(row)
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def as_tables(study: dict[str, Any], rows: Sequence[dict[str, Any]], times: StepTimes) -> str:
    """Markdown: results and cost of each contender, its gap to the reference, step times, use of experts, failures."""
    reference = study["reference"]
    if not rows:
        parts = ["No run is done."]
    else:
        parts = [_headline(study, times), as_markdown([_cells(row, reference, times) for row in rows])]
    with_gap = [row for row in rows if row["gap_along_the_run"]]
    if with_gap:
        parts += [_about_gaps(reference), as_markdown([_gap_cells(row) for row in with_gap])]
    parts += step_time_parts(times, reference, study["budget"])
    used = [row for row in rows if row["unevenness"][0] is not None]
    if used:
        parts += ["Experts in use, on the validation examples:", as_markdown([_usage_cells(row) for row in used])]
    parts += [f"- {name} failed: {cause}" for name, cause in study["failed"].items()]
    return "\n\n".join(parts)


def _headline(study: dict[str, Any], times: StepTimes) -> str:
    tokens, steps = (_range(run[name] for run in study["runs"]) for name in ("tokens", "steps"))
    budget = "no common budget" if study["budget"] == "none" else f"equal {study['budget']} as {study['reference']}"
    places = [f"{hardware(place['machine'])}, {software(place['versions'])}" for place in study["places"]]
    at_equal_time = (
        f" At equal measured time, {study['reference']} is at its end. A contender whose step takes longer is in the "
        "middle of its run, before its learning rate has fallen."
    )
    masked = not study["runs"][0]["settings"]["architecture"].get("is_causal", True)
    return (
        f"{study['data']}; {tokens} tokens a run, {steps} steps; {budget}; "
        f"{'perplexity of masked tokens; ' if masked else ''}"
        f"mean ± standard deviation over seeds. {'; '.join(places)}.\n\n"
        f"A paired difference compares a run with the one of {study['reference']} that has the same seed. Its "
        "deviation is over these differences, so it can be smaller than those of the perplexities. A run is at "
        f"the final loss of {study['reference']} when its validation loss is the one that {study['reference']} ends "
        "with at the same seed. The seconds until then are those of training."
        f"{at_equal_time if times.measurements else ''}"
    )


def _about_gaps(reference: str) -> str:
    return (
        f"Gap in validation loss to {reference} along the run. For each pair of runs with the same seed, a line over "
        f"the logarithm of the tokens is fitted to it, from {100 * FITTED_FROM:.0f} % of them on. The gap holds if "
        f"the slope is within two standard errors of 0. It grows if contender and {reference} move apart:"
    )


def _range(values: Iterable[int]) -> str:
    numbers = set(values)
    return f"{min(numbers):,}" + (f" to {max(numbers):,}" if len(numbers) > 1 else "")


def _cells(row: dict[str, Any], reference: str, times: StepTimes) -> dict[str, Any]:
    peak = row["peak_memory_bytes"]
    per_step = row["seconds_per_step"]
    return {
        **_name(row),
        "seeds": row["seeds"],
        "perplexity": with_deviation(row["perplexity"], ".2f"),
        f"paired difference from {reference}, %": paired(row["against_reference"], "+.2f", row["pairs"], row["seeds"]),
        "bits per byte": with_deviation(row["bits_per_byte"], ".4f"),
        "parameters": row["total_parameters"],
        "active": row["active_parameters"],
        "forward MFLOPs a token": f"{row['forward_flops_per_token'] / 1e6:.3f}",
        **({"tokens": row["tokens"]} if row["size"] else {}),
        "training, s": f"{row['train_seconds']:.0f}",
        "ms a step": "-" if per_step is None else f"{1000 * per_step:.1f}",
        **_cells_to_loss(row["to_reference_loss"], reference, bool(times.measurements)),
        **_cells_at_equal_time(row, bool(times.measurements)),
        "peak memory, MiB": "-" if peak is None else round(peak / 2**20),
    }


def _cells_to_loss(reaching: dict[str, Any], reference: str, measured: bool) -> dict[str, str]:
    """Seconds to the final loss of the reference, as recorded and, where steps were measured, by their time."""
    columns = {f"to final loss of {reference}, s": "seconds"}
    if measured:
        columns["the same by measured steps, s"] = "measured_seconds"
    pairs, reached = reaching["pairs"], reaching["reached"]
    partly = f" ({reached} of {counted(pairs, 'seed')})" if reached < pairs else ""
    if pairs and not reached:
        return dict.fromkeys(columns, "not reached")
    return {heading: with_deviation(reaching[name], ".1f") + partly for heading, name in columns.items()}


def _cells_at_equal_time(row: dict[str, Any], measured: bool) -> dict[str, str]:
    if not measured:
        return {}
    return {"difference at equal measured time, %": paired(row["at_equal_time"], "+.2f", row["pairs"], row["seeds"])}


def _gap_cells(row: dict[str, Any]) -> dict[str, str]:
    gap = row["gap_along_the_run"]
    error = "" if gap["slope_error"] is None else f" ± {gap['slope_error']:.4f}"
    return {
        **_name(row),
        "pairs": f"{gap['pairs']}",
        "evaluations": f"{gap['points']}",
        "gap at the end, nats": f"{gap['at_end']:+.4f}",
        "slope ± standard error, nats a doubling of tokens": f"{gap['slope']:+.4f}{error}",
        "the gap": gap["verdict"],
    }


def _usage_cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **_name(row),
        "perplexity": with_deviation(row["perplexity"], ".2f"),
        "usage, %": _percent(row["expert_usage"]),
        "of best experts, %": _percent(row["top_1_usage"]),
        "unevenness": with_deviation(row["unevenness"], ".3f"),
        "unused experts": with_deviation(row["dead_experts"], ".0f"),
    }


def _name(row: dict[str, Any]) -> dict[str, str]:
    return {"contender": row["contender"]} | ({"size": row["size"]} if row["size"] else {})


def _percent(pair: Sequence[float | None]) -> str:
    return with_deviation([value and 100 * value for value in pair], ".1f")


def _of_layers(usage: dict[str, float], figure: str) -> list[float]:
    """The mean over the layers that retrieve experts, as a list of one; empty if no layer does."""
    values = [value for name, value in usage.items() if name.startswith(figure)]
    return [mean(values)] if values else []


def _is_seed(path: Path, name: str) -> bool:
    return path.name.removeprefix(f"{name}-").isdecimal()

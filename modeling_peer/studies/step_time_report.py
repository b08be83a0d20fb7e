# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The part of a study's report on the time of a training step: a table, and whether the ratios are to be believed."""

from collections.abc import Sequence

from modeling_peer.console.tables import as_markdown
from modeling_peer.studies.places import hardware, software
from modeling_peer.studies.plan import group_name
from modeling_peer.studies.step_times import AFTER, BEFORE, TOLERANCE, StepTime, StepTimes
from modeling_peer.training.measured_steps import SECONDS_IN_A_ROW

Group = tuple[str, str | None]  # contender and size


def step_time_parts(times: StepTimes, reference: str, budget: str) -> list[str]:
    """Paragraphs of Markdown; none if nothing was measured."""
    if not times.measurements:
        return []
    groups = list(dict.fromkeys((name, one.size) for one in times.measurements for name in one.steps))
    return [
        "Time of a training step, each contender alone on the machine while it is timed, in turns of at least "
        f"{SECONDS_IN_A_ROW:g} s. Median (quartiles) over the turns, and the ratio to {reference} in the same "
        "measurement:",
        as_markdown([_cells(times, group) for group in groups]),
        "\n".join(f"- {line}" for line in _circumstances(times)),
        "\n".join(f"- {line}" for line in [*_drifts(times, groups, reference), *_misses(times, groups, budget)]),
    ]


def _cells(times: StepTimes, group: Group) -> dict[str, str]:
    contender, size = group
    cells = {"contender": contender} | ({"size": size} if size else {})
    for when in (BEFORE, AFTER):
        step = times.find(when, *group)
        cells[f"{when}, ms"] = _with_quartiles(step) if step else "-"
        cells[f"ratio {when}"] = f"{step.ratio:.3f}" if step else "-"
    change = _change(times, group)
    return cells | {"change of the ratio, %": "-" if change is None else f"{100 * change:+.1f}"}


def _with_quartiles(step: StepTime) -> str:
    one = step.summary
    return f"{one.median_ms:.1f} ({one.lower_quartile_ms:.1f} to {one.upper_quartile_ms:.1f})"


def _change(times: StepTimes, group: Group) -> float | None:
    """The ratio after the runs divided by the one before them, minus 1; None if one of them was not measured."""
    before, after = (times.find(when, *group) for when in (BEFORE, AFTER))
    return after.ratio / before.ratio - 1 if before and after else None


def _circumstances(times: StepTimes) -> list[str]:
    lines = []
    for one in times.measurements:
        repeats = {step.summary.repeats for step in one.steps.values()}
        rounds = "-".join(str(figure(repeats)) for figure in ((min,) if len(repeats) == 1 else (min, max)))
        lines.append(
            f"{one.when} the runs{f' of size {one.size}' if one.size else ''}, {one.date}: {', '.join(one.steps)}; "
            f"{one.tokens_per_step:,} tokens a step, {rounds} turns of each; {hardware(one.machine)}, "
            f"{software(one.versions)}."
        )
    return lines


def _drifts(times: StepTimes, groups: Sequence[Group], reference: str) -> list[str]:
    """What the measurements before and after the runs say about each other."""
    changes = {group: change for group in groups if (change := _change(times, group)) is not None}
    if not changes:
        return ["Only one of the two measurements is there yet, so no ratio was checked against a second one."]
    lines = []
    for group, change in changes.items():
        if abs(change) > TOLERANCE:
            before, after = (times.find(when, *group).ratio for when in (BEFORE, AFTER))
            lines.append(
                f"**The ratio of {group_name(*group)} to {reference} changed from {before:.3f} before the runs to "
                f"{after:.3f} after them, by {100 * change:+.1f} %.** The tolerance is {100 * TOLERANCE:.0f} %, so "
                "its seconds do not compare well."
            )
    return lines or [
        f"No ratio changed by more than {100 * TOLERANCE:.0f} % between the measurements before and after the runs."
    ]


def _misses(times: StepTimes, groups: Sequence[Group], budget: str) -> list[str]:
    """For the budget of time, the contenders whose ratio is not 1 within its tolerance."""
    if budget != "time":
        return []
    lines = []
    for group in groups:
        for when in (BEFORE, AFTER):
            step = times.find(when, *group)
            if step and abs(step.ratio - 1) > TOLERANCE:
                lines.append(
                    f"**{group_name(*group)} missed the budget {when} the runs:** its step took {step.ratio:.3f} "
                    f"times the reference's time, and the budget allows {1 - TOLERANCE:.2f} to {1 + TOLERANCE:.2f}."
                )
    return lines

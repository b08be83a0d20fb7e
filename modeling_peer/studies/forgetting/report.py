# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tables and plot of a comparison of forgetting."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.studies.forgetting.lessons import Point, at_equal_learning
from modeling_peer.studies.forgetting.plan import SEQUENCE


class End(NamedTuple):
    """Where a lesson began, where it ended, and whether it reached its target."""

    start: Point
    point: Point
    reached: bool


def make_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task and method, over its runs.

    Returns:
        `reached`: runs of which every lesson reached its target. `learned`: what the loss on the new material, the
        last in a sequence, fell by. `forgotten`: what the loss on the old text grew by. Both in nats per token, where
        the run reached the target (a single lesson is interpolated there), else at its end. `to_full`: forgotten
        over that of full fine-tuning. `earlier`: what the loss on earlier domains of a sequence grew by since their
        lessons, mean over them. `forgotten_in_common`: what was forgotten where each run first learned as much as the
        run that learned least, `learned_in_common`. So methods compare at equal learning even if some do not reach
        the target. None in a sequence.
    """
    return [
        row
        for task, found in content["tasks"].items()
        for row in _rows_of_task(task, found, {name: content["runs"][name] for name in _names(found)})
    ]


def _names(found: dict[str, Any]) -> list[str]:
    return [name for names in found["runs"].values() for name in names]


def _rows_of_task(task: str, found: dict[str, Any], by_name: dict[str, Any]) -> list[dict[str, Any]]:
    rows, common = [], None
    if task != SEQUENCE:
        common = max(min(point.new for point in _points(run, task)) for run in by_name.values())
    for method, names in found["runs"].items():
        runs = [by_name[name] for name in names]
        ends = [_ends(run, found["targets"]) for run in runs]
        answered = [end[-1].point.answered for end in ends if end[-1].point.answered is not None]
        rows.append(
            {
                "task": task,
                "method": method,
                "added_flops": runs[0]["added_flops"],
                "trained": runs[0]["trained"],
                "learning_rate": found["rates"][method],
                "runs": len(runs),
                "reached": sum(all(one.reached for one in end) for end in ends),
                "steps": mean_and_deviation([sum(one.point.step for one in end) for end in ends]),
                "learned": mean_and_deviation([end[-1].start.new - end[-1].point.new for end in ends]),
                "answered": mean_and_deviation(answered),
                "forgotten": mean_and_deviation([end[-1].point.old - end[0].start.old for end in ends]),
                "earlier": mean_and_deviation([_grown_since(run) for run in runs] if task == SEQUENCE else []),
                **({} if common is None else _in_common([_points(run, task) for run in runs], common)),
            }
        )
    full = next((row["forgotten"][0] for row in rows if row["method"] == "full"), None)
    for row in rows:
        row["to_full"] = round(row["forgotten"][0] / full, 3) if full and full > 0 else None
    return rows


def _points(run: dict[str, Any], lesson: str) -> list[Point]:
    return [Point(**point) for point in run["lessons"][lesson]["points"]]


def _in_common(runs: Sequence[Sequence[Point]], target: float) -> dict[str, Any]:
    """What each run forgot until its new loss first was at `target`, which all of them reached."""
    ends = [at_equal_learning(points, target) for points in runs]
    return {
        "learned_in_common": round(mean(points[0].new for points in runs) - target, 5),
        "forgotten_in_common": mean_and_deviation(
            [end.old - points[0].old for points, end in zip(runs, ends, strict=True)]
        ),
    }


def _ends(run: dict[str, Any], targets: dict[str, float]) -> list[End]:
    ends = []
    for name in run["lessons"]:
        points = _points(run, name)
        reached = at_equal_learning(points, targets[name])
        # the lessons after it began where it really ended
        last = reached if reached and len(run["lessons"]) == 1 else points[-1]
        ends.append(End(points[0], last, reached is not None))
    return ends


def _grown_since(run: dict[str, Any]) -> float:
    """What the losses on all domains but the last grew by since the ends of their lessons."""
    lessons = list(run["lessons"].items())
    now = lessons[-1][1]["earlier"]
    return mean([now[name] - lesson["points"][-1]["new"] for name, lesson in lessons[:-1]] or [0.0])


def as_tables(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tables = [f"{task}\n\n" + as_markdown([_cells(row) for row in rows if row["task"] == task]) for task in tasks]
    return "\n\n".join(tables) or "no task is finished."


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    grown = row["forgotten"][0]
    cells = {
        "method": row["method"],
        "added FLOPs per token": row["added_flops"],
        "trained numbers": row["trained"],
        "learning rate": f"{row['learning_rate']:g}",
        "reached": f"{row['reached']} of {row['runs']}",
        "steps": with_deviation(row["steps"], ".0f"),
        "learned": with_deviation(row["learned"], ".3f"),
        "forgotten": with_deviation(row["forgotten"], ".4f"),
        "old perplexity": f"{100 * (math.exp(grown) - 1):+.1f} %",
        "of full": "-" if row["to_full"] is None else f"{row['to_full']:.2f}",
    }
    if "forgotten_in_common" in row:
        name = f"forgotten where all learned {row['learned_in_common']:.2f}"
        cells[name] = with_deviation(row["forgotten_in_common"], ".4f")
    for name, pair, spec in (("answered", row["answered"], ".2f"), ("earlier domains", row["earlier"], ".4f")):
        if pair != [None, None]:
            cells[name] = with_deviation(pair, spec)
    return cells


def plot_forgetting(content: dict[str, Any], path: str | Path) -> None:
    """Draw loss on the old text over what is learned, for each task and method; in a sequence, after each lesson.

    Args:
        content: what `compare_forgetting` writes.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    tasks = [task for task, found in content["tasks"].items() if found["runs"]]
    methods = list(dict.fromkeys(row["method"] for row in content["rows"]))
    figure, panels = new_figure(len(tasks), len(methods))
    for axes, task in zip(panels, tasks, strict=True):
        ends = []
        for method, names in content["tasks"][task]["runs"].items():
            style = line_style(methods.index(method))
            lessons = content["runs"][names[0]]["lessons"]
            if task == SEQUENCE:
                points = [lesson["points"][-1] for lesson in lessons.values()]
                start = next(iter(lessons.values()))["points"][0]
                xs, ys = range(len(points) + 1), [0.0, *(point["old"] - start["old"] for point in points)]
            else:
                points = lessons[task]["points"]
                xs = [points[0]["new"] - point["new"] for point in points]
                ys = [point["old"] - points[0]["old"] for point in points]
            axes.plot(xs, ys, **style)
            ends.append((xs[-1], ys[-1], method, style))
        axes.set(
            title=task,
            xlabel="lessons" if task == SEQUENCE else "learned: fall of the new loss, nats",
            ylabel="forgotten: growth of the old loss, nats",
        )
        axes.grid(alpha=0.3)
        label_line_ends(axes, ends)
    save_png(figure, path)

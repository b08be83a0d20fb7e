# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Plots of the losses of groups of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png
from modeling_peer.console.tables import counted

# Logged values that one point averages. Without averaging, the noise of single batches hides the differences.
SMOOTHED = 10
# With more groups in one plot, the single runs would hide the means.
MAX_GROUPS_WITH_RUNS = 4


def plot_losses(groups: Mapping[str, Sequence], path: str) -> None:
    """Draw the mean of each group as a line and each of its runs as a thin line, and write a PNG.

    Args:
        groups: runs by name, each with `steps` and `losses` of equal length.
    """
    figure, (axes,) = new_figure(num_labels=len(groups))
    curves = {}
    for name, runs in groups.items():
        smooth = [_smooth(run.losses) for run in runs]
        curves[f"{name} ({counted(len(runs), 'seed')})"] = [
            (run.steps[len(run.steps) - len(losses) :], losses) for run, losses in zip(runs, smooth, strict=True)
        ]
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} logged values")
    axes.grid(alpha=0.3)
    draw_groups(axes, [(label, line_style(number), runs) for number, (label, runs) in enumerate(curves.items())])
    save_png(figure, path)


def draw_groups(
    axes, groups: Sequence[tuple[str | None, dict[str, Any], Sequence[tuple[Sequence[float], Sequence[float]]]]]
) -> None:
    """Draw the mean of each group up to the end of its shortest run, and each run as a thin line if groups are few.

    Args:
        groups: label at the line's end or None, `line_style`, and the runs' curves of x and y.
    """
    ends = []
    for label, style, curves in groups:
        if len(groups) <= MAX_GROUPS_WITH_RUNS:
            for xs, ys in curves:
                axes.plot(xs, ys, color=style["color"], alpha=0.3, linewidth=0.8)
        mean_xs, mean_ys = (_mean_curve([curve[axis] for curve in curves]) for axis in (0, 1))
        axes.plot(mean_xs, mean_ys, **style, markevery=max(1, len(mean_xs) // 8))
        if label and mean_xs:
            ends.append((mean_xs[-1], mean_ys[-1], label, style))
    label_line_ends(axes, ends)


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def _smooth(losses: Sequence[float]) -> list[float]:
    return [sum(losses[i - SMOOTHED : i]) / SMOOTHED for i in range(SMOOTHED, len(losses) + 1)] or list(losses)

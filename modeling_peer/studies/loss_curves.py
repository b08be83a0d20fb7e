# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training losses of groups of runs as a picture."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

# steps of logging that one point of a curve averages, so that the differences show through the noise of batches
SMOOTHED = 10


def plot_losses(groups: Mapping[str, Sequence], path: str) -> None:
    """Draw every run thinly in its group's colour, and the group's mean over them, and write a PNG.

    Args:
        groups: runs by name, each with `steps` and `losses` of equal length.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(groups.items()):
        curves = []
        for run in runs:
            losses = _smooth(run.losses)
            curves.append((run.steps[len(run.steps) - len(losses) :], losses))
        draw_group(axes, f"C{number}", f"{name} ({len(runs)} seeds)", curves)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} logged values")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)


def draw_group(axes, color: str, label: str | None, curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw curves of x and y thinly, and the mean over them, as far as the shortest goes."""
    for xs, ys in curves:
        axes.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
    mean_xs, mean_ys = (_mean_curve([curve[axis] for curve in curves]) for axis in (0, 1))
    axes.plot(mean_xs, mean_ys, color=color, label=label)


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def _smooth(losses: Sequence[float]) -> list[float]:
    return [sum(losses[i - SMOOTHED : i]) / SMOOTHED for i in range(SMOOTHED, len(losses) + 1)] or list(losses)

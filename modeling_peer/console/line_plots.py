# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Line plots of all commands: styles that differ without color, and a label at the end of each line."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

# Okabe & Ito 2008, without yellow, which is too light on white. Readers with any colour vision can tell them apart.
COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
INCHES_PER_LABEL = 0.2
# right of the axes, as shares of their width
KEY_PLACE, TEXT_PLACE = 1.03, 1.055
PANELS_PER_ROW = 3


def line_style(number: int) -> dict[str, Any]:
    """Color, dashes and marker of the line with this number. 77 numbers have different pairs of color and marker."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
    }


def new_figure(num_panels: int = 1, num_labels: int = 0) -> tuple:
    """A figure and the axes of its panels, each high enough for `num_labels` labels at the ends of its lines.

    Returns:
        figure, and a list of `num_panels` axes.
    """
    from matplotlib.figure import Figure  # optional: extra bench

    columns = min(num_panels, PANELS_PER_ROW)
    rows = -(-num_panels // columns)
    width, height = (9, 4.5) if num_panels == 1 else (6.5 * columns, 4 * rows)
    figure = Figure(figsize=(width, max(height, rows * (1 + INCHES_PER_LABEL * num_labels))), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[num_panels:]:
        unused.remove()
    return figure, panels[:num_panels]


def label_line_ends(axes, ends: Sequence[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write a label for each line to the right of the axes, sorted by the last values, with a thin line to its end.

    Call it after all lines are drawn and the scales are set, because it fixes the limits of the axes.

    Args:
        ends: last x, last y, text and `line_style` of each line.
    """
    if not ends:
        return
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_share = axes.transScale + axes.transLimits  # from data to shares of the axes
    ends_of_lines = [to_share.transform((x, y)) for x, y, _, _ in ends]
    height = axes.figure.get_size_inches()[1] / axes.get_gridspec().nrows - 1  # inches of the axes, about
    gap = min(INCHES_PER_LABEL / height, 1 / len(ends))
    places = spread([y for _, y in ends_of_lines], gap)
    for (x, y), place, (_, _, text, style) in zip(ends_of_lines, places, ends, strict=True):
        options = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([x, KEY_PLACE], [y, place], color=style["color"], linewidth=0.6, alpha=0.5, zorder=1, **options)
        axes.plot(KEY_PLACE, place, **style, **options)
        axes.text(TEXT_PLACE, place, text, va="center", fontsize="small", transform=axes.transAxes)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in `[0, 1]`, at least `gap` apart and in the order of the wanted ones.

    The sum of squared distances to the wanted places is least (isotonic regression), except for the cut to `[0, 1]`.

    Args:
        gap: at most `1 / (len(wanted) - 1)`, so that all places fit.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # neighbours that touch share the mean of their shifted places
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    shifted = [mean(block) for block in blocks for _ in block]
    highest = 1 - (len(wanted) - 1) * gap
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = min(max(shifted[rank], 0.0), highest) + rank * gap
    return places


def save_png(figure, path: str | Path) -> None:
    """Write a figure as a PNG of 150 dots per inch."""
    figure.savefig(path, format="png", dpi=150)

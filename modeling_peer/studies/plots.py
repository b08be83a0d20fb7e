# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A study as pictures: loss against FLOPs, loss against time, and perplexity over sizes of equal training FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modeling_peer.studies.loss_curves import draw_group

MAX_NAMES_INSIDE = 12  # a longer legend stands beside the axes
AXES = {"training_flops": "training FLOPs", "seconds": "seconds of training"}


def plot_study(study: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `loss_by_training_flops.png`, `loss_by_seconds.png` and, where there are sizes, `iso_flop.png`."""
    groups: dict[tuple, list[dict]] = {}
    for run in study["runs"]:
        groups.setdefault((run["size"], run["contender"]), []).append(run)
    contenders = list(dict.fromkeys(contender for _, contender in groups))
    for name, words in AXES.items():
        figure, axes = _figure()
        labelled = set()
        for (_, contender), runs in groups.items():  # one colour for a contender, whatever its size
            label = None if contender in labelled else f"{contender} ({len(runs)} seeds)"
            labelled.add(contender)
            curves = [tuple([point[key] for point in run["curve"]] for key in (name, "loss")) for run in runs]
            draw_group(axes, f"C{contenders.index(contender)}", label, curves)
        axes.set(xlabel=words, ylabel="validation loss, nats a token")
        _save(figure, axes, folder / f"loss_by_{name}.png")
    if any(row["size"] for row in rows):
        _plot_sizes(rows, folder / "iso_flop.png")


def _plot_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = _figure()
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = sorted((row for row in rows if row["contender"] == contender), key=lambda row: row["active_parameters"])
        axes.errorbar(
            [row["active_parameters"] for row in own],
            [row["perplexity"][0] for row in own],
            yerr=[row["perplexity"][1] or 0.0 for row in own],
            marker="o",
            capsize=3,
            label=contender,
        )
    flops = dict.fromkeys(f"{figure(row['training_flops'] for row in rows):.2g}" for figure in (min, max))
    axes.set_title(f"{' to '.join(flops)} training FLOPs")
    axes.set(xlabel="active parameters", ylabel="validation perplexity", xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _save(figure, axes, path)


def _figure() -> tuple:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, axes, path: Path) -> None:
    names = len(axes.get_legend_handles_labels()[1])
    if names > MAX_NAMES_INSIDE:
        figure.set_size_inches(10, max(4.5, 0.2 * names))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    else:
        axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, format="png", dpi=150)

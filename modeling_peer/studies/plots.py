# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Plots of a study: loss over tokens, FLOPs and time, and perplexity over sizes of equal training FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png
from modeling_peer.console.tables import counted
from modeling_peer.studies.loss_curves import draw_groups
from modeling_peer.studies.step_times import StepTimes
from modeling_peer.studies.validation_curve import ValidationCurve

AXES = {"tokens": "tokens of training", "training_flops": "training FLOPs", "seconds": "seconds of training"}


def plot_study(study: dict[str, Any], rows: Sequence[dict[str, Any]], times: StepTimes, folder: Path) -> None:
    """Write `loss_by_tokens.png`, `loss_by_training_flops.png`, `loss_by_seconds.png` and, with sizes, `iso_flop.png`.

    Loss has one panel for each size, with the same style for a contender in all of them. Seconds are steps times their
    measured time in a panel whose contenders were all measured, else those that the runs recorded.
    """
    groups: dict[str | None, dict[str, list[dict]]] = {}
    for run in study["runs"]:
        groups.setdefault(run["size"], {}).setdefault(run["contender"], []).append(run)
    contenders = list(dict.fromkeys(run["contender"] for run in study["runs"]))
    for name, words in AXES.items():
        figure, panels = new_figure(len(groups), len(contenders))
        for axes, (size, of_size) in zip(panels, groups.items(), strict=True):
            drawn = []
            ms_per_token = {contender: times.ms_per_token(contender, size) for contender in of_size}
            measured = name == "seconds" and None not in ms_per_token.values()
            for contender, runs in of_size.items():
                curves = [ValidationCurve.of(run) for run in runs]
                if measured:
                    curves = [curve.at_step_time(ms_per_token[contender]) for curve in curves]
                label = f"{contender} ({counted(len(runs), 'seed')})"
                lines = [(getattr(curve, name), curve.losses) for curve in curves]
                drawn.append((label, line_style(contenders.index(contender)), lines))
            xlabel = f"{words}, by the measured time of a step" if measured else words
            axes.set(xlabel=xlabel, ylabel="validation loss, nats per token, mean over seeds", title=size or "")
            axes.grid(alpha=0.3)
            draw_groups(axes, drawn)
        save_png(figure, folder / f"loss_by_{name}.png")
    if any(row["size"] for row in rows):
        _plot_sizes(rows, folder / "iso_flop.png")


def _plot_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, (axes,) = new_figure(num_labels=len(contenders))
    ends = []
    for number, contender in enumerate(contenders):
        own = sorted((row for row in rows if row["contender"] == contender), key=lambda row: row["active_parameters"])
        xs, style = [row["active_parameters"] for row in own], line_style(number)
        perplexities, deviations = zip(*(row["perplexity"] for row in own), strict=True)
        # one seed has no deviation, and so no bar
        axes.errorbar(xs, perplexities, yerr=[one or 0.0 for one in deviations], **style, capsize=3, elinewidth=0.8)
        ends.append((xs[-1], perplexities[-1], contender, style))
    flops = dict.fromkeys(f"{figure(row['training_flops'] for row in rows):.2g}" for figure in (min, max))
    seeds = dict.fromkeys(figure(row["seeds"] for row in rows) for figure in (min, max))
    # the last number says whether the noun is plural
    words = " to ".join([*map(str, list(seeds)[:-1]), counted(list(seeds)[-1], "seed")])
    axes.set_title(f"{' to '.join(flops)} training FLOPs; bars: ± one standard deviation over {words}")
    # A linear axis: on a logarithmic one, the two halves of a bar would differ in length.
    axes.set(xlabel="active parameters", ylabel="validation perplexity", xscale="log")
    axes.grid(alpha=0.3, which="both")
    label_line_ends(axes, ends)
    save_png(figure, path)

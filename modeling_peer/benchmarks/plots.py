# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Plots of how cost grows with the numbers of experts and of tokens."""

from collections.abc import Sequence
from typing import Any

from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png
from modeling_peer.console.tables import counted


def plot_scaling(result: dict[str, Any], path: str) -> None:
    """Draw the longest series of each direction of `result["scaling"]` and write a PNG."""
    scaling = result["scaling"]
    names = list(dict.fromkeys(entry["contender"] for entry in scaling))
    figure, (left, right) = new_figure(2, len(names))
    _draw(left, scaling, names, "num_experts", "num_tokens")
    _draw(right, scaling, names, "num_tokens", "num_experts")
    machine = result["machine"]
    figure.suptitle(f"forward of one layer, {machine.get('gpu') or machine['cpu']}, {result['settings']['dtype']}")
    save_png(figure, path)


def _draw(axes, scaling: list[dict[str, Any]], names: Sequence[str], along: str, fixed: str) -> None:
    entries = [entry for entry in scaling if entry["along"] == along]
    if entries:
        # one series per contender: the one with most sizes, and among those with most tokens or experts
        longest = max(entries, key=lambda entry: (len(entry["sizes"]), entry[fixed]))
        entries = [e for e in entries if all(e[name] == longest[name] for name in (fixed, "hidden_size"))]
        axes.set_title(f"{counted(longest[fixed], _noun(fixed).removesuffix('s'))}, width {longest['hidden_size']:,}")
    ends = []
    for entry in entries:
        style = line_style(names.index(entry["contender"]))  # the same in both plots
        axes.plot(entry["sizes"], entry["microseconds_per_token"], **style)
        ends.append((entry["sizes"][-1], entry["microseconds_per_token"][-1], entry["contender"], style))
    axes.set(xscale="log", yscale="log", xlabel=_noun(along), ylabel="microseconds per token")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_minor_formatter("" if _spans_decades(entries) else "{x:,.10g}")
    axes.grid(alpha=0.3, which="both")
    label_line_ends(axes, ends)


def _spans_decades(entries: list[dict[str, Any]]) -> bool:
    """Whether an axis of the costs has enough powers of ten to need no ticks between them."""
    costs = [cost for entry in entries for cost in entry["microseconds_per_token"]]
    return not costs or max(costs) > 100 * min(costs)


def _noun(name: str) -> str:
    return name.removeprefix("num_")

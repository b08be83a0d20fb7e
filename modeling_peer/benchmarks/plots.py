# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How cost grows with experts and with tokens, as a picture."""

from typing import Any

from matplotlib.figure import Figure


def plot_scaling(result: dict[str, Any], path: str) -> None:
    """Draw the longest series of each direction of `result["scaling"]` and write a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, result["scaling"], "num_experts", "num_tokens", "experts", "tokens")
    _draw(right, result["scaling"], "num_tokens", "num_experts", "tokens", "experts")
    machine = result["machine"]
    figure.suptitle(f"forward of one layer, {machine.get('gpu') or machine['cpu']}, {result['settings']['dtype']}")
    figure.savefig(path, format="png", dpi=150)


def _draw(axes, scaling: list[dict[str, Any]], along: str, fixed: str, words: str, fixed_words: str) -> None:
    entries = [entry for entry in scaling if entry["along"] == along]
    if entries:
        # one series a contender: most sizes, then most tokens or experts
        longest = max(entries, key=lambda entry: (len(entry["sizes"]), entry[fixed]))
        entries = [e for e in entries if all(e[name] == longest[name] for name in (fixed, "hidden_size"))]
        axes.set_title(f"{longest[fixed]:,} {fixed_words}, width {longest['hidden_size']:,}")
    for entry in entries:
        axes.plot(entry["sizes"], entry["microseconds_per_token"], marker="o", label=entry["contender"])
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel="microseconds per token")
    if entries:
        axes.legend()
    axes.grid(alpha=0.3)

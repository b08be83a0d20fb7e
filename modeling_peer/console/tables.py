# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Numbers formatted for tables."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def mean_and_deviation(values: Sequence[float]) -> list[float | None]:
    """Mean and sample standard deviation; None if there are too few values."""
    if not values:
        return [None, None]
    return [round(mean(values), 5), round(stdev(values), 5) if len(values) > 1 else None]


def with_deviation(pair: Sequence[float | None], spec: str) -> str:
    """The result of `mean_and_deviation`, formatted for a table."""
    center, deviation = pair
    if center is None:
        return "-"
    return f"{center:{spec}}" + (f" ± {deviation:{spec.lstrip('+')}}" if deviation is not None else "")


def paired(pair: Sequence[float | None], spec: str, num_pairs: int, num_runs: int) -> str:
    """A mean over pairs of runs, as by `with_deviation`; if some runs have no partner, also the number of pairs."""
    cell = with_deviation(pair, spec)
    return cell if num_pairs in (0, num_runs) else f"{cell} ({counted(num_pairs, 'pair')})"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 seed", "3 seeds"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for the README."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

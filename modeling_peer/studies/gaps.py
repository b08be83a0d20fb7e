# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The gap in validation loss between a contender and the reference: whether it grows, holds or shrinks along a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from modeling_peer.studies.validation_curve import ValidationCurve

# The fit begins at this share of the tokens: a gap that opens in the warm-up does not say where it goes at the end.
FITTED_FROM = 0.5
STANDARD_ERRORS = 2
# Losses of a curve have five decimals. No slope below this one, in nats, can be told from rounding.
ROUNDING = 1e-5
GROWS, HOLDS, SHRINKS, UNKNOWN = "grows", "holds", "shrinks", "unknown"


@dataclass(frozen=True)
class Gap:
    """The line `gap = at_end + slope * log2(tokens / tokens of the whole run)`, fitted by least squares.

    Args:
        pairs: pairs of runs with the same seed. Each has a line, and the numbers are means over them.
        points: evaluations that the line of a pair is fitted to.
        at_end: nats per token at the end; negative if the contender is ahead.
        slope: change of the gap with every doubling of the tokens, nats per token.
        slope_error: standard error of `slope`: over the pairs or, for one pair, by the residuals of its line. None: a
            line through two points has no residuals.
        verdict: "grows" if contender and reference move apart at the end, "shrinks" if they move towards each other,
            "holds" if `slope` is within two standard errors of 0, "unknown" without an error.
    """

    pairs: int
    points: int
    at_end: float
    slope: float
    slope_error: float | None
    verdict: str


def gap_along_the_run(
    contender: Mapping[int, ValidationCurve], reference: Mapping[int, ValidationCurve]
) -> Gap | None:
    """Fit the gap between runs of the same seed over the second half of their tokens, by `FITTED_FROM`.

    Args:
        contender: the curves of its runs, by seed.
        reference: the same for the reference. Where its evaluations are at other tokens, its loss is interpolated.

    Returns:
        None if no pair has two evaluations in the second half.
    """
    lines = [line for seed, curve in contender.items() if seed in reference and (line := _fit(curve, reference[seed]))]
    if not lines:
        return None
    at_end, slope = mean(line.at_end for line in lines), mean(line.slope for line in lines)
    error = lines[0].slope_error
    if len(lines) > 1:
        error = stdev(line.slope for line in lines) / math.sqrt(len(lines))
    points = min(line.points for line in lines)
    numbers = (None if number is None else round(number, 6) for number in (at_end, slope, error))
    return Gap(len(lines), points, *numbers, verdict=_verdict(at_end, slope, error))


@dataclass(frozen=True)
class _Line:
    points: int
    at_end: float
    slope: float
    slope_error: float | None


def _fit(contender: ValidationCurve, reference: ValidationCurve) -> _Line | None:
    """The line of one pair of runs; None if it has fewer than two points."""
    end = min(contender.tokens[-1], reference.tokens[-1])
    begin = max(FITTED_FROM * end, reference.tokens[0])
    fitted = [
        (math.log2(tokens / end), loss - reference.loss_at(tokens))
        for tokens, loss in zip(contender.tokens, contender.losses, strict=True)
        if begin <= tokens <= end
    ]
    if len(fitted) < 2:
        return None
    xs, ys = zip(*fitted, strict=True)
    return _least_squares(xs, ys)


def _least_squares(xs: Sequence[float], ys: Sequence[float]) -> _Line:
    """The line through points with its value at x = 0, and the standard error of its slope by the residuals."""
    center, middle = mean(xs), mean(ys)
    spread = sum((x - center) ** 2 for x in xs)
    slope = sum((x - center) * (y - middle) for x, y in zip(xs, ys, strict=True)) / spread
    at_zero = middle - slope * center
    error = None
    if len(xs) > 2:
        squares = sum((y - at_zero - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
        error = math.sqrt(squares / (len(xs) - 2) / spread)
    return _Line(len(xs), at_zero, slope, error)


def _verdict(at_end: float, slope: float, error: float | None) -> str:
    if error is None:
        return UNKNOWN
    if abs(slope) <= max(STANDARD_ERRORS * error, ROUNDING):
        return HOLDS
    return GROWS if (slope > 0) == (at_end > 0) else SHRINKS

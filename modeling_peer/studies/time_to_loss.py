# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Contenders at equal seconds: the time to the loss that the reference ends with, and the loss at its last second."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from modeling_peer.console.tables import mean_and_deviation
from modeling_peer.studies.validation_curve import ValidationCurve


@dataclass(frozen=True)
class TimeToLoss:
    """Tokens and seconds of training to the final loss of the reference's run with the same seed.

    Mean and standard deviation are over the runs that reach this loss.

    Args:
        pairs: runs whose seed the reference has, too.
        reached: those of them that reach the loss.
        seconds: as the runs recorded them: on a busy machine, or with several runs at a time, they are longer.
        measured_seconds: number of steps times the measured time of a step; [None, None] if it was not measured.
    """

    pairs: int
    reached: int
    tokens: list[float | None]
    seconds: list[float | None]
    measured_seconds: list[float | None]


def time_to_loss(
    contender: Mapping[int, ValidationCurve],
    reference: Mapping[int, ValidationCurve],
    ms_per_token: float | None,
) -> TimeToLoss:
    """When each run of `contender` reaches the final loss of the reference's run with the same seed.

    Args:
        contender: the curves of its runs, by seed.
        reference: the same for the reference. A run reaches its own final loss at its end, or before.
        ms_per_token: measured milliseconds of a training step, divided by its tokens; None: not measured.
    """
    pairs = [(curve, reference[seed].losses[-1]) for seed, curve in contender.items() if seed in reference]
    reached = [(curve, tokens) for curve, loss in pairs if (tokens := curve.tokens_to(loss)) is not None]
    tokens = [tokens for _, tokens in reached]
    measured = [] if ms_per_token is None else [one * ms_per_token / 1000 for one in tokens]
    return TimeToLoss(
        pairs=len(pairs),
        reached=len(reached),
        tokens=mean_and_deviation(tokens),
        seconds=mean_and_deviation([curve.seconds_at(tokens) for curve, tokens in reached]),
        measured_seconds=mean_and_deviation(measured),
    )


def difference_at_equal_time(
    contender: Mapping[int, ValidationCurve],
    reference: Mapping[int, ValidationCurve],
    ms_per_token: float | None,
    reference_ms_per_token: float | None,
) -> list[float | None]:
    """Perplexity of the contender at the second at which the reference ends, paired by seed, by measured steps.

    A contender whose steps take longer is in the middle of its run by then, before its learning rate has fallen. It is
    left out if it has no evaluation yet. One whose steps are shorter is at its end.

    Args:
        contender: the curves of its runs, by seed.
        reference: the same for the reference.
        ms_per_token: measured milliseconds of a training step, divided by its tokens; None: not measured.

    Returns:
        mean and standard deviation over pairs of the difference in percent of the reference's perplexity, on the
        examples of the curves; [None, None] without pairs or measured times.
    """
    if ms_per_token is None or reference_ms_per_token is None:
        return [None, None]
    differences = []
    for seed in contender.keys() & reference.keys():
        curve = contender[seed]
        end = min(reference[seed].tokens[-1] * reference_ms_per_token / ms_per_token, curve.tokens[-1])
        if end >= curve.tokens[0]:
            differences.append(100 * math.expm1(curve.loss_at(end) - reference[seed].losses[-1]))
    return mean_and_deviation(differences)

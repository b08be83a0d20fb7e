# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The validation curve of a run, and values between its points."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class ValidationCurve:
    """What each evaluation of a run found, and what the run had cost until then.

    Between two points, the loss is linear in the logarithm of tokens, and seconds are linear in tokens.

    Args:
        losses: nats per token.
        seconds: of training, evaluation and saving left out.
    """

    tokens: tuple[float, ...]
    training_flops: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, run: dict[str, Any]) -> "ValidationCurve":
        """The curve of one of the runs of `study.json`."""
        points, tokens_per_step = run["curve"], run["tokens"] / run["steps"]
        return cls(
            tuple(point["step"] * tokens_per_step for point in points),
            *(tuple(point[name] for point in points) for name in ("training_flops", "seconds", "loss")),
        )

    def at_step_time(self, ms_per_token: float) -> "ValidationCurve":
        """The same curve, as if each token had taken `ms_per_token` milliseconds of training."""
        return replace(self, seconds=tuple(ms_per_token * tokens / 1000 for tokens in self.tokens))

    def loss_at(self, tokens: float) -> float:
        """The loss after `tokens`, which are between those of the first and of the last point."""
        return _interpolate(math.log(tokens), [math.log(one) for one in self.tokens], self.losses)

    def tokens_to(self, loss: float) -> float | None:
        """The tokens after which the loss first was at most `loss`; None if it never was.

        They are those of the first point if its loss is as low already.
        """
        if self.losses[0] <= loss:
            return self.tokens[0]
        for (before, higher), (after, lower) in pairwise(zip(self.tokens, self.losses, strict=True)):
            if lower <= loss:
                share = (higher - loss) / (higher - lower)
                return before * (after / before) ** share
        return None

    def seconds_at(self, tokens: float) -> float:
        """The seconds of training for `tokens`, at most those of the last point."""
        return _interpolate(tokens, (0.0, *self.tokens), (0.0, *self.seconds))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The value at `x` of the line through the points; outside of the points, that of the nearest one."""
    right = bisect_left(xs, x)
    if right == 0 or right == len(xs):
        return ys[min(right, len(xs) - 1)]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])

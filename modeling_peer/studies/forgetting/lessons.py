# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A lesson: train on new material until enough of it is learned, and watch what happens to the old text."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from modeling_peer.optim import clip_gradients
from modeling_peer.studies.forgetting.material import IGNORED, Material
from modeling_peer.studies.forgetting.methods import Learner

MAX_GRADIENT_NORM = 1.0
WARM_UP_STEPS = 10
SCORED_TOGETHER = 32  # sequences


@dataclass
class Point:
    """The state of a lesson.

    Args:
        step: steps of training so far.
        new: loss on what is scored of the new material, nats per token.
        old: loss on the old text, nats per token.
        answered: share of the questions that are answered; None if the material asks none.
    """

    step: int
    new: float
    old: float
    answered: float | None = None


@dataclass
class Lesson:
    """How a lesson is given.

    Args:
        learning_rate: after a linear warm-up it is constant, because a lesson may end at any step.
        num_steps: at most.
        sequences_per_step: drawn at random, in passes over the material.
        steps_per_point: steps between two evaluations.
        target: the lesson ends when the new loss is at most this. None: it has all steps.
        seed: of the order of sequences.
    """

    learning_rate: float
    num_steps: int
    sequences_per_step: int = 16
    steps_per_point: int = 10
    target: float | None = None
    seed: int = 0

    def give(
        self, learner: Learner, material: Material, old: torch.Tensor, announce: Callable[[Point], None] | None = None
    ) -> list[Point]:
        """Teach the material.

        Args:
            old: sequences of the old text, held out.
            announce: called with each point.

        Returns:
            The curve. It begins before the first step.
        """
        points: list[Point] = []

        def evaluate(step: int) -> None:
            new, answered = score(learner.model, material.held_out, material.labels, material.asks)
            points.append(Point(step, new, score(learner.model, old, old)[0], answered))
            if announce:
                announce(points[-1])

        generator = torch.Generator().manual_seed(self.seed)
        queue = torch.empty(0, dtype=torch.int64)
        evaluate(0)
        with ExitStack() as resources:
            optimizer = learner.begin(material.train, self.learning_rate, resources)
            rates = [group["lr"] for group in optimizer.param_groups]
            for step in range(1, self.num_steps + 1):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, step / WARM_UP_STEPS)
                while len(queue) < self.sequences_per_step:
                    queue = torch.cat([queue, torch.randperm(len(material.train), generator=generator)])
                batch, queue = queue[: self.sequences_per_step], queue[self.sequences_per_step :]
                _train_step(learner.model, optimizer, material.train[batch])
                if step % self.steps_per_point == 0 or step == self.num_steps:
                    evaluate(step)
                    if self.target is not None and points[-1].new <= self.target:
                        break
        return points


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    optimizer.zero_grad()
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    clip_gradients(model, MAX_GRADIENT_NORM)
    optimizer.step()


@torch.no_grad()
def score(
    model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor, asks: bool = False
) -> tuple[float, float | None]:
    """Mean loss per label in nats, and the share of sequences whose labels are all predicted, if it `asks`.

    Args:
        tokens, labels: `(num_sequences, sequence_length)`; a label is predicted at the position before it.
    """
    model.eval()
    total, count, right = 0.0, 0, 0
    for part, wanted in zip(tokens.split(SCORED_TOGETHER), labels.split(SCORED_TOGETHER), strict=True):
        logits, wanted = model(part, use_cache=False).logits[:, :-1].float(), wanted[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((wanted != IGNORED).sum())
        if asks:
            right += int(((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).sum())
    return total / count, right / len(tokens) if asks else None


def at_equal_learning(points: Sequence[Point], target: float) -> Point | None:
    """The curve where the new loss first reaches `target`, interpolated; None if it never does."""
    if points[0].new <= target:
        return points[0]
    for before, after in pairwise(points):
        if after.new <= target:
            share = (before.new - target) / (before.new - after.new)
            return Point(
                **{
                    name: None if value is None else value + share * (getattr(after, name) - value)
                    for name, value in asdict(before).items()
                }
            )
    return None

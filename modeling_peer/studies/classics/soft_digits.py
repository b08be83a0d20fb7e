# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Puigcerver et al. 2023 that compares soft mixtures with dense and sparse ones, on digits.

"From Sparse to Soft Mixtures of Experts" (arXiv:2308.00951), sections 3.3, 3.5 and 3.6. The authors train vision
transformers on 4 billion images. Here a tiny one learns 1,200 images of digits. Models: `tiny_vit.py`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.console.errors import SettingsError, nearest, require, require_at_least_one
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.digit_images import Digits, is_correct, read_digits, split_digits
from modeling_peer.studies.classics.tiny_vit import NUM_HEADS, ROUTINGS, TinyViT

NUM_RUNS = 5
WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 1.0
AUX_LOSS_WEIGHT = 0.01  # of the Switch Transformer
TURN_STEPS = 10  # steps of one contender before the next one's
PROGRESS_SECONDS = 10

# ImageNet, 10 shots, in %: table 2 of the paper, Soft MoE S/14 with 256 experts of one slot each.
PUBLISHED = {
    "dense": 62.3,
    "soft, 16 experts": 74.8,
    "soft / uniform": 72.0,
    "uniform / soft": 71.8,
    "uniform": 70.0,
    "identity": 69.1,
}


@dataclass
class SoftDigitsArguments(ClassicArguments):
    """Soft mixtures on images of digits."""

    contenders: list[str] = field(
        default_factory=lambda: list(ROUTINGS),
        metadata={
            "help": "What to train: dense; top-1 of 4; top-1 of 16; soft, 4 experts; soft, 16 experts; "
            "soft / uniform; uniform / soft; uniform; identity."
        },
    )
    num_steps: int = field(default=600, metadata={"help": "Steps of each run."})
    images_per_step: int = field(default=60, metadata={"help": "Images per step."})
    steps_per_test: int = field(default=50, metadata={"help": "Steps between two tests."})
    num_blocks: int = field(default=2, metadata={"help": "Blocks; the last half of them have the mixture."})
    width: int = field(default=32, metadata={"help": "Width of tokens."})
    inner_width: int = field(default=64, metadata={"help": "Width inside each expert, and inside a dense MLP."})
    top_rate: float = field(
        default=4e-3, metadata={"help": "Learning rate at the end of the warm-up; then 1 / sqrt(step)."}
    )
    warm_up_steps: int = field(default=100, metadata={"help": "Steps until the highest learning rate."})


class Run:
    """One contender of one run: its network, and its curve of accuracy on the test set.

    Contenders of a run have the same images in the same order.
    """

    def __init__(self, contender: str, arguments: SoftDigitsArguments, seed: int):
        self.arguments = arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = TinyViT(ROUTINGS[contender], arguments.num_blocks, arguments.width, arguments.inner_width)
            self.noise = torch.get_rng_state()  # for the jitter of top-1 routing
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), arguments.top_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.queue = torch.empty(0, dtype=torch.int64)
        self.step = 0
        self.seconds = 0.0
        self.turn_milliseconds: list[float] = []  # per step, of each turn
        self.curve: list[dict[str, float]] = []

    def train(self, data: Digits, num_steps: int) -> None:
        """Train for some steps. Time is that of the processor, so that other programs do not count."""
        self.network.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.noise)
            began = time.process_time()
            for _ in range(num_steps):
                self._train_step(data)
            passed = time.process_time() - began
            self.noise = torch.get_rng_state()
        self.seconds += passed
        self.turn_milliseconds.append(1000 * passed / num_steps)

    def _train_step(self, data: Digits) -> None:
        warm_up = max(1, self.arguments.warm_up_steps)
        share = min((self.step + 1) / warm_up, (warm_up / (self.step + 1)) ** 0.5)
        self.optimizer.param_groups[0]["lr"] = self.arguments.top_rate * share
        if len(self.queue) < self.arguments.images_per_step:
            self.queue = torch.cat([self.queue, torch.randperm(len(data.labels), generator=self.generator)])
        batch, self.queue = self.queue.split(
            [self.arguments.images_per_step, len(self.queue) - self.arguments.images_per_step]
        )
        aux_losses = AuxiliaryLosses()
        logits = self.network(data.images[batch], aux_losses)
        loss = cross_entropy(logits, data.labels[batch])
        if aux_losses.total is not None:
            loss = loss + AUX_LOSS_WEIGHT * aux_losses.total
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def test(self, data: Digits) -> None:
        """Add accuracy in % and loss in nats to the curve."""
        self.network.eval()
        logits = self.network(data.images)
        self.curve.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "correct": 100 * float(is_correct(logits, data.labels).float().mean()),
                "loss": float(cross_entropy(logits, data.labels)),
            }
        )


def at_seconds(curve: Sequence[dict[str, float]], seconds: float, name: str) -> float:
    """A curve's value at a time, interpolated between tests. The last one if training took less time."""
    for before, after in pairwise(curve):
        if after["seconds"] >= seconds:
            span = after["seconds"] - before["seconds"]
            share = (seconds - before["seconds"]) / span if span else 1.0
            return before[name] + share * (after[name] - before[name])
    return curve[-1][name]


def run_soft_digits(
    arguments: SoftDigitsArguments, save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train all contenders in turns; print their table beside the published ablations.

    Args:
        save: called after each run with what would be returned if it were the last one.

    Returns:
        `rows`: one per contender, with accuracy and loss after all steps, and at the time that the fastest contender
        of that run needed for them. `curves` of each contender: means over the runs.

    Raises:
        SettingsError: settings are out of range.
        ModuleNotFoundError: scikit-learn is missing.
    """
    _check(arguments)
    digits = read_digits()
    finished: list[dict[str, Run]] = []
    num_runs = arguments.runs(NUM_RUNS)
    for number in range(num_runs):
        finished.append(
            _train_run(f"run {number + 1} of {num_runs}", digits, arguments, 1000 * arguments.seed + number)
        )
        result = _collect(finished)
        if save:
            save(result)
    print(make_table(result["rows"]), flush=True)
    return result


def _check(arguments: SoftDigitsArguments) -> None:
    arguments.runs(NUM_RUNS)
    require_at_least_one(arguments, "num_steps", "images_per_step", "steps_per_test", "num_blocks", "inner_width")
    require(
        arguments.width >= 2 * NUM_HEADS and arguments.width % (2 * NUM_HEADS) == 0,
        "width",
        arguments.width,
        f"a multiple of {2 * NUM_HEADS}",
    )
    require(arguments.top_rate > 0, "top_rate", arguments.top_rate, "more than 0")
    if unknown := [name for name in arguments.contenders if name not in ROUTINGS]:
        raise SettingsError(
            f"--contenders {unknown[0]!r} must be one of {'; '.join(ROUTINGS)}.{nearest(unknown[0], ROUTINGS)}"
        )
    if not arguments.contenders:
        raise SettingsError(f"--contenders needs at least one of {'; '.join(ROUTINGS)}.")


def _train_run(label: str, digits: Digits, arguments: SoftDigitsArguments, seed: int) -> dict[str, Run]:
    train, test = split_digits(digits, seed)
    runs = {name: Run(name, arguments, seed) for name in arguments.contenders}
    notices = Every(PROGRESS_SECONDS)
    for run in runs.values():
        run.test(test)
    step = 0
    while step < arguments.num_steps:
        next_test = (step // arguments.steps_per_test + 1) * arguments.steps_per_test
        target = min(step + TURN_STEPS, next_test, arguments.num_steps)
        for run in runs.values():
            run.train(train, target - step)
            if target in (next_test, arguments.num_steps):
                run.test(test)
        step = target
        if notices.is_due():
            print(f"{label}: step {step:,} of {arguments.num_steps:,}", flush=True)
    words = ", ".join(f"{name} {run.curve[-1]['correct']:.1f} %" for name, run in runs.items())
    print(f"{label}: {words}", flush=True)
    return runs


def _collect(finished: Sequence[dict[str, Run]]) -> dict[str, Any]:
    rows, curves = [], {}
    # of each run: when the fastest contender had finished its steps
    budgets = [min(run.seconds for run in runs.values()) for runs in finished]
    for name in finished[0]:
        own = [runs[name] for runs in finished]
        rows.append(
            {
                "contender": name,
                "parameters": sum(values.numel() for values in own[0].network.parameters()),
                "runs": len(own),
                "steps": own[0].step,
                "milliseconds_per_step": round(median(time for run in own for time in run.turn_milliseconds), 2),
                "seconds": mean_and_deviation([run.seconds for run in own]),
                **{
                    f"test_{key}": mean_and_deviation([run.curve[-1][key] for run in own])
                    for key in ("correct", "loss")
                },
                **{
                    f"{key}_at_equal_seconds": mean_and_deviation(
                        [at_seconds(run.curve, budget, key) for run, budget in zip(own, budgets, strict=True)]
                    )
                    for key in ("correct", "loss")
                },
                "test_correct_by_run": [round(run.curve[-1]["correct"], 3) for run in own],
                "test_loss_by_run": [round(run.curve[-1]["loss"], 5) for run in own],
            }
        )
        curves[name] = [
            {key: round(sum(point[key] for point in points) / len(points), 4) for key in points[0]}
            for points in zip(*(run.curve for run in own), strict=True)
        ]
    return {"seconds_compared": mean_and_deviation(budgets), "rows": rows, "curves": curves}


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table, beside the published ablations."""
    return as_markdown([_printed(row) for row in rows])


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    published = PUBLISHED.get(row["contender"])
    return {
        "MLP of the last half": row["contender"],
        "parameters": row["parameters"],
        "ms per step": f"{row['milliseconds_per_step']:.1f}",
        "equal steps: test %": with_deviation(row["test_correct"], ".2f"),
        "loss": with_deviation(row["test_loss"], ".3f"),
        "equal seconds: test %": with_deviation(row["correct_at_equal_seconds"], ".2f"),
        "loss ": with_deviation(row["loss_at_equal_seconds"], ".3f"),
        "published: ImageNet %": "-" if published is None else f"{published:.1f}",
    }


def plot_soft_digits(result: dict[str, Any], path: str | Path) -> None:
    """Draw loss on the test set over the processor's seconds and over steps.

    Args:
        result: what `run_soft_digits` returns.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    figure, panels = new_figure(2, len(result["curves"]))
    for axes, (key, words) in zip(panels, (("seconds", "seconds of one thread"), ("step", "steps")), strict=True):
        ends = []
        for number, (name, curve) in enumerate(result["curves"].items()):
            style = line_style(number)
            points = curve[1:] or curve  # the start is far above
            axes.plot([point[key] for point in points], [point["loss"] for point in points], **style)
            ends.append((points[-1][key], points[-1]["loss"], name, style))
        axes.set_yscale("log")
        axes.set(xlabel=words, ylabel="loss on the test set, nats, mean over runs")
        axes.grid(alpha=0.3, which="both")
        label_line_ends(axes, ends)
    save_png(figure, path)

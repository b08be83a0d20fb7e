# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Oldfield et al. 2024 in which experts of a multilinear layer specialise in classes, on digits.

"Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization" (arXiv:2402.12550), section 4.1.
The authors replace the last layer of CLIP ViT-B-32 by a multilinear mixture of as many parameters and fine-tune all on
ImageNet. Then they remove one expert after the other, and look at which classes lose accuracy. Here the network under
that layer is one hidden layer, trained from the start, and the images are digits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, one_hot

from modeling_peer.console.errors import SettingsError, require, require_at_least_one
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.multilinear_moe_peer import PeerCPLinear, PeerTensorRingLinear, entmax15
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.digit_images import (
    IMAGE_SIDE,
    NUM_CLASSES,
    Digits,
    is_correct,
    read_digits,
    split_digits,
)

NUM_RUNS = 5
FORMS = ("cp", "tensor_ring")
OUTER_RANK = 4  # of the two smaller ranks of a tensor ring, as in the authors' code
WEIGHT_DECAY, MAX_GRADIENT_NORM, WARMUP_SHARE = 0.1, 1.0, 0.1  # the first two are the authors'
NUM_SHUFFLES = 20
PROGRESS_SECONDS = 10


@dataclass
class MultilinearDigitsArguments(ClassicArguments):
    """Multilinear mixtures on images of digits."""

    expert_counts: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128], metadata={"help": "Numbers of experts, one network for each."}
    )
    forms: list[str] = field(
        default_factory=lambda: list(FORMS), metadata={"help": "How experts are factorised: cp, tensor_ring."}
    )
    num_parameters: int = field(
        default=20000, metadata={"help": "Parameters of each network, about; ranks are chosen for it."}
    )
    num_features: int = field(default=32, metadata={"help": "Units of the hidden layer below the mixture."})
    num_epochs: int = field(default=30, metadata={"help": "Passes over the 1,200 images for training."})
    batch_size: int = field(default=100, metadata={"help": "Images per step."})
    peak_rate: float = field(default=0.01, metadata={"help": "Highest learning rate, after the warm-up."})
    drawn_experts: int = field(
        default=16, metadata={"help": "The number of experts whose removals are written and drawn, one by one."}
    )


class DenseNetwork(nn.Module):
    """One hidden layer with a GELU."""

    def __init__(self, num_features: int):
        super().__init__()
        self.features = nn.Linear(IMAGE_SIDE**2, num_features)
        self.last = nn.Linear(num_features, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """`(n, 64)` to logits, `(n, 10)`."""
        return self.last(gelu(self.features(images)))


class MultilinearNetwork(nn.Module):
    """One hidden layer with a GELU, and a multilinear mixture of experts in place of the last layer.

    Its coefficients are entmax of logits that go through BatchNorm without parameters, as in the authors' networks for
    images. (The layer of this package that stands in language models has LayerNorm there.)
    """

    def __init__(self, form: str, num_experts: int, num_features: int, rank: int):
        super().__init__()
        self.features = nn.Linear(IMAGE_SIDE**2, num_features)
        self.gating = nn.Parameter(torch.zeros(num_features, num_experts))
        self.norm = nn.BatchNorm1d(num_experts, affine=False)
        if form == "cp":
            self.last = PeerCPLinear(num_experts, num_features, NUM_CLASSES, [rank])
        else:
            self.last = PeerTensorRingLinear(num_experts, num_features, NUM_CLASSES, [OUTER_RANK, OUTER_RANK, rank])
        self.last.reset_parameters()

    def gate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, `(n, num_features)`, and coefficients of all experts, `(n, num_experts)`."""
        features = gelu(self.features(images))
        return features, entmax15(self.norm(features @ self.gating))

    def forward(self, images: Tensor) -> Tensor:
        """`(n, 64)` to logits, `(n, 10)`."""
        return self.last(*self.gate(images))


def choose_rank(form: str, num_experts: int, arguments: MultilinearDigitsArguments) -> int:
    """The rank with which the whole network has about `num_parameters`; below 1 if experts alone need more."""
    features = arguments.num_features
    left = arguments.num_parameters - (IMAGE_SIDE**2 + 1) * features - features * num_experts
    if form == "cp":
        return round(left / (num_experts + features + 1 + NUM_CLASSES))
    return round((left - OUTER_RANK**2 * num_experts) / (OUTER_RANK * (features + 1 + NUM_CLASSES)))


def train_network(
    network: nn.Module,
    train: Digits,
    arguments: MultilinearDigitsArguments,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    """Train with AdamW, with a warm-up and a cosine decay, and leave the network in evaluation mode.

    Args:
        progress: called with each epoch.
    """
    optimizer = torch.optim.AdamW(network.parameters(), arguments.peak_rate, weight_decay=WEIGHT_DECAY, fused=True)
    batch_size = min(arguments.batch_size, len(train.labels))
    num_steps = arguments.num_epochs * (len(train.labels) // batch_size)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    step = 0
    for epoch in range(arguments.num_epochs):
        progress(epoch)
        order = torch.randperm(len(train.labels), generator=generator)
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            warm_up = max(1, round(WARMUP_SHARE * num_steps))
            decay = (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.param_groups[0]["lr"] = arguments.peak_rate * min((step + 1) / warm_up, decay)
            loss = cross_entropy(network(train.images[batch]), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            step += 1
    network.eval()


@torch.no_grad()
def remove_experts(network: MultilinearNetwork, test: Digits) -> tuple[Tensor, Tensor]:
    """Set the matrix of one expert after the other to 0, which is the same as its coefficient.

    Returns:
        correct, `(n,)`, with all experts, and `(num_experts, n)`, without each.
    """
    features, coefficients = network.gate(test.images)
    without = []
    for expert in range(coefficients.shape[1]):
        kept = coefficients.clone()
        kept[:, expert] = 0
        without.append(is_correct(network.last(features, kept), test.labels))
    return is_correct(network.last(features, coefficients), test.labels), torch.stack(without)


def class_changes(correct: Tensor, without: Tensor, labels: Tensor) -> Tensor:
    """Change of each class's accuracy by each removal, from -1 to 1: `(num_experts, classes)`."""
    members = one_hot(labels, NUM_CLASSES).float()
    return (without.float() - correct.float()) @ members / members.sum(0).clamp(min=1)


def polysemanticity(changes: Tensor) -> Tensor:
    """Distance of the changes of accuracies, with length 1, from the nearest vector with a single 1.

    It is 0 if the removal of the expert changes a single class. If it changes all ten equally, it is 1.17. Experts
    whose removal changes nothing are left out.

    Args:
        changes: as by `class_changes`.

    Returns:
        `(number of experts whose removal changes something,)`.
    """
    sizes = changes.abs()
    sizes = sizes[sizes.sum(1) > 0]
    # |u - e|² = 2 - 2 u·e for vectors of length 1
    return (2 - 2 * sizes.amax(1) / sizes.norm(dim=1)).clamp(min=0).sqrt()


def class_share(coefficients: Tensor, labels: Tensor) -> float:
    """Share of the coefficients of an expert that go to its first class, weighted by what each expert gets in all.

    1: each expert serves a single class. Above 0.1, as classes are about as frequent: gates that ignore classes.
    """
    by_class = coefficients.T @ one_hot(labels, NUM_CLASSES).to(coefficients.dtype)  # (experts, classes)
    return float(by_class.amax(1).sum() / by_class.sum())


def run_multilinear_digits(
    arguments: MultilinearDigitsArguments, save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train dense networks and mixtures, remove each expert by itself, and print the table.

    Args:
        save: called after each row with what would be returned if it were the last one.

    Returns:
        `rows`: one per network. `removals`: of each form, for the first run with `drawn_experts` experts, accuracy by
        class in %, and its change by the removal of each expert, in points.

    Raises:
        SettingsError: settings are out of range.
        ModuleNotFoundError: scikit-learn is missing.
    """
    _check(arguments)
    digits = read_digits()
    equal = round((arguments.num_parameters - NUM_CLASSES) / (IMAGE_SIDE**2 + 1 + NUM_CLASSES))
    result: dict[str, Any] = {"rows": [], "removals": {}}
    kinds: list[tuple[str, int]] = [("dense", arguments.num_features), ("dense", equal)]
    kinds += [(form, number) for form in arguments.forms for number in arguments.expert_counts]
    for kind, number in kinds:
        row, removals = _run_network(kind, number, digits, arguments)
        result["rows"].append(row)
        if removals:
            result["removals"][kind] = removals
        if save:
            save(result)
    print(make_table(result["rows"]), flush=True)
    for form, removals in result["removals"].items():
        print(f"\n{form}, {arguments.drawn_experts} experts, first run:\n{make_removal_table(removals)}", flush=True)
    return result


def _check(arguments: MultilinearDigitsArguments) -> None:
    arguments.runs(NUM_RUNS)
    require_at_least_one(arguments, "num_features", "num_epochs")
    require(arguments.batch_size >= 2, "batch_size", arguments.batch_size, "at least 2, for BatchNorm")
    require(arguments.peak_rate > 0, "peak_rate", arguments.peak_rate, "more than 0")
    if unknown := [form for form in arguments.forms if form not in FORMS]:
        raise SettingsError(f"--forms {unknown[0]!r} must be one of {', '.join(FORMS)}.")
    for words in ("forms", "expert_counts"):
        if not getattr(arguments, words):
            raise SettingsError(f"--{words} needs at least one.")
    for number in arguments.expert_counts:
        require(number >= 2, "expert_counts", number, "at least 2")
        if small := [form for form in arguments.forms if choose_rank(form, number, arguments) < 1]:
            raise SettingsError(
                f"--num_parameters ({arguments.num_parameters}) are too few for {number} experts, form {small[0]}: no "
                "rank is left. Raise it, or lower --expert_counts."
            )


def _new_network(kind: str, number: int, arguments: MultilinearDigitsArguments, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dense":
            return DenseNetwork(number)
        return MultilinearNetwork(kind, number, arguments.num_features, choose_rank(kind, number, arguments))


def _run_network(
    kind: str, number: int, digits: Digits, arguments: MultilinearDigitsArguments
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    num_runs = arguments.runs(NUM_RUNS)
    label = f"dense, {number} hidden units" if kind == "dense" else f"{kind}, {number} experts"
    accuracies, removals, network = [], None, None
    measured: dict[str, list[float]] = {}
    for run in range(num_runs):
        seed = 1000 * arguments.seed + run
        train, test = split_digits(digits, seed)
        network = _new_network(kind, number, arguments, seed)
        notices = Every(PROGRESS_SECONDS)

        def progress(epoch: int, words=f"{label}, run {run + 1} of {num_runs}", notices=notices):
            if notices.is_due():
                print(f"{words}: epoch {epoch + 1}", flush=True)

        train_network(network, train, arguments, seed, progress)
        with torch.no_grad():
            accuracies.append(100 * float(is_correct(network(test.images), test.labels).float().mean()))
        if kind != "dense":
            figures, changes, by_class = _measure(network, test, seed)
            for name, value in figures.items():
                measured.setdefault(name, []).append(value)
            if number == arguments.drawn_experts and run == 0:
                removals = {
                    "correct": [round(100 * value, 2) for value in by_class.tolist()],
                    "changes": [[round(100 * value, 2) for value in row] for row in changes.tolist()],
                }
    row: dict[str, Any] = {
        "model": kind,
        "experts" if kind != "dense" else "hidden_units": number,
        "parameters": sum(values.numel() for values in network.parameters()),
        "runs": num_runs,
        "test_correct": mean_and_deviation(accuracies),
        "test_correct_by_run": [round(value, 3) for value in accuracies],
    }
    if kind != "dense":
        row["rank"] = choose_rank(kind, number, arguments)
        row |= {
            name: mean_and_deviation([value for value in values if value is not None])
            for name, values in measured.items()
        }
    print(f"{label}: {with_deviation(row['test_correct'], '.2f')} % of {num_runs} runs", flush=True)
    return row, removals


@torch.no_grad()
def _measure(network: MultilinearNetwork, test: Digits, seed: int) -> tuple[dict[str, float | None], Tensor, Tensor]:
    """Figures of one run, changes of accuracies by class, and the accuracies with all experts, `(classes,)`."""
    correct, without = remove_experts(network, test)
    _, coefficients = network.gate(test.images)
    changes = class_changes(correct, without, test.labels)
    own = polysemanticity(changes)
    # The same images under shuffled labels: what few images per expert give by themselves.
    generator = torch.Generator().manual_seed(seed)
    blind, blind_shares = [], []
    for _ in range(NUM_SHUFFLES):
        labels = test.labels[torch.randperm(len(test.labels), generator=generator)]
        blind += polysemanticity(class_changes(correct, without, labels)).tolist()
        blind_shares.append(class_share(coefficients, labels))
    sizes = changes.abs()
    hit = sizes.amax(1)
    figures = {
        "polysemanticity": float(own.mean()) if len(own) else None,
        "polysemanticity_shuffled": mean(blind) if blind else None,
        "experts_that_matter": float(len(own)),
        "class_share": class_share(coefficients, test.labels),
        "class_share_shuffled": mean(blind_shares),
        # of the expert that costs its first class most: points lost there, and in all other classes on average
        "worst_class_change": 100 * float(hit.max()),
        "other_classes_change": 100 * float((sizes[hit.argmax()].sum() - hit.max()) / (NUM_CLASSES - 1)),
        "active_experts": float((coefficients > 0).float().sum(1).mean()),
    }
    by_class = class_changes(torch.zeros_like(correct), correct[None], test.labels)[0]
    return figures, changes, by_class


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table. The paper has curves in place of one."""
    return as_markdown([_printed(row) for row in rows])


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    mixture = row["model"] != "dense"
    size = f"{row['experts']} experts" if mixture else f"{row['hidden_units']} hidden units"

    def cell(key: str, spec: str) -> str:
        return with_deviation(row[key], spec) if mixture else "-"

    return {
        "network": f"{row['model']}, {size}",
        "parameters": row["parameters"],
        "test %": with_deviation(row["test_correct"], ".2f"),
        "polysemanticity": cell("polysemanticity", ".2f"),
        "labels shuffled": cell("polysemanticity_shuffled", ".2f"),
        "class share": cell("class_share", ".2f"),
        "labels shuffled ": cell("class_share_shuffled", ".2f"),
        "experts that matter": cell("experts_that_matter", ".1f"),
        "active per image": cell("active_experts", ".1f"),
    }


def make_removal_table(removals: dict[str, Any]) -> str:
    """Accuracy by digit with all experts, and without the one that costs a class most, as a Markdown table."""
    worst = min(removals["changes"], key=min)
    expert = removals["changes"].index(worst)
    with_all = removals["correct"]
    after = [before + change for before, change in zip(with_all, worst, strict=True)]
    rows = [("all experts", with_all), (f"without expert {expert}", after)]
    return as_markdown(
        [
            {"accuracy by digit, %": words, **{str(digit): f"{value:.0f}" for digit, value in enumerate(values)}}
            for words, values in rows
        ]
    )


def plot_multilinear_digits(result: dict[str, Any], path: str | Path) -> None:
    """Draw polysemanticity and accuracy over the number of experts, and the classes that each removal changes.

    Args:
        result: what `run_multilinear_digits` returns.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    by_form: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["model"] != "dense":
            by_form.setdefault(row["model"], []).append(row)
    figure, panels = new_figure(2 + bool(result["removals"]), 2 * len(by_form))
    keys = {"polysemanticity": "{}", "polysemanticity_shuffled": "{}, labels shuffled"}
    drawn = [("polysemanticity, mean over runs", keys), ("test accuracy, %", {"test_correct": "{}"})]
    for axes, (words, lines) in zip(panels, drawn, strict=False):
        ends = []
        for number, (form, rows) in enumerate(by_form.items()):
            for place, (key, text) in enumerate(lines.items()):
                known = [(row["experts"], *row[key]) for row in rows if row[key][0] is not None]
                if not known:
                    continue
                style = line_style(2 * number + place)
                xs, centers, deviations = zip(*known, strict=True)
                axes.errorbar(xs, centers, [value or 0 for value in deviations], capsize=2, **style)
                ends.append((xs[-1], centers[-1], text.format(form), style))
        counts = sorted({row["experts"] for rows in by_form.values() for row in rows})
        if "test_correct" in lines:
            dense = [row for row in result["rows"] if row["model"] == "dense"]
            for number, row in enumerate(dense):
                style = line_style(4 + number)
                height = row["test_correct"][0]
                axes.plot([counts[0], counts[-1]], [height] * 2, **style)
                ends.append((counts[-1], height, f"dense, {row['parameters']:,} parameters", style))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="experts", ylabel=words)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.grid(alpha=0.3)
        label_line_ends(axes, ends)
    for form, removals in list(result["removals"].items())[:1]:
        axes = panels[-1]
        image = axes.imshow(removals["changes"], cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
        axes.set(title=f"{form}, each expert removed by itself", xlabel="digit", ylabel="removed expert")
        axes.set_xticks(range(NUM_CLASSES))
        figure.colorbar(image, ax=axes, label="change of accuracy, points, first run")
    figure.suptitle(
        "Polysemanticity 0: the removal of an expert changes the accuracy of one digit. Bars: standard deviation.",
        fontsize="small",
    )
    save_png(figure, path)

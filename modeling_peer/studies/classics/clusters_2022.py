# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Chen, Deng, Wu, Gu & Li 2022, in which a mixture of nonlinear experts finds clusters.

"Towards Understanding the Mixture-of-Experts Layer in Deep Learning" (arXiv:2208.02813). Training is that of the
authors' notebooks (github.com/uclaml/MoE, synthetic_demo_s1.ipynb to s4). Data and models: `cluster_mixture.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from modeling_peer.console.errors import SettingsError, require_at_least_one
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.cluster_mixture import (
    NUM_CLASSES,
    NUM_CLUSTERS,
    Examples,
    Model,
    Setting,
    accuracy,
    count_dispatched,
    dispatch_entropy,
    draw_basis,
    draw_examples,
    expert_outputs,
    new_model,
    route,
    routing_noise,
)

# The starting weights of a mixture, as a part of PyTorch's default for a convolution.
SMALL_START = 1e-3
EXPERT_RATE, ROUTER_RATE = 1e-3, 0.1
SINGLE_RATE = {"linear": 3e-3, "cubic": 1e-2}
SINGLE_WEIGHT_DECAY = 5e-4
# As in the authors' code, the loss applies a softmax to the probabilities of a softmax: it is at least 0.3133.
STOP_LOSS, STOP_RISE, SINGLE_MIN_EPOCHS = 0.314, 0.02, 500
NUM_RUNS = 10
PROGRESS_SECONDS = 10


SETTINGS = {1: Setting(3.0, 1.0), 2: Setting(3.0, 2.0), 3: Setting(2.0, 1.0), 4: Setting(2.0, 2.0)}

# What the authors' notebooks print: accuracy on the test set in %, and dispatch entropy, mean and deviation (divided
# by n, not n - 1) over 10 runs. Single networks: one run for each number of filters.
PUBLISHED = {
    (1, "single linear"): {80: 68.3, 128: 70.9, 512: 68.9},
    (1, "single cubic"): {80: 79.6, 128: 78.5, 512: 72.6},
    (1, "mixture linear"): ((93.0, 2.11), (1.300, 0.044)),
    (1, "mixture cubic"): ((99.46, 0.55), (0.098, 0.088)),
    (2, "single linear"): {80: 68.2, 128: 69.6, 512: 63.0},
    (2, "single cubic"): {80: 77.4, 128: 74.0, 512: 52.1},
    (2, "mixture linear"): ((89.49, 1.35), (1.262, 0.095)),
    (2, "mixture cubic"): ((98.1, 1.56), (0.183, 0.144)),
    (3, "single linear"): {80: 74.3, 128: 74.8, 512: 74.5},
    (3, "single cubic"): {80: 73.7, 128: 72.7, 512: 67.8},
    (3, "mixture linear"): ((95.93, 1.34), (1.160, 0.100)),
    (3, "mixture cubic"): ((99.99, 0.02), (0.008, 0.011)),
    (4, "single linear"): {80: 74.3, 128: 74.6, 512: 73.0},
    (4, "single cubic"): {80: 70.3, 128: 68.6, 512: 61.7},
    (4, "mixture linear"): ((93.3, 1.48), (1.160, 0.155)),
    (4, "mixture cubic"): ((98.92, 1.18), (0.089, 0.120)),
}
# The last two are not in the paper's table: they take away what could keep experts apart.
MIXTURES = ("linear", "cubic", "cubic, no routing noise", "cubic, equal start")
GATES = ("logit", "softmax")
USED_SHARE = 0.01  # of all examples, from which on an expert counts as in use


@dataclass
class ClusterArguments(ClassicArguments):
    """The cluster data of 2022."""

    settings: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4], metadata={"help": "Settings of the data, 1 to 4."}
    )
    mixtures: list[str] = field(
        default_factory=lambda: ["linear", "cubic"],
        metadata={
            "help": "Mixtures to train: linear, cubic, and two that the paper does not have, 'cubic, no routing "
            "noise' and 'cubic, equal start'."
        },
    )
    num_examples: int = field(default=16000, metadata={"help": "Examples for training, and as many for testing."})
    num_experts: int = field(default=8, metadata={"help": "Experts of a mixture."})
    filters_per_class: int = field(default=8, metadata={"help": "Filters of each expert for each class."})
    num_epochs: int = field(default=501, metadata={"help": "Most updates of a mixture, each on all examples."})
    single_filters: list[int] = field(
        default_factory=lambda: [128], metadata={"help": "Filters of single networks, one run for each number."}
    )
    single_epochs: int = field(
        default=801, metadata={"help": "Most updates of a single network. 0: no single networks."}
    )
    gate: str = field(
        default="logit",
        metadata={
            "help": "What multiplies the expert's output: logit, its routing score with the noise, as in the authors' "
            "code; or softmax, its probability, as in the paper."
        },
    )


def train_mixture(
    kind: str, train: Examples, arguments: ClusterArguments, seed: int, progress: Callable[[int, float], None]
) -> tuple[Model, list[float], list[list[int]]]:
    """Train one mixture: gradient descent with normalized gradients for the experts, plain for the router.

    Args:
        kind: one of `MIXTURES`.
        progress: called with the epoch and the loss.

    Returns:
        model, dispatch entropy at each epoch, and the examples of each cluster sent to each expert at the last one.
    """
    generator = torch.Generator().manual_seed(seed)
    cubic = kind.startswith("cubic")
    model = new_model(arguments.num_experts, arguments.filters_per_class, SMALL_START, generator)
    if kind == "cubic, equal start":
        model = Model(*(values[:1].expand_as(values).clone() for values in model[:2]), model.router)
    sums = train.patches().sum(1)
    # without routing noise, a constant that is far smaller breaks the ties of the start, as in the authors' code
    ties = 1e-5 * torch.randn(len(sums), arguments.num_experts, generator=generator, dtype=torch.float64)
    entropies, lowest = [], math.inf
    for epoch in range(arguments.num_epochs):
        for values in model:
            values.requires_grad_()
        noise = ties if "no routing noise" in kind else routing_noise(ties.shape, generator)
        gates, experts = route(model, sums, noise, arguments.gate)
        outputs = gates[:, None] * expert_outputs(model, train, sums, experts, cubic)
        loss = cross_entropy(outputs.softmax(1), train.labels)
        entropies.append(dispatch_entropy(train.clusters, experts, arguments.num_experts))
        progress(epoch, float(loss.detach()))
        if loss <= lowest:
            lowest = float(loss.detach())
        elif loss > lowest + STOP_RISE or loss <= STOP_LOSS:
            break
        weights, biases, router = torch.autograd.grad(loss, model)
        with torch.no_grad():
            norms = weights.flatten(1).norm(dim=1) + biases.flatten(1).norm(dim=1)
            rates = (EXPERT_RATE / norms.where(norms > 0, 1.0))[:, None, None]
            model = Model(
                model.weights - rates[..., None] * weights,
                model.biases - rates * biases,
                model.router - ROUTER_RATE * router,
            )
    counts = count_dispatched(train.clusters, experts, arguments.num_experts).tolist()
    return Model(*(values.detach() for values in model)), entropies, counts


def train_single(
    kind: str, num_filters: int, train: Examples, num_epochs: int, seed: int, progress: Callable[[int, float], None]
) -> Model:
    """Train one network without a router, by Adam. `kind`: linear or cubic. Other arguments as in `train_mixture`."""
    model = new_model(1, num_filters // NUM_CLASSES, 1.0, torch.Generator().manual_seed(seed))
    parameters = [values.requires_grad_() for values in model[:2]]
    optimizer = torch.optim.Adam(parameters, lr=SINGLE_RATE[kind], weight_decay=SINGLE_WEIGHT_DECAY)
    sums, experts = train.patches().sum(1), torch.zeros_like(train.labels)
    lowest = math.inf
    for epoch in range(num_epochs):
        loss = cross_entropy(expert_outputs(model, train, sums, experts, kind == "cubic"), train.labels)
        progress(epoch, float(loss.detach()))
        if loss <= lowest:
            lowest = float(loss.detach())
        elif epoch > SINGLE_MIN_EPOCHS and loss > lowest + STOP_RISE:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Model(*(values.detach() for values in parameters), None)


def run_clusters(arguments: ClusterArguments, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train single networks and mixtures on each setting; print their table beside the published one.

    Args:
        save: called after each setting with what would be returned if it were the last one.

    Returns:
        `rows`: one per setting and model. `entropies` of each setting and mixture: dispatch entropy by epoch, mean
        over the runs, where a run that stopped keeps its last. `dispatch`: examples by cluster and expert, of the
        first run.

    Raises:
        SettingsError: settings are out of range.
    """
    _check(arguments)
    rows, entropies, dispatch = [], {}, {}
    for setting in arguments.settings:
        # the same clusters, examples and starts whichever settings are asked for
        generator = torch.Generator().manual_seed(1000 * arguments.seed + setting)
        basis = draw_basis(generator)
        train, test = (
            draw_examples(SETTINGS[setting], arguments.num_examples, basis, generator) for _ in ("train", "test")
        )
        rows += [
            _run_single(setting, kind, number, train, test, arguments)
            for kind in SINGLE_RATE
            for number in arguments.single_filters
            if arguments.single_epochs > 0
        ]
        for kind in arguments.mixtures:
            row, curve, counts = _run_mixtures(setting, kind, train, test, arguments)
            rows.append(row)
            entropies[f"{setting} {kind}"], dispatch[f"{setting} {kind}"] = curve, counts
        print(make_table([row for row in rows if row["setting"] == setting]), flush=True)
        result = {"rows": rows, "entropies": entropies, "dispatch": dispatch}
        if save:
            save(result)
    return result


def _check(arguments: ClusterArguments) -> None:
    arguments.runs(NUM_RUNS)
    require_at_least_one(arguments, "num_epochs", "num_examples", "filters_per_class")
    if not arguments.settings:
        raise SettingsError("--settings needs at least one of 1, 2, 3, 4.")
    if arguments.num_experts < 2:
        raise SettingsError(
            f"--num_experts ({arguments.num_experts}) must be at least 2; single networks train anyway."
        )
    for name, known in (("settings", SETTINGS), ("mixtures", MIXTURES)):
        if unknown := [value for value in getattr(arguments, name) if value not in known]:
            raise SettingsError(f"--{name} {unknown[0]!r} must be one of {', '.join(map(str, known))}.")
    if odd := [number for number in arguments.single_filters if number < 2 or number % NUM_CLASSES]:
        raise SettingsError(f"--single_filters ({odd[0]}) must be even and at least 2: half of them for each class.")
    if arguments.gate not in GATES:
        raise SettingsError(f"--gate {arguments.gate!r} must be one of {', '.join(GATES)}.")


def _run_single(
    setting: int, kind: str, num_filters: int, train: Examples, test: Examples, arguments: ClusterArguments
) -> dict[str, Any]:
    label = f"setting {setting}, single {kind}, {num_filters} filters"
    progress = _Progress(label)
    model = train_single(kind, num_filters, train, arguments.single_epochs, arguments.seed, progress)
    accuracies = {
        f"{name}_correct": [round(accuracy(model, part, kind == "cubic"), 3), None]
        for name, part in (("train", train), ("test", test))
    }
    print(f"{label}: {accuracies['test_correct'][0]:.2f} % after {progress.epochs} epochs", flush=True)
    return {"setting": setting, "model": f"single {kind}", "filters": num_filters, "runs": 1, **accuracies}


def _run_mixtures(
    setting: int, kind: str, train: Examples, test: Examples, arguments: ClusterArguments
) -> tuple[dict[str, Any], list[float], list[list[int]]]:
    noisy, quiet, last, epochs, curves, used, dispatch = [], [], [], [], [], [], []
    cubic, num_runs = kind.startswith("cubic"), arguments.runs(NUM_RUNS)
    for run in range(num_runs):
        label = f"setting {setting}, mixture {kind}, run {run + 1} of {num_runs}"
        progress = _Progress(label)
        seed = 1000 * arguments.seed + run
        model, entropies, counts = train_mixture(kind, train, arguments, seed, progress)
        noise = routing_noise((len(test.labels), arguments.num_experts), torch.Generator().manual_seed(seed))
        quiet.append(accuracy(model, test, cubic, arguments.gate))
        # the authors' test routes with noise, as training does
        noisy.append(quiet[-1] if "no routing noise" in kind else accuracy(model, test, cubic, arguments.gate, noise))
        sent = [sum(column) / len(train.labels) for column in zip(*counts, strict=True)]
        used.append(sum(share > USED_SHARE for share in sent))
        last.append(entropies[-1])
        epochs.append(progress.epochs)
        curves.append(entropies + entropies[-1:] * (arguments.num_epochs - len(entropies)))
        dispatch = dispatch or counts
        print(f"{label}: {noisy[-1]:.2f} %, entropy {last[-1]:.3f}, {progress.epochs} epochs", flush=True)
    row = {
        "setting": setting,
        "model": f"mixture {kind}",
        "filters": arguments.num_experts * NUM_CLASSES * arguments.filters_per_class,
        "runs": num_runs,
        "test_correct": mean_and_deviation(noisy),
        "test_correct_without_noise": mean_and_deviation(quiet),
        "entropy": mean_and_deviation(last),
        "epochs": mean_and_deviation(epochs),
        "used_experts": used,
        "test_correct_by_run": [round(value, 3) for value in noisy],
        "entropy_by_run": [round(value, 4) for value in last],
    }
    curve = [round(sum(values) / len(values), 4) for values in zip(*curves, strict=True)]
    return row, curve, dispatch


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table, beside the published ones."""
    return as_markdown([_printed(row) for row in rows])


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    published = PUBLISHED.get((row["setting"], row["model"]))
    if row["model"].startswith("single"):
        number = (published or {}).get(row["filters"])
        accuracy_there, entropy_there = "-" if number is None else f"{number:.1f}", "-"
    else:
        accuracy_there, entropy_there = (
            (with_deviation(published[0], ".2f"), with_deviation(published[1], ".3f")) if published else ("-", "-")
        )
    used = row.get("used_experts")
    return {
        "setting, model": f"{row['setting']}, {row['model']} ({row['filters']} filters)",
        "test %": with_deviation(row["test_correct"], ".2f"),
        "without noise %": with_deviation(row["test_correct_without_noise"], ".2f") if used else "-",
        "dispatch entropy": with_deviation(row["entropy"], ".3f") if used else "-",
        "experts in use": f"{min(used)} to {max(used)}" if used else "-",
        "published: test %": accuracy_there,
        "dispatch entropy ": entropy_there,
    }


class _Progress:
    """Counts epochs, and prints how far training is, every few seconds."""

    def __init__(self, label: str):
        self.label, self.notices, self.epochs = label, Every(PROGRESS_SECONDS), 0

    def __call__(self, epoch: int, loss: float) -> None:
        self.epochs = epoch + 1
        if self.notices.is_due():
            print(f"{self.label}: epoch {self.epochs:,}, loss {loss:.3f}", flush=True)


def plot_clusters(result: dict[str, Any], path: str | Path) -> None:
    """Draw dispatch entropy over training: one panel per setting.

    Args:
        result: what `run_clusters` returns.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    by_setting: dict[str, dict[str, list[float]]] = {}
    for name, curve in result["entropies"].items():
        setting, _, kind = name.partition(" ")
        by_setting.setdefault(setting, {})[kind] = curve
    figure, panels = new_figure(len(by_setting), max(map(len, by_setting.values())))
    for axes, (setting, curves) in zip(panels, by_setting.items(), strict=True):
        ends = []
        for kind, curve in curves.items():
            style = line_style(MIXTURES.index(kind))
            axes.plot(range(len(curve)), curve, **style, markevery=max(1, len(curve) // 8))
            ends.append((len(curve) - 1, curve[-1], kind, style))
        axes.axhline(math.log(NUM_CLUSTERS), color="gray", linewidth=0.7)
        axes.set(title=f"setting {setting}", xlabel="epoch", ylabel="dispatch entropy, nats, mean over runs")
        axes.set_ylim(-0.05, 1.1 * math.log(NUM_CLUSTERS))
        axes.grid(alpha=0.3)
        label_line_ends(axes, ends)
    figure.suptitle(
        "Gray line: ln 4, a router that ignores clusters. 0: each expert is sent one cluster.", fontsize="small"
    )
    save_png(figure, path)

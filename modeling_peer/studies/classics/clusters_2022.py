# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The cluster data of Chen, Deng, Wu, Gu & Li 2022, where a mixture of nonlinear experts finds clusters.

"Towards Understanding the Mixture-of-Experts Layer in Deep Learning" (arXiv:2208.02813), definition 3.1. Sizes, ranges
and training are those of the authors' notebooks (github.com/uclaml/MoE, synthetic_demo_s1.ipynb to s4). Each example
has four patches, in any order: a feature of its cluster, whose sign is the label; the center of its cluster; a feature
of another cluster, with a random sign; noise.

Shapes: n examples, d numbers per patch, k clusters, m experts, j filters per class and expert.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from modeling_peer.console.errors import SettingsError, require_at_least_one
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.studies.classics.arguments import ClassicArguments

NUM_CLUSTERS, PATCH_SIZE, NUM_PATCHES, NUM_CLASSES = 4, 50, 4, 2
# The authors multiply all inputs by this.
INPUT_SCALE = 10
# Ranges of the uniform strengths of feature and center.
FEATURE_STRENGTH, CENTER_STRENGTH = (0.5, 2.0), (1.0, 2.0)
# The starting weights of a mixture, as a part of PyTorch's default for a convolution.
SMALL_START = 1e-3
EXPERT_RATE, ROUTER_RATE = 1e-3, 0.1
SINGLE_RATE = {"linear": 3e-3, "cubic": 1e-2}
SINGLE_WEIGHT_DECAY = 5e-4
# As in the authors' code, the loss applies a softmax to the probabilities of a softmax: it is at least 0.3133.
STOP_LOSS, STOP_RISE, SINGLE_MIN_EPOCHS = 0.314, 0.02, 500
NUM_RUNS = 10
PROGRESS_SECONDS = 10


class Setting(NamedTuple):
    """What the four settings differ in."""

    max_distractor: float  # strength of the other cluster's feature: uniform from 0.5 to this
    noise: float  # norm of the noise patch, on average


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


class Examples(NamedTuple):
    """Examples as what their patches are made of. All models sum over patches, so that the order does not matter."""

    noise: Tensor  # (n, d), the noise patch
    strengths: Tensor  # (n, 3), signed strengths of the other patches
    directions: Tensor  # (n, 3), int64, their rows in `basis`
    basis: Tensor  # (2 k, d), orthonormal: features of the clusters, then centers
    labels: Tensor  # (n,), int64, 0 or 1
    clusters: Tensor  # (n,), int64

    def patches(self) -> Tensor:
        """All patches, `(n, 4, d)`."""
        return torch.cat([self.strengths[..., None] * self.basis[self.directions], self.noise[:, None]], 1)


def draw_examples(setting: Setting, num_examples: int, basis: Tensor, generator: torch.Generator) -> Examples:
    """Draw examples of one setting: definition 3.1 of the paper, times 10.

    Args:
        basis: as by `draw_basis`.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_examples, generator=generator, dtype=torch.float64)

    def draw(count: int) -> Tensor:
        return torch.randint(count, (num_examples,), generator=generator)

    labels, signs = draw(2), 2 * draw(2) - 1
    clusters = draw(NUM_CLUSTERS)
    others = (clusters + 1 + draw(NUM_CLUSTERS - 1)) % NUM_CLUSTERS
    strengths = torch.stack(
        [
            (2 * labels - 1) * uniform(*FEATURE_STRENGTH),
            uniform(*CENTER_STRENGTH),
            signs * uniform(0.5, setting.max_distractor),
        ],
        1,
    )
    noise = torch.randn(num_examples, PATCH_SIZE, generator=generator, dtype=torch.float64)
    noise *= INPUT_SCALE * setting.noise / math.sqrt(PATCH_SIZE)
    directions = torch.stack([clusters, NUM_CLUSTERS + clusters, others], 1)
    return Examples(noise, INPUT_SCALE * strengths, directions, basis, labels, clusters)


def draw_basis(generator: torch.Generator) -> Tensor:
    """Features and centers of the clusters: `(2 k, d)`, orthonormal rows."""
    matrix = torch.randn(PATCH_SIZE, 2 * NUM_CLUSTERS, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.T.contiguous()


class Model(NamedTuple):
    """Experts, and the router of a mixture."""

    weights: Tensor  # (m, 2, j, d)
    biases: Tensor  # (m, 2, j)
    router: Tensor | None  # (m, d); None: one expert


def new_model(num_experts: int, filters_per_class: int, scale: float, generator: torch.Generator) -> Model:
    """Filters start uniform, as in PyTorch's convolution, times `scale`; the router starts at 0."""

    def uniform(*shape: int) -> Tensor:
        bound = scale / math.sqrt(PATCH_SIZE)
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * bound

    weights = uniform(num_experts, NUM_CLASSES, filters_per_class, PATCH_SIZE)
    biases = uniform(num_experts, NUM_CLASSES, filters_per_class)
    router = torch.zeros(num_experts, PATCH_SIZE, dtype=torch.float64) if num_experts > 1 else None
    return Model(weights, biases, router)


def expert_outputs(model: Model, examples: Examples, sums: Tensor, experts: Tensor, cubic: bool) -> Tensor:
    """Output of one expert for each example: the sum over its filters and all patches of σ(w·x + b), for each class.

    σ is the cube or the identity. For the identity, filters are summed before the product. For the cube, a patch that
    is s times a vector v needs only (s w·v + b)³, a polynomial in s whose coefficients are sums over the filters.

    Args:
        sums: sum of the patches, `(n, d)`.
        experts: `(n,)`, int64.

    Returns:
        `(n, 2)`.
    """
    if not cubic:
        outputs = sums @ model.weights.sum(2).flatten(0, 1).T + NUM_PATCHES * model.biases.sum(2).flatten()
        return outputs.unflatten(1, (-1, NUM_CLASSES))[torch.arange(len(experts)), experts]
    along = (model.weights @ examples.basis.T).transpose(2, 3)  # (m, 2, 2 k, j)
    biases = model.biases[:, :, None]
    parts = [biases**3 + 0 * along, 3 * along * biases**2, 3 * along**2 * biases, along**3]
    table = torch.stack([part.sum(3) for part in parts], 3).transpose(1, 2)  # (m, 2 k, 2, 4)
    rows = experts[:, None] * len(examples.basis) + examples.directions
    coefficients = embedding(rows, table.reshape(-1, NUM_CLASSES * 4)).unflatten(2, (NUM_CLASSES, 4))
    s = examples.strengths
    powers = torch.stack([torch.ones_like(s), s, s * s, s * s * s], 2)
    outputs = torch.einsum("npcq,npq->nc", coefficients, powers)
    # each expert computes on the noise of its own examples
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=len(model.weights)).tolist()
    of_noise = [
        ((own @ weights.flatten(0, 1).T + bias.flatten()) ** 3).unflatten(1, weights.shape[:2]).sum(2)
        for own, weights, bias in zip(examples.noise[order].split(counts), model.weights, model.biases, strict=True)
    ]
    return outputs + torch.cat(of_noise)[order.argsort()]


def route(model: Model, sums: Tensor, noise: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Send each example to the expert with the highest score plus noise.

    Args:
        noise: `(n, m)`.
        gate: `logit` or `softmax`, see `ClusterArguments`.

    Returns:
        gates, `(n,)`, and experts, `(n,)`, int64.
    """
    scores = sums @ model.router.T
    noisy = scores + noise
    experts = noisy.detach().argmax(1)
    gates = noisy if gate == "logit" else scores.softmax(1)
    return gates[torch.arange(len(experts)), experts], experts


def count_dispatched(clusters: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Examples of each cluster that each expert is sent, `(k, m)`, int64."""
    return (clusters * num_experts + experts).bincount(minlength=NUM_CLUSTERS * num_experts).view(NUM_CLUSTERS, -1)


def dispatch_entropy(clusters: Tensor, experts: Tensor, num_experts: int) -> float:
    """Entropy of the clusters that an expert is sent, in nats, averaged over the examples.

    0: each expert is sent one cluster. ln(clusters), 1.386 for four: the router ignores clusters.
    """
    counts = count_dispatched(clusters, experts, num_experts).double()
    shares = counts / counts.sum(0).clamp(min=1)
    entropies = -torch.special.xlogy(shares, shares).sum(0)
    return float((counts.sum(0) / counts.sum() * entropies).sum())


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
        noise = ties if "no routing noise" in kind else _routing_noise(ties.shape, generator)
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


@torch.no_grad()
def accuracy(
    model: Model, examples: Examples, cubic: bool, gate: str = "softmax", noise: Tensor | None = None
) -> float:
    """Correct examples, in %. `noise`: routing noise, `(n, m)`; None: without."""
    sums = examples.patches().sum(1)
    if model.router is None:
        gates, experts = sums.new_ones(len(sums)), torch.zeros_like(examples.labels)
    else:
        gates, experts = route(model, sums, sums.new_zeros(()) if noise is None else noise, gate)
    outputs = gates[:, None] * expert_outputs(model, examples, sums, experts, cubic)
    return 100 * float((outputs.argmax(1) == examples.labels).double().mean())


def _routing_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


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
        noise = _routing_noise((len(test.labels), arguments.num_experts), torch.Generator().manual_seed(seed))
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
        self.label, self.last, self.epochs = label, time.monotonic(), 0

    def __call__(self, epoch: int, loss: float) -> None:
        self.epochs = epoch + 1
        if time.monotonic() - self.last > PROGRESS_SECONDS:
            self.last = time.monotonic()
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

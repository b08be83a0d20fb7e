# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The vowel task of Jacobs, Jordan, Nowlan & Hinton 1991, "Adaptive Mixtures of Local Experts" (section 3).

Two formants of the vowels [i], [I], [a] and [Λ] go in. They form two overlapping pairs, [i] with [I] and [a] with [Λ].
All systems have one output unit: 1 for [I] and [Λ], 0 for [i] and [a]. The paper does not state this. We infer it from
its decision lines ("an output of exactly 0.5") and from its "roughly equal numbers of parameters", which hold for one
output: 24 in 4 experts with their gate and 25 in a network of 6 hidden units; 48 and 49 in the larger ones.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_peer.console.errors import SettingsError, require, require_at_least_one
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, counted, mean_and_deviation, with_deviation
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.gated_mixture import (
    ERRORS,
    LIKELIHOOD,
    GatedMixture,
    HiddenLayerNetwork,
    num_used_experts,
    train_to_criterion,
)

# In X-SAMPA, and the output for each.
VOWELS = {"i": 0.0, "I": 1.0, "A": 0.0, "V": 1.0}
SYMBOLS = {"i": "[i]", "I": "[I]", "A": "[a]", "V": "[Λ]"}
# Mean and standard deviation of F1, then of F2, in Hz: of the measurements of these vowels by Peterson & Barney 1952
# (J. Acoust. Soc. Am. 24, 175-184), as the R package phonTools distributes them (`pb52`), rounded to 1 Hz. By number
# of speakers, in their order: 33 men, 28 women, 15 children.
SPREADS = {
    33: {"i": (267, 37, 2294, 136), "I": (392, 50, 1993, 126), "A": (718, 54, 1091, 97), "V": (631, 47, 1192, 109)},
    28: {"i": (310, 47, 2783, 132), "I": (441, 47, 2474, 151), "A": (864, 95, 1229, 99), "V": (758, 68, 1409, 119)},
    15: {
        "i": (360, 70, 3178, 219),
        "I": (534, 74, 2744, 207),
        "A": (1030, 128, 1383, 163),
        "V": (855, 118, 1592, 103),
    },
}
REPETITIONS = 2
HERTZ_PER_UNIT = 1000  # the paper's scale of the inputs

# Table 1 of the paper: % correct in training and test, mean and standard deviation of the epochs to the criterion.
PUBLISHED = {
    ("4 experts", LIKELIHOOD): (88, 90, 1124, 23),
    ("8 experts", LIKELIHOOD): (88, 90, 1083, 12),
    ("6 hidden units", None): (88, 90, 2209, 83),
    ("12 hidden units", None): (88, 90, 2435, 124),
}
# Powers of the square root of 2, from 5.66 to 64, for the gradient of the mean error.
LEARNING_RATES = tuple(2.0 ** (power / 2) for power in range(5, 13))
# Student's t with 48 degrees of freedom: what a one-sided test at 95 % and at 99.9 % asks for.
CRITICAL_T = {"95 %": 1.677, "99.9 %": 3.269}
NUM_RUNS = 25
PROGRESS_SECONDS = 5


@dataclass
class VowelArguments(ClassicArguments):
    """The vowel task of 1991."""

    vowel_file: str | None = field(
        default=None,
        metadata={
            "help": "Measurements of Peterson and Barney 1952: CSV with the columns speaker, vowel (X-SAMPA), f1 and "
            "f2 (Hz). Default: formants drawn from the means and standard deviations of each vowel."
        },
    )
    train_speakers: int = field(default=50, metadata={"help": "The first speakers, for training."})
    test_speakers: int = field(default=25, metadata={"help": "The next speakers, for testing."})
    criterion: float = field(default=0.08, metadata={"help": "Mean squared error at which training ends."})
    max_epochs: int = field(default=4000, metadata={"help": "Updates after which a run has failed."})
    tuning_runs: int = field(
        default=3, metadata={"help": "Runs for each learning rate tried, with seeds of their own."}
    )
    initial_scale: float = field(
        default=0.5, metadata={"help": "Weights start uniform between minus this and this. The gate starts at 0."}
    )


class Vowels(NamedTuple):
    """Formants of spoken vowels."""

    inputs: Tensor  # (cases, 3), F1 and F2 in kHz and the constant 1, float64
    targets: Tensor  # (cases,), 0 or 1, float64
    vowels: list[str]  # X-SAMPA
    speakers: list[int]  # in the order of the file, from 0


def read_vowels(path: str | Path) -> Vowels:
    """Read the four vowels from a table of formants.

    Raises:
        SettingsError: the file cannot be read, lacks a column or a vowel, or has a formant that is no positive number.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            if missing := {"speaker", "vowel", "f1", "f2"} - set(table.fieldnames or ()):
                raise SettingsError(f"--vowel_file {path} has no column {', '.join(sorted(missing))}.")
            rows = [row for row in table if row["vowel"] in VOWELS]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(
            f"cannot read --vowel_file {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    if absent := VOWELS.keys() - {row["vowel"] for row in rows}:
        raise SettingsError(f"--vowel_file {path} has no vowel {', '.join(sorted(absent))} (X-SAMPA).")
    speakers: dict[str, int] = {}
    cases = []
    for row in rows:
        try:
            formants = float(row["f1"]), float(row["f2"])
        except (TypeError, ValueError):
            formants = math.nan, math.nan
        if not all(0 < formant < math.inf for formant in formants):
            raise SettingsError(
                f"--vowel_file {path}: f1 and f2 of vowel {row['vowel']}, speaker {row['speaker']}, must be positive "
                f"numbers of Hz; got {row['f1']!r} and {row['f2']!r}."
            )
        cases.append((speakers.setdefault(row["speaker"], len(speakers)), row["vowel"], *formants))
    return _as_vowels(cases)


def draw_vowels(seed: int) -> Vowels:
    """Draw formants in place of the measurements: independent normals, by the table `SPREADS`.

    They have as many speakers, in the same order, and as many repetitions. They lack what correlates: F1 with F2, and
    the vowels of one speaker.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    first = 0
    for num_speakers, spreads in SPREADS.items():
        for vowel, (mean_1, deviation_1, mean_2, deviation_2) in spreads.items():
            normals = torch.randn(num_speakers * REPETITIONS, 2, generator=generator, dtype=torch.float64)
            formants = torch.tensor([mean_1, mean_2]) + normals * torch.tensor([deviation_1, deviation_2])
            cases += [(first + i // REPETITIONS, vowel, *pair) for i, pair in enumerate(formants.tolist())]
        first += num_speakers
    return _as_vowels(cases)


def _as_vowels(cases: Sequence[tuple[int, str, float, float]]) -> Vowels:
    speakers, vowels, first, second = zip(*cases, strict=True)
    inputs = torch.tensor([first, second, [HERTZ_PER_UNIT] * len(cases)], dtype=torch.float64).T / HERTZ_PER_UNIT
    targets = torch.tensor([VOWELS[vowel] for vowel in vowels], dtype=torch.float64)
    return Vowels(inputs, targets, list(vowels), list(speakers))


def run_vowels(arguments: VowelArguments, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train all systems on the vowels; print the table of the paper beside the published one.

    Args:
        save: as in `run_clusters`. It is not called, because training takes a minute or two.

    Returns:
        `data` (where the vowels are from), `rows` (one per system), `t` (statistics of epochs), and for the plot
        `boundaries` (parameters of the first run of each system) and `cases` (the vowels).

    Raises:
        SettingsError: settings are out of range, or the file of vowels cannot be used.
    """
    _check(arguments)
    data = read_vowels(arguments.vowel_file) if arguments.vowel_file else draw_vowels(arguments.seed)
    source = "measured (Peterson & Barney 1952)" if arguments.vowel_file else "drawn from means and deviations"
    speakers = torch.tensor(data.speakers)
    num_speakers = int(speakers.max()) + 1
    if arguments.train_speakers + arguments.test_speakers > num_speakers:
        raise SettingsError(
            f"--train_speakers ({arguments.train_speakers}) and --test_speakers ({arguments.test_speakers}) are more "
            f"than the {num_speakers} speakers of the data."
        )
    train = speakers < arguments.train_speakers
    test = ~train & (speakers < arguments.train_speakers + arguments.test_speakers)
    print(f"vowels: {source}; {int(train.sum())} cases for training, {int(test.sum())} for testing", flush=True)
    rows, boundaries = [], []
    systems = _systems(arguments.initial_scale)
    for number, ((name, error), model) in enumerate(systems.items()):
        label = f"{name}, error {error}" if error else name
        row, parameters = _run_system(f"{number + 1}/{len(systems)} {label}", model, data, train, test, arguments)
        rows.append({"system": name, "error": error, **row})
        boundaries.append({"system": label, "kind": "experts" if error else "hidden", **parameters})
    print(make_table(rows), flush=True)
    statistics = _compare(rows)
    for words, t in statistics.items():
        print(f"{words}: t = {t:.1f}" if t is not None else f"{words}: no t, too few runs met the criterion")
    print(f"published: t beyond {CRITICAL_T['99.9 %']} for the first, {CRITICAL_T['95 %']} for the others (48 d.o.f.)")
    cases = {
        "vowels": data.vowels,
        "formants_khz": [[round(value, 4) for value in pair] for pair in data.inputs[:, :2].tolist()],
        "part": ["train" if one else "test" if other else "unused" for one, other in zip(train, test, strict=True)],
    }
    return {"data": source, "rows": rows, "t": statistics, "boundaries": boundaries, "cases": cases}


def _check(arguments: VowelArguments) -> None:
    arguments.runs(NUM_RUNS)
    require_at_least_one(arguments, "train_speakers", "test_speakers", "tuning_runs", "max_epochs")
    require(arguments.criterion > 0, "criterion", arguments.criterion, "more than 0")
    require(arguments.initial_scale > 0, "initial_scale", arguments.initial_scale, "more than 0")


def _systems(scale: float) -> dict[tuple[str, str | None], GatedMixture | HiddenLayerNetwork]:
    mixtures = {
        (f"{size} experts", error): GatedMixture(size, error, scale) for error in reversed(ERRORS) for size in (4, 8)
    }
    return {**mixtures, **{(f"{size} hidden units", None): HiddenLayerNetwork(size, scale) for size in (6, 12)}}


def _run_system(
    label: str,
    model: GatedMixture | HiddenLayerNetwork,
    data: Vowels,
    train: Tensor,
    test: Tensor,
    arguments: VowelArguments,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose the learning rate, then train the runs. Returns the row, and the parameters of the first run."""
    inputs, targets = data.inputs[train], data.targets[train]
    # seeds of tuning and of the runs differ, and are the same for all systems
    generator = torch.Generator().manual_seed(2 * arguments.seed + 1)
    start = model.initialize(arguments.tuning_runs, inputs.shape[1], generator)
    start = [values.repeat(len(LEARNING_RATES), 1, 1) for values in start]
    rates = torch.tensor(LEARNING_RATES, dtype=torch.float64).repeat_interleave(arguments.tuning_runs)
    # half as long: a rate that needs more is not the best one
    limit = max(1, arguments.max_epochs // 2)
    progress = _Progress(f"{label}: learning rates")
    _, epochs = train_to_criterion(model, start, inputs, targets, rates, arguments.criterion, limit, progress)
    # the fewest epochs; a run that did not meet the criterion counts as if it had done so at the end of all epochs
    tuning = torch.where(epochs < 0, arguments.max_epochs, epochs).view(len(LEARNING_RATES), -1)
    rate = LEARNING_RATES[int(tuning.double().mean(1).argmin())]
    num_runs = arguments.runs(NUM_RUNS)
    generator = torch.Generator().manual_seed(2 * arguments.seed)
    start = model.initialize(num_runs, inputs.shape[1], generator)
    rates = torch.full((num_runs,), rate, dtype=torch.float64)
    progress = _Progress(f"{label}: {counted(num_runs, 'run')}")
    final, epochs = train_to_criterion(
        model, start, inputs, targets, rates, arguments.criterion, arguments.max_epochs, progress
    )
    with torch.no_grad():
        outputs, _ = model.outputs_and_error(final, data.inputs, data.targets)
    right = ((outputs > 0.5) == (data.targets > 0.5)).double() * 100
    met = epochs[epochs >= 0].double().tolist()
    row = {
        "learning_rate": round(rate, 3),
        "train_correct": mean_and_deviation(right[:, train].mean(1).tolist()),
        "test_correct": mean_and_deviation(right[:, test].mean(1).tolist()),
        "epochs": mean_and_deviation(met),
        "met": len(met),
        "runs": num_runs,
        "parameters": sum(values[0].numel() for values in final),
        "epochs_by_run": epochs.tolist(),
    }
    if isinstance(model, GatedMixture):
        row["used_experts"] = num_used_experts(model, final, inputs).tolist()
    print(
        f"{label}: rate {rate:.3g}, {with_deviation(row['epochs'], '.0f')} epochs, {len(met)} of {num_runs} met",
        flush=True,
    )
    return row, {"parameters": [[[round(w, 6) for w in unit] for unit in values[0].tolist()] for values in final]}


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table, beside the published ones."""
    return as_markdown([_printed(row) for row in rows])


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    published = PUBLISHED.get((row["system"], row["error"]))
    train, test, mean, deviation = published or ("-", "-", None, None)
    used = row.get("used_experts")
    return {
        "system": row["system"] + (f", error {row['error']}" if row["error"] else ""),
        "train %": with_deviation(row["train_correct"], ".1f"),
        "test %": with_deviation(row["test_correct"], ".1f"),
        "epochs": with_deviation(row["epochs"], ".0f"),
        "runs that met it": f"{row['met']} of {row['runs']}",
        "experts in use": f"{min(used)} to {max(used)}" if used else "-",
        "published: train %": train,
        "test % ": test,
        "epochs ": with_deviation([mean, deviation], ".0f"),
    }


def _compare(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The paper's comparisons: t of the epochs with a pooled variance. Above 0: the first one needs fewer epochs."""
    by_name = {(row["system"], row["error"]): row for row in rows}
    pairs = {
        "4 experts before 6 hidden units": (("4 experts", LIKELIHOOD), ("6 hidden units", None)),
        "8 experts before 4 experts": (("8 experts", LIKELIHOOD), ("4 experts", LIKELIHOOD)),
        "6 hidden units before 12": (("6 hidden units", None), ("12 hidden units", None)),
    }
    result = {}
    for words, names in pairs.items():
        (first, one), (second, other) = ([by_name[name][key] for key in ("epochs", "met")] for name in names)
        if min(one, other) < 2:
            result[words] = None
            continue
        pooled = ((one - 1) * first[1] ** 2 + (other - 1) * second[1] ** 2) / (one + other - 2)
        spread = math.sqrt(pooled * (1 / one + 1 / other))
        result[words] = round((second[0] - first[0]) / spread, 3) if spread else None
    return result


class _Progress:
    """Prints how far training is, every few seconds."""

    def __init__(self, label: str):
        self.label, self.notices = label, Every(PROGRESS_SECONDS)

    def __call__(self, epoch: int, going: int) -> None:
        if self.notices.is_due():
            print(f"{self.label}: epoch {epoch:,}, {going} runs go on", flush=True)


def plot_vowels(result: dict[str, Any], path: str | Path) -> None:
    """Draw the decision lines of experts and gate in the plane of F1 and F2: one panel per system, its first run.

    Args:
        result: what `run_vowels` returns.
    """
    from modeling_peer.console.line_plots import COLORS, LINES, MARKERS, new_figure, save_png

    figure, panels = new_figure(len(result["boundaries"]))
    cases = result["cases"]
    trained = [i for i, part in enumerate(cases["part"]) if part == "train"]
    for axes, drawn in zip(panels, result["boundaries"], strict=True):
        for vowel, marker in zip(VOWELS, MARKERS, strict=False):
            xs, ys = zip(*(cases["formants_khz"][i] for i in trained if cases["vowels"][i] == vowel), strict=True)
            color = COLORS[1 + int(VOWELS[vowel])]
            axes.scatter(xs, ys, s=9, alpha=0.6, marker=marker, color=color, label=SYMBOLS[vowel], linewidths=0)
        low, high = zip(axes.get_xlim(), axes.get_ylim(), strict=True)
        grids = [torch.linspace(*ends, 200, dtype=torch.float64) for ends in zip(low, high, strict=True)]
        first, second = torch.meshgrid(*grids, indexing="xy")
        plane = torch.stack([first, second, torch.ones_like(first)], -1).flatten(0, 1)
        parameters = [torch.tensor([values], dtype=torch.float64) for values in drawn["parameters"]]
        lines = [grid.numpy() for grid in (first, second)]
        shape = first.shape
        if drawn["kind"] == "experts":
            model = GatedMixture(len(drawn["parameters"][0]))
            proportions, experts = (
                part[0].unflatten(1, shape)
                for part in (model.proportions(parameters, plane), model.expert_outputs(parameters, plane))
            )
            output = (proportions * experts).sum(0)
            winner = proportions.argmax(0)
            for number, expert in enumerate(winner.unique().tolist()):
                style = {"colors": COLORS[3 + number % 4], "linestyles": LINES[1 + number % 3]}
                drawing = axes.contour(*lines, experts[expert].numpy(), [0.5], **style)
                axes.clabel(drawing, fmt=f"expert {expert}", fontsize="x-small")
                axes.contour(*lines, (winner == expert).double().numpy(), [0.5], colors="black", linewidths=0.7)
        else:
            model = HiddenLayerNetwork(len(drawn["parameters"][0]))
            output = model.outputs_and_error(parameters, plane, torch.zeros(len(plane)))[0][0].unflatten(0, shape)
        axes.contourf(*lines, output.numpy(), [0, 0.5, 1], colors=[COLORS[1], COLORS[2]], alpha=0.12)
        axes.set(title=drawn["system"], xlabel="F1, kHz", ylabel="F2, kHz")
    panels[0].legend(fontsize="x-small", loc="upper right")
    figure.suptitle(
        f"Training vowels, {result['data']}. Shaded: the output above and below 0.5. Dashed: an expert's output is "
        "0.5. Thin black: the gate changes its first expert.",
        fontsize="small",
    )
    save_png(figure, path)

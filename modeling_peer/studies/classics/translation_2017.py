# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The translation experiment of Shazeer et al. 2017, in which each token goes through two of many experts.

"Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (arXiv:1701.06538), section 5.4 and
appendix E: one model translates into several languages, with noisy top-k gating and both balance losses of appendix A.
Model: `translation_model.py`. Data: `translation_data.py`. What experts read: `translation_contexts.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.console.errors import SettingsError, require, require_at_least_one
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.translation_contexts import make_context_table, read_contexts
from modeling_peer.studies.classics.translation_data import (
    PADDING,
    Batch,
    EncodedPair,
    Pair,
    Vocabulary,
    draw_pairs,
    endless_batches,
    make_batches,
    read_pairs,
    split_pairs,
)
from modeling_peer.studies.classics.translation_model import ReluLayer, ReluMixture, TranslationModel

MIXTURE, UNBALANCED, DENSE = "mixture", "mixture without losses", "dense layer"
SYSTEMS = (MIXTURE, UNBALANCED, DENSE)
# Perplexity: table 5 of the paper, twelve language pairs, development set; the model without a mixture is GNMT, with
# twice the operations. Coefficients of variation of importance and load, and the largest load over the mean: table 6,
# a language model of 256 experts with both weights at 0.01 and at 0.
PUBLISHED = {MIXTURE: (3.35, (0.48, 0.11, 1.37)), UNBALANCED: (None, (3.04, 3.01, 17.80)), DENSE: (4.14, None)}
NUM_RUNS = 1
CURVE_SHARE = 0.25  # of the test batches, for the curve
PROGRESS_SECONDS = 10
# The paper's 2,000 steps of rising and 8,000 of constant learning rate have this ratio.
CONSTANT_PER_WARMUP = 4
MAX_GRADIENT_NORM = 5.0  # GNMT's


@dataclass
class TranslationArguments(ClassicArguments):
    """The translation model of 2017."""

    french_file: str | None = field(
        default=None,
        metadata={
            "help": "Lines of an English sentence, a tab and its French translation, such as Tatoeba's from "
            "manythings.org/anki; plain, .gz or .xz. Without any file: sentences of made-up languages."
        },
    )
    german_file: str | None = field(default=None, metadata={"help": "The same with German translations."})
    test_sentences: int = field(
        default=2000, metadata={"help": "English sentences whose pairs are kept for the test."}
    )
    vocab_size: int = field(default=4000, metadata={"help": "Tokens of the byte-level BPE of all languages."})
    max_tokens: int = field(default=24, metadata={"help": "Longer sentences are left out."})
    hidden_size: int = field(default=64, metadata={"help": "Width of all layers."})
    num_experts: int = field(default=32, metadata={"help": "Experts of each of the two mixtures."})
    experts_per_token: int = field(default=2, metadata={"help": "Experts that a token goes through."})
    expert_size: int = field(default=256, metadata={"help": "Hidden units of an expert."})
    balance_weight: float = field(
        default=0.01, metadata={"help": "Weight of the importance loss and of the load loss, of each mixture."}
    )
    batch_tokens: int = field(default=1500, metadata={"help": "Target tokens of a batch, at most."})
    num_steps: int = field(default=2000, metadata={"help": "Updates of each system."})
    warmup_steps: int = field(
        default=100,
        metadata={
            "help": "Steps in which the learning rate rises. It then stays for four times as many, and falls as one "
            "over the square root of the step."
        },
    )
    peak_rate: float = field(default=8e-3, metadata={"help": "The highest learning rate, of Adam."})
    steps_per_round: int = field(
        default=100,
        metadata={"help": "Systems train in turns of as many steps, with a point of the curve after each."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Training ends after the round in which this time is over, with equally many steps for all."
        },
    )


class Training:
    """One system, its optimizer and its batches.

    Args:
        name: one of `SYSTEMS`.
        pairs: for training.
        seed: of the order of batches and of the gates' noise, the same for all systems.
    """

    def __init__(
        self, name: str, pairs: Sequence[EncodedPair], vocab_size: int, seed: int, arguments: TranslationArguments
    ):
        self.name, self.seed, self.arguments = name, seed, arguments
        self.model = TranslationModel(
            vocab_size, arguments.hidden_size, *(_new_layer(name, arguments) for _ in ("encoder", "decoder"))
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=arguments.peak_rate, fused=True)
        self.balance_weight = arguments.balance_weight if name == MIXTURE else 0.0
        generator = torch.Generator().manual_seed(seed)
        self.batches: Iterator[Batch] = endless_batches(pairs, arguments.batch_tokens, generator)
        self.steps = self.tokens = 0
        self.cpu_seconds = 0.0  # of training, without evaluation
        self.curve: list[list[float]] = []  # steps, perplexity on a part of the test
        self.loss = math.nan

    def step(self) -> None:
        """One update. Its loss is the sum over the target tokens, divided by the most that a batch may have."""
        began = time.process_time()
        self.model.train()
        batch = next(self.batches)
        losses = AuxiliaryLosses() if self.balance_weight else None
        summed = self.model(batch, losses)
        loss = summed / self.arguments.batch_tokens
        if losses is not None:
            loss = loss + self.balance_weight * losses.total
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.peak_rate * rate_share(self.steps + 1, self.arguments.warmup_steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.cpu_seconds += time.process_time() - began
        tokens = int((batch.targets != PADDING).sum())
        self.steps, self.tokens, self.loss = self.steps + 1, self.tokens + tokens, float(summed.detach()) / tokens


def _new_layer(name: str, arguments: TranslationArguments) -> nn.Module:
    top_k, num_experts, size = arguments.experts_per_token, arguments.num_experts, arguments.expert_size
    if name == DENSE:
        return ReluLayer(arguments.hidden_size, top_k * size + num_experts)
    return ReluMixture(arguments.hidden_size, num_experts, top_k, size)


def rate_share(step: int, warmup_steps: int) -> float:
    """The learning rate of a step, counted from 1, as a share of the highest: the schedule of appendix E."""
    constant = warmup_steps * (1 + CONSTANT_PER_WARMUP)
    return min(1.0, step / warmup_steps, math.sqrt(constant / step))


@torch.no_grad()
def evaluate(model: TranslationModel, batches: Sequence[Batch], num_languages: int) -> dict[str, Any]:
    """Perplexity, and the use of experts, without noise.

    Returns:
        `perplexity`, `by_language`, and of each mixture, by its place: `importance` (sums of gates) and `load`
        (tokens), lists over experts, and `by_language`, sums of gates of each language.
    """
    model.eval()
    nats, tokens = torch.zeros(num_languages), torch.zeros(num_languages)
    mixtures = model.mixtures()
    sums = {
        place: torch.zeros(2, num_languages, len(layer.into)) for place, layer in mixtures.items()
    }  # of gates, and of tokens
    for batch in batches:
        lengths = (batch.targets != PADDING).sum(1)
        of_targets = batch.languages.repeat_interleave(lengths)
        nats.index_add_(0, of_targets, model.token_losses(batch))
        tokens.index_add_(0, batch.languages, lengths.float())
        of_sources = batch.languages.repeat_interleave(batch.sources.shape[1])
        for place, layer in mixtures.items():
            expert_ids, gates = layer.routing
            languages = (of_sources if place == "encoder" else of_targets)[:, None].expand_as(expert_ids)
            for values, added in zip(sums[place], (gates, torch.ones_like(gates)), strict=True):
                values.index_put_((languages, expert_ids), added, accumulate=True)
    return {
        "perplexity": math.exp(nats.sum() / tokens.sum()),
        "by_language": (nats / tokens).exp().tolist(),
        **{
            place: {"importance": gates.sum(0).tolist(), "load": load.sum(0).tolist(), "by_language": gates.tolist()}
            for place, (gates, load) in sums.items()
        },
    }


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: standard deviation over mean."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.std(correction=0) / numbers.mean())


def language_bits(by_language: Sequence[Sequence[float]]) -> float:
    """Bits that an expert tells about the target language: mutual information, weighted by gates.

    Args:
        by_language: sums of gates, `(languages, experts)`.
    """
    joint = torch.tensor(by_language, dtype=torch.float64)
    joint = joint / joint.sum()
    expected = joint.sum(0) * joint.sum(1, keepdim=True)
    return float(torch.special.xlogy(joint, joint / expected.clamp(min=1e-300)).sum() / math.log(2))


def run_translation(
    arguments: TranslationArguments, save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train the systems in turns; print their table beside the published one, and what three experts read.

    Args:
        save: called after each run with what would be returned if it were the last one, and after each round of the
            first run with `data` and `curves` alone.

    Returns:
        `data` (where sentences are from, and their numbers) and `rows` (one per system). Of the first run: `curves`
        (steps, and perplexity on a quarter of the test), `loads` (tokens of each expert over the mean), and `experts`
        (of the mixture, as by `read_contexts`).

    Raises:
        SettingsError: settings are out of range, or a file cannot be used.
    """
    _check(arguments)
    pairs, source = _read(arguments)
    train, test = split_pairs(pairs, arguments.test_sentences, arguments.seed)
    vocabulary = Vocabulary(train, arguments.vocab_size)
    encoded, held_out = (vocabulary.encode(part, arguments.max_tokens) for part in (train, test))
    data = {
        "source": source,
        "languages": vocabulary.languages,
        "tokens_of_vocabulary": vocabulary.num_words,
        **{
            f"{name}_{unit}": len(part) if unit == "pairs" else sum(len(pair.target) for pair in part)
            for name, part in (("train", encoded), ("test", held_out))
            for unit in ("pairs", "target_tokens")
        },
    }
    if not (encoded and held_out):
        raise SettingsError(f"--max_tokens ({arguments.max_tokens}) leaves no pairs for training or for the test.")
    print(
        f"pairs: {source}; {len(encoded):,} for training, {len(held_out):,} for the test; {vocabulary.num_words:,} "
        f"tokens in the vocabulary",
        flush=True,
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    tested = make_batches(held_out, 4 * arguments.batch_tokens, generator)
    num_runs, began = arguments.runs(NUM_RUNS), time.monotonic()
    found: list[list[dict[str, Any]]] = []  # by run, then by system
    result: dict[str, Any] = {"data": data}
    for run in range(num_runs):
        seconds = None if arguments.max_minutes is None else 60 * arguments.max_minutes * (run + 1) / num_runs
        deadline = math.inf if seconds is None else began + seconds
        label = f"run {run + 1} of {num_runs}"
        with torch.random.fork_rng(devices=[]):
            trained = _new_systems(1000 * arguments.seed + run, encoded, len(vocabulary), arguments)
            if run == 0:
                result["curves"] = {training.name: training.curve for training in trained}
            for _ in _rounds(label, trained, tested, len(vocabulary.languages), deadline):
                if save and run == 0:
                    save(result)
        found.append([_measure(training, tested, vocabulary) for training in trained])
        result["rows"] = [_summarize(list(of_system)) for of_system in zip(*found, strict=True)]
        if run == 0:
            result["loads"] = {
                f"{row['system']}, {place}": [round(tokens / (sum(load) / len(load)), 4) for tokens in load]
                for row in found[0]
                for place, load in row["load"].items()
            }
            result["experts"] = read_contexts(trained[0].model, vocabulary, held_out)
        if save:
            save(result)
    print(make_table(result["rows"]), flush=True)
    print(make_context_table(result["experts"]), flush=True)
    return result


def _check(arguments: TranslationArguments) -> None:
    arguments.runs(NUM_RUNS)
    names = ("test_sentences", "vocab_size", "max_tokens", "hidden_size", "experts_per_token", "expert_size")
    require_at_least_one(arguments, *names, "batch_tokens", "num_steps", "warmup_steps", "steps_per_round")
    require(arguments.hidden_size % 2 == 0, "hidden_size", arguments.hidden_size, "even: half for each direction")
    if arguments.num_experts <= arguments.experts_per_token:
        raise SettingsError(
            f"--num_experts ({arguments.num_experts}) must be more than --experts_per_token "
            f"({arguments.experts_per_token})."
        )
    require(arguments.balance_weight >= 0, "balance_weight", arguments.balance_weight, "at least 0")
    require(arguments.peak_rate > 0, "peak_rate", arguments.peak_rate, "more than 0")
    minutes = arguments.max_minutes
    require(minutes is None or minutes > 0, "max_minutes", minutes, "more than 0")


def _read(arguments: TranslationArguments) -> tuple[list[Pair], str]:
    files = {"French": arguments.french_file, "German": arguments.german_file}
    if not any(files.values()):
        return draw_pairs(3 * arguments.test_sentences, 200, arguments.seed), "drawn from made-up languages"
    pairs = [
        pair
        for language, path in files.items()
        if path
        for pair in read_pairs(path, f"{language.lower()}_file", language)
    ]
    return pairs, "read"


def _new_systems(
    seed: int, pairs: Sequence[EncodedPair], vocab_size: int, arguments: TranslationArguments
) -> list[Training]:
    systems = []
    for name in SYSTEMS:
        torch.manual_seed(seed)
        systems.append(Training(name, pairs, vocab_size, seed, arguments))
    return systems


def _rounds(
    label: str, systems: Sequence[Training], tested: Sequence[Batch], num_languages: int, deadline: float
) -> Iterator[None]:
    """Train all systems in turns, so that they have equally many steps whenever training ends.

    Args:
        deadline: by `time.monotonic`; no round begins after it, except the first.

    Yields:
        after each round.
    """
    arguments = systems[0].arguments
    part = tested[: max(1, round(CURVE_SHARE * len(tested)))]
    notices = Every(PROGRESS_SECONDS)
    done, rounds = 0, 0
    while done < arguments.num_steps and (time.monotonic() < deadline or not done):
        steps = min(arguments.steps_per_round, arguments.num_steps - done)
        for training in systems:
            torch.manual_seed(training.seed + 1_000_003 * (rounds + 1))  # of the gates' noise: the same for all
            for _ in range(steps):
                training.step()
                if notices.is_due():
                    print(
                        f"{label}, {training.name}: step {training.steps:,} of {arguments.num_steps:,}, "
                        f"loss {training.loss:.3f}",
                        flush=True,
                    )
            perplexity = evaluate(training.model, part, num_languages)["perplexity"]
            training.curve.append([training.steps, round(perplexity, 4)])
        done, rounds = done + steps, rounds + 1
        perplexities = ", ".join(f"{training.name} {training.curve[-1][1]:.2f}" for training in systems)
        print(f"{label}: {done:,} steps, perplexity on part of the test: {perplexities}", flush=True)
        yield


def _measure(training: Training, tested: Sequence[Batch], vocabulary: Vocabulary) -> dict[str, Any]:
    found = evaluate(training.model, tested, len(vocabulary.languages))
    places = [place for place in ("encoder", "decoder") if place in found]
    row = {
        "system": training.name,
        "parameters": sum(values.numel() for values in training.model.parameters()),
        "layer_multiply_adds": training.model.encoder_layer.multiply_adds(),
        "steps": training.steps,
        "trained_tokens": training.tokens,
        "cpu_seconds": training.cpu_seconds,
        "perplexity": found["perplexity"],
        **{f"perplexity_{n}": value for n, value in zip(vocabulary.languages, found["by_language"], strict=True)},
        "load": {place: found[place]["load"] for place in places},
    }
    for place in places:
        load = found[place]["load"]
        row[f"{place}_importance_variation"] = variation(found[place]["importance"])
        row[f"{place}_load_variation"] = variation(load)
        row[f"{place}_largest_load"] = max(load) * len(load) / sum(load)
        row[f"{place}_unused_experts"] = sum(tokens == 0 for tokens in load)
        row[f"{place}_language_bits"] = language_bits(found[place]["by_language"])
    return row


def _summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row from those of all runs: measured values as mean and deviation."""
    first, row = runs[0], {"runs": len(runs)}
    for name, value in first.items():
        if isinstance(value, float):
            row[name] = mean_and_deviation([run[name] for run in runs])
        elif name != "load":
            row[name] = [run[name] for run in runs] if name.endswith(("steps", "tokens", "unused_experts")) else value
    return row


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table, beside the published figures."""
    return as_markdown([_printed(row) for row in rows])


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    perplexity, balance = PUBLISHED[row["system"]]
    routed = "encoder_load_variation" in row

    def both(name: str) -> str:
        """Of the encoder's and of the decoder's mixture."""
        if not routed:
            return "-"
        return " / ".join(with_deviation(row[f"{place}_{name}"], ".2f") for place in ("encoder", "decoder"))

    languages = [name for name in row if name.startswith("perplexity_")]
    return {
        "system": row["system"],
        "parameters": row["parameters"],
        "multiply-adds of a layer": row["layer_multiply_adds"],
        "test perplexity": with_deviation(row["perplexity"], ".2f"),
        **{name.removeprefix("perplexity_"): with_deviation(row[name], ".2f") for name in languages},
        "CV of importance": both("importance_variation"),
        "CV of load": both("load_variation"),
        "largest load": both("largest_load"),
        "bits on language": both("language_bits"),
        "published: perplexity": "-" if perplexity is None else f"{perplexity:.2f}",
        "CV of importance, load; largest": "-" if balance is None else "{:.2f}, {:.2f}; {:.2f}".format(*balance),
    }


def plot_translation(result: dict[str, Any], path: str | Path) -> None:
    """Draw perplexity over training, and the load of each expert.

    Args:
        result: what `run_translation` returns.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    figure, (learning, balance) = new_figure(2, 4)
    ends = []
    for name, curve in result["curves"].items():
        style = line_style(SYSTEMS.index(name))
        steps, perplexities = zip(*curve, strict=True)
        learning.plot(steps, perplexities, **style, markevery=max(1, len(curve) // 8))
        ends.append((steps[-1], perplexities[-1], name, style))
    learning.set(title="Learning", xlabel="step", ylabel="perplexity on a quarter of the test", yscale="log")
    learning.grid(alpha=0.3, which="both")
    label_line_ends(learning, ends)
    ends = []
    for number, (name, loads) in enumerate(result["loads"].items()):
        style, ordered = line_style(number), sorted(loads, reverse=True)
        balance.plot(range(1, len(ordered) + 1), ordered, **style, markevery=max(1, len(ordered) // 8))
        ends.append((len(ordered), ordered[-1], name, style))
    balance.axhline(1, color="gray", linewidth=0.7)
    balance.set(title="Balance", xlabel="expert, by falling load", ylabel="tokens of the expert, over the mean")
    balance.grid(alpha=0.3)
    label_line_ends(balance, ends)
    save_png(figure, path)

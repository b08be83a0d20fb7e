# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How experts specialise while a small language model learns text of several domains: PEER beside a coarse mixture.

Dispatch entropy is that of Chen et al. 2022 (arXiv:2208.02813), with domains in the place of clusters. OpenMoE (Xue et
al. 2024, arXiv:2402.01739) reports routing by token rather than by context, fixed early in training. Figures:
`analysis/expert_specialisation.py`. Data: `specialisation_data.py`. Models and training: `specialisation_training.py`.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from modeling_peer.analysis import expert_specialisation as figures
from modeling_peer.analysis.expert_profiles import Spelling
from modeling_peer.analysis.statistics import routing_consistency
from modeling_peer.console.errors import SettingsError, require, require_at_least_one
from modeling_peer.console.files import read_json, write_json
from modeling_peer.console.progress import Every
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.costs.counting import model_cost
from modeling_peer.studies.classics.arguments import ClassicArguments
from modeling_peer.studies.classics.specialisation_data import Domains, load_domains
from modeling_peer.studies.classics.specialisation_training import FEED_FORWARDS, Training, new_configs

NUM_RUNS = 1
PROGRESS_SECONDS = 30
NUM_SHOWN = 5  # tokens of an expert in a table
EARLY = 0.1  # share of the steps at which routing is compared with the final one in the table of findings
PARTS = "specialisation.parts"  # folder for what an unfinished run has so far


@dataclass
class SpecialisationArguments(ClassicArguments):
    """Specialisation of experts in a language model."""

    text_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train/NAME.txt and validation/NAME.txt for each domain, as examples/mixed_corpus.py "
            "writes them. Without it: sentences of made-up languages."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the byte-level BPE of all domains."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    sequences_per_domain: int = field(default=1, metadata={"help": "Sequences of each domain in a step."})
    held_out_tokens: int = field(
        default=16384, metadata={"help": "Tokens of each domain's validation text on which routing is recorded."}
    )
    num_steps: int = field(default=3000, metadata={"help": "Updates of each model."})
    save_steps: int = field(
        default=250, metadata={"help": "Steps between two saved states, from which the same command goes on."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the decoder."})
    num_layers: int = field(default=4, metadata={"help": "Layers of the decoder; all but the first have experts."})
    num_sub_keys: int = field(default=128, metadata={"help": "Sub-keys of PEER; it has the square of it in experts."})
    num_experts: int = field(default=32, metadata={"help": "Experts of a layer of the coarse mixture."})
    experts_per_token: int = field(default=2, metadata={"help": "Experts of a token in the coarse mixture."})
    learning_rate: float = field(default=4e-3, metadata={"help": "The highest learning rate, of AdamW."})


def run_specialisation(
    arguments: SpecialisationArguments, save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train both models, record their routing at some steps, and print the tables.

    A run that was cut off goes on from its last saved state when it is called again with the same settings and text.
    What it has so far is in a folder of `output_dir`, which is deleted at the end.

    Args:
        save: called after each model with what would be returned if it were the last one.

    Returns:
        `data` (domains, and their numbers), `rows` (one per feed-forward and recorded step), and `experts` of the
        first run: of each feed-forward, what the expert of each domain reads at each step.

    Raises:
        SettingsError: settings are out of range, or the text cannot be used.
    """
    _check(arguments)
    domains = load_domains(
        arguments.text_folder,
        arguments.vocab_size,
        arguments.sequence_length,
        arguments.held_out_tokens,
        arguments.seed,
    )
    data = describe_domains(domains, arguments.seed)
    print(
        f"text: {domains.source}; {', '.join(domains.names)}; {data['held_out_tokens']:,} held-out tokens. The token "
        f"alone tells {data['token_bits']:.2f} of {math.log2(len(domains.names)):.2f} bits about the domain.",
        flush=True,
    )
    configs = new_configs(len(domains.tokenizer), arguments)
    folder = _open_parts(arguments, domains)
    num_runs = arguments.runs(NUM_RUNS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FEED_FORWARDS}
    result: dict[str, Any] = {"data": data}
    for run in range(num_runs):
        for name in FEED_FORWARDS:
            label = f"{run}-{FEED_FORWARDS.index(name)}"
            path = folder / f"{label}.json"
            if not path.is_file():
                with torch.random.fork_rng(devices=[]):
                    seed = 1000 * arguments.seed + run
                    training = Training(name, configs[name], domains, seed, arguments, folder, label)
                    training.run(partial(_report, f"run {run + 1} of {num_runs}", Every(PROGRESS_SECONDS)))
                    write_json(path, measure(training))
                for tensors in folder.glob(f"{label}*.pt"):
                    tensors.unlink()
            found[name].append(read_json(path))
            result["rows"] = [row for of_one in found.values() if of_one for row in _summarize(of_one)]
            result["experts"] = {name: of_one[0]["experts"] for name, of_one in found.items() if of_one}
            if save:
                save(result)
    shutil.rmtree(folder)
    print(make_table(result["rows"]), flush=True)
    print(f"\nafter the last step:\n{make_layer_table(result['rows'])}", flush=True)
    print(f"\n{make_findings_table(result)}", flush=True)
    for name, experts in result["experts"].items():
        print(f"\n{name}, what the expert of each domain reads:\n{make_expert_table(experts)}", flush=True)
    return result


def _check(arguments: SpecialisationArguments) -> None:
    arguments.runs(NUM_RUNS)
    names = ("sequences_per_domain", "num_steps", "save_steps", "hidden_size", "num_experts", "experts_per_token")
    require_at_least_one(arguments, *names, "held_out_tokens")
    require(arguments.sequence_length >= 2, "sequence_length", arguments.sequence_length, "at least 2")
    require(arguments.num_layers >= 2, "num_layers", arguments.num_layers, "at least 2: the first has no experts")
    require(arguments.vocab_size >= 257, "vocab_size", arguments.vocab_size, "at least 257: bytes and the end of text")
    require(arguments.learning_rate > 0, "learning_rate", arguments.learning_rate, "more than 0")
    if arguments.num_experts <= arguments.experts_per_token:
        raise SettingsError(
            f"--num_experts ({arguments.num_experts}) must be more than --experts_per_token "
            f"({arguments.experts_per_token})."
        )


def _open_parts(arguments: SpecialisationArguments, domains: Domains) -> Path:
    """The folder of what was done before with these settings and this text; emptied if there are others."""
    folder = Path(arguments.output_dir) / PARTS
    ignored = ("output_dir", "plot", "num_runs", "save_steps", "text_folder")
    settings = {name: value for name, value in asdict(arguments).items() if name not in ignored}
    settings["digest"] = hashlib.sha256((domains.digest() + json.dumps(settings)).encode()).hexdigest()
    path = folder / "settings.json"
    if folder.is_dir() and read_json(path) != settings:
        print(f"{folder} is of other settings or other text: starting anew", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return folder


def _report(label: str, notices: Every, training: Training) -> None:
    if notices.is_due():
        print(
            f"{label}, {training.name}: step {training.steps:,} of {training.arguments.num_steps:,}, "
            f"loss {training.loss:.3f}",
            flush=True,
        )


def describe_domains(domains: Domains, seed: int) -> dict[str, Any]:
    """Numbers of the text. `token_bits`: what a token alone tells about its domain, corrected as `label_figures`."""
    tokens = domains.held_out.flatten()
    of_token = figures.label_figures(
        tokens.view(-1, 1, 1), domains.held_out_domains, len(domains.tokenizer), len(domains.names), seed
    )
    drawn = figures.effective_tokens(torch.zeros_like(tokens), tokens, len(domains.tokenizer))
    return {
        "source": domains.source,
        "domains": domains.names,
        "tokens_of_vocabulary": len(domains.tokenizer),
        "train_tokens": {name: ids.numel() for name, ids in zip(domains.names, domains.train, strict=True)},
        "held_out_tokens": domains.held_out.numel(),
        "token_bits": round(of_token["bits"], 5),
        "effective_tokens": round(drawn, 3),
    }


def measure(training: Training) -> dict[str, Any]:
    """Every figure of a trained model.

    Returns:
        `facts` of the model, `steps` (one entry per recorded step) and `experts` (as by `follow_experts`).
    """
    domains, seed = training.domains, training.arguments.seed
    config = training.model.config
    cost = model_cost(config, training.arguments.sequence_length)
    tokens = domains.held_out.flatten()
    *_, (_, _, last) = training.recorded()
    sizes = {layer: _num_experts(config) for layer in last["layers"]}
    steps = []
    for step, share, recorded in training.recorded():
        per_token = recorded["nats"].double().view(len(domains.names), -1).mean(1) / (domains.held_out.shape[1] - 1)
        layers = []
        for layer, ids in recorded["layers"].items():
            ids = ids.int()
            by_domain = figures.label_figures(ids, domains.held_out_domains, sizes[layer], len(domains.names), seed)
            same, any_token = _consistency(ids, tokens, seed)
            final = figures.agreement_with(ids, last["layers"][layer].int(), seed)
            layers.append(
                {
                    "layer": layer,
                    "experts_read": len(ids.unique()),
                    **{name: by_domain[name] for name in ("entropy", "entropy_shuffled", "bits")},
                    **{f"own_{name}": s for name, s in zip(domains.names, by_domain["own_shares"], strict=True)},
                    **figures.token_figures(ids, tokens, len(domains.tokenizer), seed),
                    "same_token": same,
                    "any_token": any_token,
                    "as_at_end": final["agreement"],
                    "as_at_end_by_chance": final["chance"],
                }
            )
        steps.append(
            {
                "step": step,
                "share": share,
                "trained_tokens": step
                * training.arguments.sequences_per_domain
                * domains.held_out.shape[1]
                * len(domains.names),
                "cpu_seconds": recorded["cpu_seconds"],
                "perplexity": math.exp(per_token.mean()),
                **{
                    f"perplexity_{name}": math.exp(nats)
                    for name, nats in zip(domains.names, per_token.tolist(), strict=True)
                },
                "layers": layers,
            }
        )
    return {
        "facts": {
            "feed_forward": training.name,
            "parameters": cost.parameters,
            "forward_flops": cost.forward_flops,
            "num_experts": _num_experts(config),
        },
        "steps": steps,
        "experts": follow_experts(training, sizes),
    }


def _num_experts(config) -> int:
    return config.num_peer_experts if config.sparse_mlp == "peer" else config.num_moe_experts


def _consistency(ids: torch.Tensor, tokens: torch.Tensor, seed: int) -> tuple[float, float]:
    """Experts in common of two occurrences of a token, and of any two tokens, as shares."""
    table, chance = routing_consistency(ids, tokens, seed)
    pairs = table["pairs"].double()
    return float((table["overlap"].double() * pairs).sum() / pairs.sum()), chance


def follow_experts(training: Training, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """The expert of each domain that `choose_cluster_experts` chooses at the end, and what it read at each step.

    Returns:
        For each domain that has one: `domain`, `layer`, `expert`, and `reads` by step: `step`, `share`, `tokens` (how
        many it read), `divergence`, `own_share` (of its reads, those in the domain), `typical` (token and share).
    """
    domains = training.domains
    tokens, spell = domains.held_out.flatten(), Spelling(domains.tokenizer)
    labels = domains.held_out_domains.repeat_interleave(domains.held_out.shape[1])
    token_shares = torch.bincount(tokens, minlength=len(domains.tokenizer)).double() / len(tokens)
    *_, (_, _, last) = training.recorded()
    names = list(last["layers"])
    chosen = figures.choose_cluster_experts(
        [(last["layers"][name], sizes[name]) for name in names], tokens, labels, len(domains.names)
    )
    followed = [
        {"domain": domain, "layer": names[place[0]], "expert": place[1], "reads": []}
        for domain, place in zip(domains.names, chosen, strict=True)
        if place
    ]
    for step, share, recorded in training.recorded():
        for row in followed:
            reads = (recorded["layers"][row["layer"]].flatten(1) == row["expert"]).any(1)
            typical, divergence = figures.typical_tokens(tokens[reads], token_shares, NUM_SHOWN)
            own = (labels[reads] == domains.names.index(row["domain"])).double()
            row["reads"].append(
                {
                    "step": step,
                    "share": share,
                    "tokens": int(reads.sum()),
                    "divergence": round(divergence, 4),
                    "own_share": round(float(own.mean()), 4) if len(own) else None,
                    "typical": [[spell(token), round(part, 4)] for token, part in typical],
                }
            )
    return followed


def _summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one feed-forward, from all runs: measured values as mean and deviation."""
    rows = []
    for of_step in zip(*(run["steps"] for run in runs), strict=True):
        first = of_step[0]
        layers = [
            {
                name: value if name == "layer" else mean_and_deviation([layer[name] for layer in of_layer])
                for name, value in of_layer[0].items()
            }
            for of_layer in zip(*(step["layers"] for step in of_step), strict=True)
        ]
        measured = [name for name in first["layers"][0] if name != "layer"]
        rows.append(
            {
                **runs[0]["facts"],
                "runs": len(runs),
                **{name: first[name] for name in ("step", "share", "trained_tokens")},
                "cpu_seconds": mean_and_deviation([step["cpu_seconds"] for step in of_step]),
                **{
                    name: mean_and_deviation([step[name] for step in of_step])
                    for name in first
                    if name.startswith("perplexity")
                },
                # of all layers with experts
                "mean": {
                    name: mean_and_deviation([mean(layer[name] for layer in step["layers"]) for step in of_step])
                    for name in measured
                },
                "layers": layers,
            }
        )
    return rows


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result as a Markdown table: figures are means over the layers with experts."""
    return as_markdown(
        [
            {
                "feed-forward, steps": f"{row['feed_forward']}, {row['step']:,} ({row['share']:.0%})",
                "test perplexity": with_deviation(row["perplexity"], ".1f"),
                **_printed(row["mean"]),
            }
            for row in rows
        ]
    )


def make_layer_table(rows: Sequence[dict[str, Any]]) -> str:
    """The last step of each feed-forward as a Markdown table, by layer."""
    return as_markdown(
        [
            {
                "feed-forward, layer": f"{row['feed_forward']}, {layer['layer'].removeprefix('layer_')}",
                "experts": row["num_experts"],
                "of them read": f"{layer['experts_read'][0] / row['num_experts']:.1%}",
                **{
                    f"own share, {name.removeprefix('own_')}": with_deviation(layer[name], ".2f")
                    for name in layer
                    if name.startswith("own_")
                },
                **{name: cell for name, cell in _printed(layer).items() if "end" not in name and "chance" not in name},
            }
            for row in rows
            if row["share"] == 1
            for layer in row["layers"]
        ]
    )


def make_findings_table(result: dict[str, Any]) -> str:
    """What is published beside what was found, as a Markdown table: means over the layers with experts."""
    last = {row["feed_forward"]: row["mean"] for row in result["rows"] if row["share"] == 1}
    early = {row["feed_forward"]: row["mean"] for row in result["rows"] if row["share"] == EARLY}
    most = math.log(len(result["data"]["domains"]))
    findings = [
        (
            "dispatch entropy, nats (labels shuffled)",
            "0.098 (cubic experts), 1.300 (linear experts), of ln 4 = 1.386: Chen et al. 2022, setting 1",
            {
                name: f"{row['entropy'][0]:.3f} ({row['entropy_shuffled'][0]:.3f}), of {most:.3f}"
                for name, row in last.items()
            },
        ),
        (
            "the same experts for the same token (for any token)",
            "routing predominantly by token, minimal context relevance: Xue et al. 2024",
            {name: f"{_percent(row['same_token'])} ({_percent(row['any_token'])})" for name, row in last.items()},
        ),
        (
            f"final routing after {EARLY:.0%} of the steps, chance taken out",
            "determined early, then largely unchanged: Xue et al. 2024",
            {
                name: f"{figures.beyond_chance(row['as_at_end'][0], row['as_at_end_by_chance'][0]):.1%}"
                for name, row in early.items()
            },
        ),
    ]
    return as_markdown(
        [
            {"finding": finding, "published": published, **{name: found.get(name, "-") for name in last}}
            for finding, published, found in findings
        ]
    )


def _printed(found: dict[str, Any]) -> dict[str, str]:
    return {
        "dispatch entropy": with_deviation(found["entropy"], ".3f"),
        "labels shuffled": with_deviation(found["entropy_shuffled"], ".3f"),
        "bits on domain": with_deviation(found["bits"], ".3f"),
        "effective tokens": with_deviation(found["effective_tokens"], ".1f"),
        "tokens shuffled": with_deviation(found["effective_tokens_shuffled"], ".1f"),
        "same experts, same token": _percent(found["same_token"]),
        "any token": _percent(found["any_token"]),
        "as at the end": _percent(found["as_at_end"]),
        "by chance": _percent(found["as_at_end_by_chance"]),
    }


def _percent(pair: Sequence[float | None]) -> str:
    return with_deviation([None if value is None else 100 * value for value in pair], ".1f") + " %"


def make_expert_table(experts: Sequence[dict[str, Any]]) -> str:
    """What the experts of one feed-forward read at each step, as a Markdown table. Empty if there are none.

    A cell has the number of tokens read, the part of them that is in the domain, and the most typical tokens.
    """
    if not experts:
        return ""
    rows = []
    for number, first in enumerate(experts[0]["reads"]):
        cells = {}
        for expert in experts:
            reads = expert["reads"][number]
            words = " ".join(f"`{_visible(token)}`" for token, _ in reads["typical"])
            own = "-" if reads["own_share"] is None else f"{reads['own_share']:.0%}"
            head = f"{expert['domain']}: expert {expert['expert']} of layer {expert['layer'].removeprefix('layer_')}"
            cells[head] = f"{reads['tokens']:,}, {own}: {words}" if reads["tokens"] else "not read"
        rows.append({"steps": f"{first['step']:,}", **cells})
    return as_markdown(rows)


def _visible(token: str) -> str:
    """A token for a cell of a Markdown table: spaces are visible, and no character ends the cell or the code."""
    return token.replace(" ", "␣").replace("|", "¦").replace("`", "'")


def plot_specialisation(result: dict[str, Any], path: str | Path) -> None:
    """Draw bits on the domain, effective tokens, and the share of the final routing, over the recorded steps.

    Args:
        result: what `run_specialisation` returns.
    """
    from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, save_png

    lines: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row in result["rows"]:
        for layer in row["layers"]:
            name = f"{row['feed_forward']}, layer {layer['layer'].removeprefix('layer_')}"
            lines.setdefault(name, []).append((row, layer))
    panels_of = {
        "What an expert tells about the domain": (
            "bits, labels shuffled taken out",
            lambda layer: layer["bits"][0],
        ),
        "Different tokens that an expert reads": (
            "effective number, over random tokens",
            lambda layer: layer["effective_tokens"][0] / layer["effective_tokens_shuffled"][0],
        ),
        "Routing that is already the final one": (
            "share of experts, chance taken out",
            lambda layer: figures.beyond_chance(layer["as_at_end"][0], layer["as_at_end_by_chance"][0]),
        ),
    }
    figure, panels = new_figure(len(panels_of), len(lines))
    for axes, (title, (words, value)) in zip(panels, panels_of.items(), strict=True):
        ends = []
        for number, (name, points) in enumerate(lines.items()):
            style = line_style(number)
            values = [value(layer) for _, layer in points]
            axes.plot(range(len(values)), values, **style)
            ends.append((len(values) - 1, values[-1], name, style))
        rows = [row for row, _ in points]
        axes.set_xticks(range(len(rows)), [f"{row['step']:,}\n{row['share']:.0%}" for row in rows])
        axes.set(title=title, xlabel="steps, and their share of all steps", ylabel=words)
        axes.grid(alpha=0.3)
        if axes is panels[0]:  # before the labels, which fix the limits
            axes.axhline(result["data"]["token_bits"], color="gray", linewidth=0.7)
        label_line_ends(axes, ends)
    figure.suptitle(
        "Left: the gray line is what the token alone tells. Middle: 1 is no specialisation.",
        fontsize="small",
    )
    save_png(figure, path)

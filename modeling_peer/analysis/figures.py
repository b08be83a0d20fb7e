# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""All figures of a recorded text as one dict that JSON can hold, tables of them, and the comparison of two."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis import expert_profiles, expert_weights, statistics
from modeling_peer.analysis.expert_profiles import Spelling
from modeling_peer.analysis.routing_hooks import RoutedLayer, find_routed_layers
from modeling_peer.analysis.routing_trace import LayerTrace, RoutingTrace

MAX_PROFILES = 1000  # over all layers
MAX_PROFILES_PER_LAYER = 256
MAX_TOKEN_ROWS = 9000  # tokens with their experts, over all layers
EXCERPT_TOKENS = 160
NUM_PAIRS = 12  # of experts, by lift
LEAST_PAIR_TOKENS = 10  # tokens that retrieved both experts of a pair
NUM_CONSISTENT = 12  # most and least consistent tokens
LEAST_PAIRS = 8  # pairs of occurrences of such a token


def collect_figures(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trace: RoutingTrace,
    excerpts: Sequence[tuple[str, Sequence[int]]] = (),
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Every figure of the report.

    Args:
        excerpts: short texts, each a name and token ids, for which the report shows the experts of each token. They
            are run once more. Default: the beginning of each recorded text.
        seed: of what is drawn: experts, pairs of tokens.

    Returns:
        `num_tokens`, `sources`, `excerpts`, `layers` (see `layer_figures`) and `across_layers` (see `across_layers`).
    """
    spell = Spelling(tokenizer)
    shown = list(excerpts) or _beginnings(trace)
    read = [expert_profiles.read_along(model, tokens) for _, tokens in shown]
    layers = find_routed_layers(model)
    per_layer = []
    for layer, recorded in zip(tqdm(layers, "Analysing", disable=not show_progress), trace.layers, strict=True):
        in_excerpts = [expert for text in read for token in text[layer.name] for expert, _ in token[:2]]
        limits = min(MAX_PROFILES_PER_LAYER, MAX_PROFILES // len(layers)), MAX_TOKEN_ROWS // len(layers)
        per_layer.append(layer_figures(model, tokenizer, trace, layer, recorded, in_excerpts, *limits, seed))
    return {
        "num_tokens": trace.num_tokens,
        "num_sampled": len(trace.sample.columns["position"]),
        "num_probed": len(trace.probe.columns["position"]),
        "sources": trace.source_names,
        "layers": per_layer,
        "across_layers": across_layers(per_layer),
        "excerpts": [
            {"source": name, "tokens": [spell(token) for token in tokens], "experts": experts}
            for (name, tokens), experts in zip(shown, read, strict=True)
        ],
    }


def layer_figures(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trace: RoutingTrace,
    layer: RoutedLayer,
    recorded: LayerTrace,
    wanted_experts: Sequence[int] = (),
    num_profiles: int = MAX_PROFILES_PER_LAYER,
    num_token_rows: int = MAX_TOKEN_ROWS,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of one layer, by the functions of `statistics`, `expert_weights` and `expert_profiles`.

    Args:
        wanted_experts: experts to profile beside those of `choose_experts`, at most half of them; the most frequent.
    """
    spell = Spelling(tokenizer)
    columns, probe = trace.sample.columns, trace.probe.columns
    ids, gates = columns[f"{layer.name}/expert_ids"], columns[f"{layer.name}/gates"]
    positions = columns["position"].long()
    tokens = trace.token_ids[positions].long()
    occurrences = torch.bincount(trace.token_ids.long())
    entropy = statistics.gate_entropy(gates)
    hidden = probe[f"{layer.name}/hidden_states"]
    probed, probed_gates = probe[f"{layer.name}/expert_ids"], probe[f"{layer.name}/gates"]
    few = slice(0, 256)  # tokens for what compares all pairs of a token's experts
    fixed_number = not layer.chooses_tokens

    frequent = [expert for expert, _ in _by_count(wanted_experts)][: num_profiles // 2]
    chosen = expert_profiles.choose_experts(recorded, num_profiles - len(frequent), seed)
    chosen = torch.cat([chosen, torch.tensor(frequent, dtype=torch.int64)]).unique()
    by_token = expert_profiles.experts_of_tokens(trace, recorded)
    by_token = dict(sorted(by_token.items(), key=lambda item: -item[1][0])[:num_token_rows])
    return {
        "name": layer.name,
        "index": layer.index,
        "num_experts": layer.num_experts,
        "num_heads": layer.num_heads,
        "num_active": gates.shape[2],
        "is_grid": layer.has_single_neurons,
        "usage": statistics.usage_table(recorded),
        "heat_map": _rounded(statistics.heat_map(recorded.counts.sum(0))),
        "head_overlap": _rounded(statistics.head_overlap(ids)),
        "entropy": {
            "mean": entropy.mean().item(),
            "largest": math.log(gates.shape[2]),
            "by_head": entropy.mean(0).tolist(),
            "by_position": statistics.means_by_power_of_two(entropy.mean(1), trace.position_in_sequence(positions)),
            "by_frequency": statistics.means_by_power_of_two(entropy.mean(1), occurrences[tokens]),
        },
        "consistency": _consistency(ids, tokens, occurrences, spell, seed) if fixed_number else None,
        "co_activation": _pairs(ids, gates, chosen, layer.num_experts),
        "weights": {
            "similarity": expert_weights.weight_similarity(layer, seed),
            "gates_r2": expert_weights.gates_against_weights(layer, seed),
            "outputs": expert_weights.output_similarity(layer, hidden[few], probed[few].flatten(1), seed),
            "norms": expert_weights.norms_against_gates(layer, hidden, probed, probed_gates),
        },
        "profiles": [
            profile.as_dict() for profile in expert_profiles.profile_experts(model, tokenizer, trace, layer, chosen)
        ],
        "tokens": [
            {"token": spell(token), "sampled": count, "experts": experts}
            for token, (count, experts) in by_token.items()
        ],
    }


def across_layers(layers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The observations of "A Closer Look" by layer, and `last_layer_outlier` of each."""
    measures: dict[str, list[float]] = {}
    for layer in layers:
        weights = layer["weights"]
        for name, cosines in weights["similarity"].items():
            measures.setdefault(f"cosine of experts' {name}", []).append(cosines["mean"])
        measures.setdefault("cosine of outputs, chosen experts", []).append(weights["outputs"]["chosen"])
        measures.setdefault("cosine of outputs, other experts", []).append(weights["outputs"]["other"])
        measures.setdefault("rank correlation of norm and gate", []).append(weights["norms"]["rank_correlation"])
        measures.setdefault("active neurons", []).append(weights["norms"]["active_neurons"])
    return {
        name: {"values": values, **expert_weights.last_layer_outlier(values)}
        for name, values in measures.items()
        if len(values) == len(layers)
    }


def usage_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Usage of each layer and head, as a table."""
    return [
        {
            "layer": layer["name"],
            "head": row["head"],
            "expert usage": f"{row['expert_usage']:.1%}",
            "unevenness": "-" if row["unevenness"] is None else f"{row['unevenness']:.3f}",
            "top-1 usage": f"{row['top_1_usage']:.1%}",
            "dead experts": row["dead_experts"],
        }
        for layer in figures["layers"]
        for row in layer["usage"]
    ]


def routing_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Overlap of heads, entropy and consistency of each layer, as a table."""
    rows = []
    for layer in figures["layers"]:
        consistency = layer["consistency"] or {"mean": math.nan, "chance": math.nan}
        rows.append(
            {
                "layer": layer["name"],
                "overlap of heads": _percent(mean_overlap(layer)),
                "gate entropy (nats)": f"{layer['entropy']['mean']:.3f} of {layer['entropy']['largest']:.3f}",
                "same experts, same token": _percent(consistency["mean"]),
                "same experts, any token": _percent(consistency["chance"]),
            }
        )
    return rows


def weight_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The observations of "A Closer Look", a row each, as a table."""
    verdicts = {True: "an outlier", False: "no outlier", None: "too few layers"}
    names = [layer["name"] for layer in figures["layers"]]
    return [
        {
            "measure": measure,
            **{name: f"{value:.4f}" for name, value in zip(names, found["values"], strict=True)},
            "last layer": verdicts[found["outlier"]],
        }
        for measure, found in figures["across_layers"].items()
    ]


def compare(figures: dict[str, Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """Two models on the same text, layer by layer in the order of each model: their figures and the difference.

    Returns:
        Rows with `layer`, `figure`, `this`, `beside` and `difference`; where a model has more layers, theirs are left
        out.
    """
    rows = []
    for first, second in zip(figures["layers"], beside["layers"], strict=False):
        label = first["name"] if first["name"] == second["name"] else f"{first['name']} / {second['name']}"
        ours, theirs = _summary(first), _summary(second)
        for name in ours:
            this, that = ours[name], theirs[name]
            rows.append({"layer": label, "figure": name, "this": this, "beside": that, "difference": this - that})
    return rows


def compare_rows(figures: dict[str, Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """`compare` as a table."""
    return [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in compare(figures, beside)
    ]


def mean_overlap(layer: dict[str, Any]) -> float:
    """Mean of the overlaps of two different heads; NaN with one head."""
    matrix = torch.tensor(layer["head_overlap"])
    heads = len(matrix)
    return math.nan if heads < 2 else ((matrix.sum() - matrix.trace()) / (heads * (heads - 1))).item()


def _summary(layer: dict[str, Any]) -> dict[str, float]:
    usage, consistency = layer["usage"][0], layer["consistency"] or {"mean": math.nan, "chance": math.nan}
    return {
        "expert usage": usage["expert_usage"],
        "unevenness": math.nan if usage["unevenness"] is None else usage["unevenness"],
        "top-1 usage": usage["top_1_usage"],
        "dead experts": float(usage["dead_experts"]),
        "overlap of heads": mean_overlap(layer),
        "gate entropy": layer["entropy"]["mean"],
        "same experts, same token": consistency["mean"],
        "same experts, any token": consistency["chance"],
        "cosine of outputs, chosen": layer["weights"]["outputs"]["chosen"],
        "rank correlation of norm and gate": layer["weights"]["norms"]["rank_correlation"],
    }


def _consistency(ids, tokens, occurrences, spell, seed) -> dict[str, Any]:
    table, chance = statistics.routing_consistency(ids, tokens, seed)
    pairs, overlap = table["pairs"], table["overlap"]
    enough = (pairs >= LEAST_PAIRS).nonzero().squeeze(1)
    order = enough[overlap[enough].argsort(descending=True)].tolist()

    def rows(places):
        return [
            {"token": spell(int(table["token"][i])), "pairs": int(pairs[i]), "overlap": round(overlap[i].item(), 4)}
            for i in places
        ]

    weighted = (overlap.double() * pairs).sum() / pairs.sum().clamp(min=1)
    return {
        "mean": weighted.item() if len(pairs) else math.nan,
        "chance": chance,
        "by_frequency": statistics.means_by_power_of_two(overlap, occurrences[table["token"]]),
        "most": rows(order[:NUM_CONSISTENT]),
        "least": rows(order[NUM_CONSISTENT:][-NUM_CONSISTENT:][::-1]),
    }


def _pairs(ids, gates, chosen, num_experts) -> list[dict[str, Any]]:
    counts, lift = statistics.co_activation(ids, gates, chosen, num_experts)
    first, second = torch.triu_indices(len(chosen), len(chosen), offset=1)
    values = lift[first, second].nan_to_num(0.0).where(counts[first, second] >= LEAST_PAIR_TOKENS, 0.0)
    best = values.topk(min(NUM_PAIRS, len(values)))
    return [
        {
            "experts": [int(chosen[first[i]]), int(chosen[second[i]])],
            "tokens": int(counts[first[i], second[i]]),
            "lift": round(value, 2),
        }
        for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if value > 0
    ]


def _beginnings(trace: RoutingTrace) -> list[tuple[str, list[int]]]:
    shown = []
    for number, name in enumerate(trace.source_names):
        sequences = (trace.sequence_sources == number).nonzero().squeeze(1)
        if len(sequences):
            start = int(trace.sequence_starts[sequences[0]])
            shown.append((name, trace.context(start, 0, EXCERPT_TOKENS - 1)[0]))
    return shown


def _by_count(values: Sequence[int]) -> list[tuple[int, int]]:
    counts: dict[int, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _rounded(values: torch.Tensor) -> list:
    """Nested lists with four digits; None where NaN."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sparse probing with one feature (k = 1): how well does a single expert, or neuron, say what a token is?

As in Gurnee et al. 2023 (arXiv:2305.01610), with labels that regular expressions make. The probe is a threshold on one
feature. Feature, direction and threshold are those with the best F1 on one half of the sequences, and the F1 that
counts is on the other half. Features are

    of an expert        its gate, or gate times neuron, summed over the heads that retrieved it; 0 where none did
    of a dense neuron   what the neuron passes on: the input of the MLP's `down_proj`
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_peer.analysis.expert_weights import expert_neurons
from modeling_peer.analysis.routing_hooks import observe_routing, routed_layers
from modeling_peer.console.tables import mean_and_deviation, with_deviation

EXPERT_FEATURES = ("gate", "neuron")
# A token has a label if it overlaps a match.
LABELS = {
    "digit": r"\d",
    "capitalised word": r"\b[A-ZÀ-Ý][a-zà-ÿ]+",
    "word in capitals": r"\b[A-Z]{2,}\b",
    "letter with an accent": r"[À-ÖØ-öø-ÿ]",
    "full stop": r"\.(?=\s|$)",
    "comma": r",",
    "question mark": r"\?",
    "line end": r"\n",
    "indentation": r"(?m)^[ \t]{2,}",
    "opening bracket": r"[(\[{]",
    "in brackets": r"\([^()\n]*\)",
    "in double quotes": r"\"[^\"\n]*\"",
    "comment of Python": r"(?m)#.*$",
    "keyword of Python": r"\b(?:def|return|import|from|class|self|None|elif|raise|except)\b",
    "name with an underscore": r"\b[A-Za-z]*_\w+",
    "operator": r"[=+*/<>-]",
    "amount of money": r"\$\s?\d[\d,.]*",
    "article of English": r"\b(?:[Tt]he|[Aa]n?)\b",
    "article of French": r"\b(?:[Ll]e|[Ll]a|[Ll]es|[Uu]n|[Uu]ne|[Dd]es)\b",
    "year": r"\b1[89]\d\d\b|\b20[0-2]\d\b",
}
MIN_POSITIVES = 20  # of a label, in each half; fewer say nothing


@dataclass
class LabelledTokens:
    """Sequences of tokens with their labels.

    Args:
        sequences: token ids of each.
        labels: by name, for all tokens in the order of the sequences, `(num_tokens,)`, bool.
    """

    sequences: list[list[int]]
    labels: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))

    def halves(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two masks of tokens, `(num_tokens,)`: the sequences divided at random."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(len(self.sequences), generator=generator) < len(self.sequences) // 2
        mask = torch.repeat_interleave(first, torch.tensor([len(one) for one in self.sequences]))
        return mask, ~mask


@dataclass
class LayerFeatures:
    """Features of one layer on all tokens, sorted by feature, then by falling value.

    Args:
        name: of the layer.
        feature, token, value: `(num_entries,)`: int64, int64 and float32.
        is_complete: whether every token has an entry for every feature. Otherwise missing values are 0.
    """

    name: str
    feature: torch.Tensor
    token: torch.Tensor
    value: torch.Tensor
    is_complete: bool

    @classmethod
    def sort(cls, name, feature, token, value, is_complete) -> "LayerFeatures":
        order = value.argsort(descending=True)
        order = order[feature[order].argsort(stable=True)]
        return cls(name, feature[order], token[order], value[order], is_complete)


@dataclass
class Probe:
    """The feature that says best whether a token has a label.

    Args:
        layer, feature: which one.
        threshold, is_above: it says yes if its value is at least (at most) the threshold.
        train_f1, f1: on the tokens that chose it, and on the others.
    """

    layer: str
    feature: int
    threshold: float
    is_above: bool
    train_f1: float
    f1: float


def label_tokens(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, max_tokens: int
) -> LabelledTokens:
    """Tokens of several texts in sequences, with `LABELS` and, for each text, whether a token is from it.

    Args:
        texts: by name; each gets an equal part of `max_tokens`.
        tokenizer: a fast one, which knows where in the text a token is.
    """
    sequences, labels = [], {name: [] for name in [*LABELS, *texts]}
    for name, text in texts.items():
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        count = min(max_tokens // len(texts), len(encoded["input_ids"])) // sequence_length * sequence_length
        ids = encoded["input_ids"][:count]
        sequences += [ids[start : start + sequence_length] for start in range(0, count, sequence_length)]
        begins, ends = torch.tensor(encoded["offset_mapping"][:count], dtype=torch.int64).view(-1, 2).unbind(1)
        for label, pattern in LABELS.items():
            marked = torch.zeros(len(text) + 1, dtype=torch.int32)
            for match in re.finditer(pattern, text):
                marked[match.start() : match.end()] = 1
            before = torch.cat([marked.new_zeros(1), marked.cumsum(0)])
            labels[label].append(before[ends] > before[begins])
        for other in texts:
            labels[other].append(torch.full((count,), other == name))
    return LabelledTokens(sequences, {name: torch.cat(parts) for name, parts in labels.items()})


@torch.no_grad()
def record_features(
    model: PreTrainedModel, tokens: LabelledTokens, expert_feature: str = "neuron", batch_size: int = 8
) -> list[LayerFeatures]:
    """Features of each layer: of its experts or, if the model has no experts of one neuron, of its dense MLPs.

    Raises:
        ValueError: the model has neither, or `expert_feature` is unknown.
    """
    if expert_feature not in EXPERT_FEATURES:
        raise ValueError(f"expert_feature={expert_feature!r} is unknown. Known: {', '.join(EXPERT_FEATURES)}.")
    sparse, dense, start = {}, {}, 0

    def observe(layer, routing):
        if not layer.has_single_neurons:
            return
        ids, gates = routing.expert_ids.flatten(1), routing.gates.float().flatten(1)
        values = gates * expert_neurons(layer, routing.hidden_states, ids) if expert_feature == "neuron" else gates
        place = (torch.arange(start, start + len(ids)).unsqueeze(1) * layer.num_experts + ids.cpu()).flatten()
        keys, slots = place.unique(return_inverse=True)
        sums = torch.zeros(len(keys)).index_add_(0, slots, values.flatten().cpu())
        sparse.setdefault(layer.name, []).append((keys % layer.num_experts, keys // layer.num_experts, sums))

    def keep_input(name):
        def hook(module, args):
            dense.setdefault(name, []).append(args[0].flatten(0, -2).float().cpu())

        return hook

    was_training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        has_experts = any(layer.has_single_neurons for layer in routed_layers(model))
        for path, module in [] if has_experts else model.named_modules():
            number = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.(?:dense_)?mlp\.down_proj$", path)
            if number:
                stack.callback(module.register_forward_pre_hook(keep_input(f"layer_{number[1]}")).remove)
        if has_experts:
            stack.enter_context(observe_routing(model, observe))
        for first in tqdm(range(0, len(tokens.sequences), batch_size), desc="Recording", unit=" batches"):
            ids = torch.tensor(tokens.sequences[first : first + batch_size])
            model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
            start += ids.numel()
    found = []
    for name, parts in sparse.items():
        found.append(LayerFeatures.sort(name, *(torch.cat(values) for values in zip(*parts, strict=True)), False))
    for name, parts in dense.items():
        values = torch.cat(parts)
        feature, token = torch.arange(values.shape[1]).repeat(len(values)), torch.arange(len(values))
        token = token.repeat_interleave(values.shape[1])
        found.append(LayerFeatures.sort(name, feature, token, values.flatten(), True))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has neither experts of single neurons nor dense MLPs (mlp.down_proj)."
        )
    return found


def best_probes(
    layers: Sequence[LayerFeatures], labels: dict[str, torch.Tensor], train: torch.Tensor
) -> dict[str, Probe]:
    """The best feature of all layers for each label, chosen on the tokens of `train` and scored on the others.

    Args:
        labels: by name, `(num_tokens,)`, bool.
        train: same shape.
    """
    best: dict[str, tuple[float, LayerFeatures, int, float, bool]] = {}
    for layer in layers:
        for is_above in (True, False):
            for name, (f1, feature, threshold) in _best_thresholds(layer, labels, train, is_above).items():
                if name not in best or f1 > best[name][0]:
                    best[name] = f1, layer, feature, threshold, is_above
    probes = {}
    for name, (train_f1, layer, feature, threshold, is_above) in best.items():
        first, last = torch.searchsorted(layer.feature, torch.tensor([feature, feature + 1])).tolist()
        values = layer.value[first:last]
        yes = layer.token[first:last][values >= threshold if is_above else values <= threshold]
        yes = yes[~train[yes]]
        hits, positives = int(labels[name][yes].sum()), int((labels[name] & ~train).sum())
        f1 = 2 * hits / max(1, len(yes) + positives)
        probes[name] = Probe(layer.name, feature, threshold, is_above, train_f1, f1)
    return probes


def _best_thresholds(
    layer: LayerFeatures, labels: dict[str, torch.Tensor], train: torch.Tensor, is_above: bool
) -> dict[str, tuple[float, int, float]]:
    """The best F1 on `train` of any threshold on any feature, for each label: F1, feature and threshold."""
    used = train[layer.token]
    if not layer.is_complete:  # tokens without an entry are at 0, so no threshold may reach it
        used &= layer.value > 0 if is_above else layer.value < 0
    feature, token, value = layer.feature[used], layer.token[used], layer.value[used]
    if not len(feature):
        return dict.fromkeys(labels, (0.0, 0, 0.0))
    if not is_above:
        feature, token, value = feature.flip(0), token.flip(0), value.flip(0)
    begins = torch.ones_like(feature, dtype=torch.bool)
    begins[1:] = feature[1:] != feature[:-1]
    starts = begins.nonzero().squeeze(1)
    sizes = torch.diff(starts, append=torch.tensor([len(feature)]))
    said_yes = torch.arange(1, len(feature) + 1) - starts.repeat_interleave(sizes)
    tied = torch.zeros_like(begins)  # a threshold cannot divide equal values
    tied[:-1] = (value[1:] == value[:-1]) & ~begins[1:]
    result = {}
    for name, marks in labels.items():
        hits = marks[token].cumsum(0, dtype=torch.int32)
        before = torch.where(starts > 0, hits[starts - 1], 0)
        f1 = 2 * (hits - before.repeat_interleave(sizes)) / (said_yes + (marks & train).sum())
        place = int(f1.masked_fill_(tied, -1.0).argmax())
        result[name] = f1[place].item(), int(feature[place]), value[place].item()
    return result


def probe_labels(
    features: dict[str, Sequence[LayerFeatures]], tokens: LabelledTokens, num_splits: int = 5
) -> list[dict[str, Any]]:
    """Probes of all labels that are frequent enough, for each of several models on the same tokens.

    Args:
        features: result of `record_features`, by the name of the model.
        num_splits: divisions into halves; figures are means over them.

    Returns:
        Rows with `label`, `share` (of the tokens) and, in `models` by name, `f1` (a list, one per split) and `probe`
        (of the first split).
    """
    splits = [tokens.halves(seed) for seed in range(num_splits)]
    labels = {
        name: marks
        for name, marks in tokens.labels.items()
        if all(int((marks & half).sum()) >= MIN_POSITIVES for halves in splits for half in halves)
    }
    rows = [{"label": name, "share": marks.float().mean().item(), "models": {}} for name, marks in labels.items()]
    with tqdm(total=len(features) * num_splits, desc="Probing", unit=" splits") as progress:
        for model, layers in features.items():
            probes = []
            for train, _ in splits:
                probes.append(best_probes(layers, labels, train))
                progress.update()
            for row in rows:
                found = [split[row["label"]] for split in probes]
                row["models"][model] = {"f1": [probe.f1 for probe in found], "probe": vars(found[0])}
    return rows


def probe_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per label, and one of the means over labels: F1 of each model, mean and deviation over the splits."""
    table = []
    for row in rows:
        cells = {name: with_deviation(mean_and_deviation(found["f1"]), ".3f") for name, found in row["models"].items()}
        table.append({"label": row["label"], "tokens": f"{row['share']:.2%}", **cells})
    if rows:
        means = {name: mean_and_deviation(_means_by_split(rows, name)) for name in rows[0]["models"]}
        table.append({"label": "mean", "tokens": "", **{name: with_deviation(m, ".3f") for name, m in means.items()}})
    return table


def margin(rows: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """How far the F1 of one model is above that of another.

    Returns:
        over_splits: mean and deviation over the splits of the difference of the means over labels.
        over_labels: mean and deviation over the labels of the difference.
        labels_won: number of labels with the higher F1, of `num_labels`.
    """
    by_split = zip(_means_by_split(rows, first), _means_by_split(rows, second), strict=True)
    by_label = [
        sum(row["models"][first]["f1"]) / len(row["models"][first]["f1"])
        - sum(row["models"][second]["f1"]) / len(row["models"][second]["f1"])
        for row in rows
    ]
    return {
        "over_splits": mean_and_deviation([a - b for a, b in by_split]),
        "over_labels": mean_and_deviation(by_label),
        "labels_won": sum(difference > 0 for difference in by_label),
        "num_labels": len(rows),
    }


def _means_by_split(rows: list[dict[str, Any]], name: str) -> list[float]:
    values = zip(*(row["models"][name]["f1"] for row in rows), strict=True)
    return [sum(split) / len(split) for split in values]

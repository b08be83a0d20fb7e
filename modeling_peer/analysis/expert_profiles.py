# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What single experts respond to and what they write, and the experts of a token.

What an expert responds to: the contexts in which it had its largest gates, as in the table of Shazeer et al. 2017
(arXiv:1701.06538, appendix E), and the tokens that its gates go to. What it writes: the tokens whose logits its row of
`up_embed` raises.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.expert_weights import table_rows
from modeling_peer.analysis.routing_hooks import RoutedLayer, observe_routing
from modeling_peer.analysis.routing_trace import LayerTrace, RoutingTrace

# Of a context, at most so many tokens and then characters: tokens of bytes are short.
TOKENS_BEFORE, TOKENS_AFTER = 40, 24
CHARACTERS_BEFORE, CHARACTERS_AFTER = 48, 28


@dataclass
class ExpertProfile:
    """What one expert does.

    Args:
        expert: its id, `row · num_sub_keys + column`.
        count: times it was retrieved, by any head.
        best_count: times it was a head's best.
        gate_sum: sum of its gates.
        contexts: rows with `gate`, `before`, `token`, `after` and `source`: texts around the tokens with its largest
            gates, each token once.
        tokens: `(token, share)`: what its gates go to, in the sample, largest share first.
        sources: `(source, share)`: the same by text; shares are of gates per token of the text, so that a longer text
            does not count for more.
        promotes, suppresses: `(token, score)`: what it writes if its neuron is positive; see `written_tokens`. Empty
            for an expert that is a whole MLP.
    """

    expert: int
    count: int
    best_count: int
    gate_sum: float
    contexts: list[dict[str, Any]]
    tokens: list[tuple[str, float]]
    sources: list[tuple[str, float]]
    promotes: list[tuple[str, float]]
    suppresses: list[tuple[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def choose_experts(layer: LayerTrace, num_experts: int, seed: int = 0) -> torch.Tensor:
    """Experts to look at: a third with the largest gate sums, a third that were most often a head's best, and a third
    drawn evenly among those that have all their contexts, so that not only busy ones are seen.

    Returns:
        Sorted ids, `(at most num_experts,)`, int64; experts that were not retrieved are left out.
    """
    sums, best = layer.gate_sums.sum(0).cpu(), layer.best_counts.sum(0).cpu()
    third = -(-num_experts // 3)
    busiest = sums.topk(min(third, len(sums))).indices
    leading = best.topk(min(third, len(best))).indices
    _, gates = layer.top_contexts()
    full = (gates[:, -1] > 0).nonzero().squeeze(1).cpu()
    full = full[~torch.isin(full, torch.cat([busiest, leading]))]
    generator = torch.Generator().manual_seed(seed)
    drawn = full[torch.randperm(len(full), generator=generator)[:third]]
    chosen = torch.cat([busiest, leading, drawn]).unique()
    return chosen[sums[chosen] > 0]


def profile_experts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trace: RoutingTrace,
    layer: RoutedLayer,
    expert_ids: torch.Tensor,
    num_contexts: int = 8,
    num_tokens: int = 8,
) -> list[ExpertProfile]:
    """Profiles of some experts of one layer, in the order of `expert_ids`, `(num_chosen,)`."""
    recorded = next(found for found in trace.layers if found.name == layer.name)
    spell = Spelling(tokenizer)
    positions, gates = (values[expert_ids].cpu() for values in recorded.top_contexts())
    tokens = token_shares(trace, recorded, expert_ids, num_tokens)
    sources = source_shares(trace, recorded, expert_ids)
    written = written_tokens(model, layer, expert_ids, num_tokens) if layer.has_single_neurons else None
    counts, best, sums = (values.sum(0)[expert_ids] for values in _totals(recorded))
    profiles = []
    for row, expert in enumerate(expert_ids.tolist()):
        promotes, suppresses = written[row] if written else ([], [])
        profiles.append(
            ExpertProfile(
                expert=expert,
                count=int(counts[row]),
                best_count=int(best[row]),
                gate_sum=float(sums[row]),
                contexts=_contexts(trace, spell, positions[row], gates[row], num_contexts),
                tokens=[(spell(token), share) for token, share in tokens[row]],
                sources=[(trace.source_names[number], share) for number, share in sources[row]],
                promotes=[(spell(token), score) for token, score in promotes],
                suppresses=[(spell(token), score) for token, score in suppresses],
            )
        )
    return profiles


@torch.no_grad()
def written_tokens(
    model: torch.nn.Module, layer: RoutedLayer, expert_ids: torch.Tensor, num_tokens: int = 8
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Tokens that the experts' rows of `up_embed` promote and suppress, through the output embedding.

        score = W_out (norm_weight ⊙ up), minus its mean over the vocabulary, over its standard deviation

    The weight of the model's final norm is applied. The norm also divides by the size of the whole hidden state: one
    positive number per token, which changes no order. Later layers, which also read what the expert writes, are left
    out. A negative neuron does the opposite: GELU's are at least -0.17.

    Returns:
        For each expert, the tokens with the largest scores and those with the least: pairs of token id and score.
    """
    rows = table_rows(layer, "up_embed", expert_ids)
    output = model.get_output_embeddings()
    if output is None:
        return [([], [])] * len(rows)
    norm = getattr(model.get_decoder(), "norm", None)
    weight = getattr(norm, "weight", None)
    if weight is not None:
        rows = rows * weight.detach().float()
    result = []
    for part in rows.split(256):
        logits = part @ output.weight.detach().float().T  # (experts, vocabulary)
        logits = logits - logits.mean(dim=1, keepdim=True)
        scores = logits / logits.std(dim=1, keepdim=True).clamp(min=1e-12)
        high, low = scores.topk(num_tokens), scores.topk(num_tokens, largest=False)
        for row in range(len(part)):
            result.append(
                tuple(list(zip(k.indices[row].tolist(), k.values[row].tolist(), strict=False)) for k in (high, low))
            )
    return result


def token_shares(
    trace: RoutingTrace, layer: LayerTrace, expert_ids: torch.Tensor, num_tokens: int = 8
) -> list[list[tuple[int, float]]]:
    """The tokens that the experts' gates go to, in the sample: token ids and shares, largest first."""
    tokens = _sampled_tokens(trace)
    return _shares_by_group(trace, layer, expert_ids, tokens, num_tokens)


def source_shares(trace: RoutingTrace, layer: LayerTrace, expert_ids: torch.Tensor) -> list[list[tuple[int, float]]]:
    """The texts that the experts' gates go to, per sampled token of the text: numbers of the texts and shares."""
    sources = trace.source_of(trace.sample.columns["position"])
    sizes = torch.bincount(sources, minlength=len(trace.source_names))
    return _shares_by_group(trace, layer, expert_ids, sources, len(trace.source_names), 1.0 / sizes.clamp(min=1))


def experts_of_tokens(
    trace: RoutingTrace, layer: LayerTrace, num_experts: int = 6, least_occurrences: int = 3
) -> dict[int, tuple[int, list[tuple[int, float]]]]:
    """For each token that occurs in the sample: how often, and the experts with the largest mean gates.

    Gates of all heads add up. Rarer tokens than `least_occurrences` are left out.
    """
    columns = trace.sample.columns
    tokens = _sampled_tokens(trace)
    counts = torch.bincount(tokens)
    ids, gates = columns[f"{layer.name}/expert_ids"].flatten(1).long(), columns[f"{layer.name}/gates"].flatten(1)
    frequent = counts[tokens] >= least_occurrences
    pair = tokens[frequent, None] * layer.num_experts + ids[frequent]
    keys, places = pair.flatten().unique(return_inverse=True)
    sums = torch.zeros(len(keys)).index_add_(0, places, gates[frequent].flatten())
    owners, experts = keys // layer.num_experts, keys % layer.num_experts
    order = torch.argsort(owners * 2.0**20 - sums.double())  # by token, then by falling sum: a sum is far below 2**20
    result = {}
    starts = torch.unique_consecutive(owners, return_counts=True)
    begin = 0
    for token, size in zip(*(part.tolist() for part in starts), strict=True):
        rows = order[begin : begin + min(size, num_experts)]
        count = int(counts[token])
        result[token] = (count, [(int(experts[r]), float(sums[r]) / count) for r in rows])
        begin += size
    return result


@torch.no_grad()
def read_along(
    model: torch.nn.Module, token_ids: Sequence[int], num_experts: int = 6
) -> dict[str, list[list[tuple[int, float]]]]:
    """Run a short text and list, by layer and token, the experts with the largest gates: ids and sums over heads."""
    result = {}

    def observe(layer, routing):
        rows = []
        for ids, gates in zip(routing.expert_ids.flatten(1), routing.gates.flatten(1).float(), strict=True):
            experts, places = ids.unique(return_inverse=True)
            sums = torch.zeros(len(experts), device=ids.device).index_add_(0, places, gates)
            best = sums.topk(min(num_experts, len(experts)))
            rows.append([(int(experts[i]), float(v)) for v, i in zip(best.values, best.indices, strict=True) if v > 0])
        result[layer.name] = rows

    was_training = model.training
    model.eval()
    try:
        with observe_routing(model, observe):
            device = next(model.parameters()).device
            decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
            decoder(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False)
    finally:
        model.train(was_training)
    return result


class Spelling:
    """A token as text: spaces and line ends are visible, and bytes that are no whole character are shown as such."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.known:
            text = self.tokenizer.decode([token])
            if "\ufffd" in text:
                text = self.tokenizer.convert_ids_to_tokens(token)
            self.known[token] = text.replace("\n", "⏎").replace("\t", "⇥")
        return self.known[token]

    def text(self, tokens: Sequence[int]) -> str:
        """Several tokens as one text, so that characters of several tokens are whole."""
        return self.tokenizer.decode(list(tokens)).replace("\n", "⏎").replace("\t", "⇥")


def _contexts(trace, spell, positions, gates, num_contexts):
    rows, seen = [], set()
    for position, gate in zip(positions.tolist(), gates.tolist(), strict=True):
        if position < 0 or position in seen or len(rows) == num_contexts:
            continue
        seen.add(position)
        tokens, place = trace.context(position, TOKENS_BEFORE, TOKENS_AFTER)
        rows.append(
            {
                "gate": gate,
                "before": spell.text(tokens[:place])[-CHARACTERS_BEFORE:],
                "token": spell(tokens[place]),
                "after": spell.text(tokens[place + 1 :])[:CHARACTERS_AFTER],
                "source": trace.source_names[int(trace.source_of(torch.tensor([position]))[0])],
            }
        )
    return rows


def _totals(layer: LayerTrace) -> tuple[torch.Tensor, ...]:
    return layer.counts.cpu(), layer.best_counts.cpu(), layer.gate_sums.cpu()


def _sampled_tokens(trace: RoutingTrace) -> torch.Tensor:
    return trace.token_ids[trace.sample.columns["position"].long()].long()


def _shares_by_group(trace, layer, expert_ids, groups, num_shown, weights=None):
    """Shares of each expert's sampled gates by group of token: pairs of group and share, largest first."""
    columns = trace.sample.columns
    place = torch.full((layer.num_experts,), -1, dtype=torch.int64)
    place[expert_ids] = torch.arange(len(expert_ids))
    rows = place[columns[f"{layer.name}/expert_ids"].flatten(1).long()]  # (sampled tokens, experts of a token)
    gates = columns[f"{layer.name}/gates"].flatten(1)
    if weights is not None:
        gates = gates * weights[groups, None]
    num_groups = int(groups.max()) + 1 if len(groups) else 1
    chosen = (rows >= 0) & (gates > 0)
    pair = (rows * num_groups + groups[:, None])[chosen]
    keys, places = pair.unique(return_inverse=True)
    sums = torch.zeros(len(keys)).index_add_(0, places, gates[chosen])
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(expert_ids))]
    for key, value in zip(keys.tolist(), sums.tolist(), strict=True):
        found[key // num_groups].append((key % num_groups, value))
    result = []
    for pairs in found:
        total = sum(value for _, value in pairs) or 1.0
        best = sorted(pairs, key=lambda pair: -pair[1])[:num_shown]
        result.append([(group, value / total) for group, value in best])
    return result

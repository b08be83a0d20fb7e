# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What experts of the translation model read, as in table 9 of Shazeer et al. 2017 (arXiv:1701.06538)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_peer.analysis.routing_trace import TopContexts
from modeling_peer.console.tables import as_markdown
from modeling_peer.studies.classics.translation_data import EncodedPair, Vocabulary
from modeling_peer.studies.classics.translation_model import TranslationModel

# Of the experts whose contexts are shown: the least load as a share of the mean, and different words.
LEAST_LOAD, NUM_CONTEXTS, NUM_SHOWN = 0.5, 10, 3
KEPT_CONTEXTS = 200  # largest gates of each expert, among which its different words are found


@torch.no_grad()
def read_contexts(
    model: TranslationModel, vocabulary: Vocabulary, pairs: Sequence[EncodedPair]
) -> list[dict[str, Any]]:
    """What the encoder's experts read: for each, the tokens with the largest gates, as in table 9 of the paper.

    Contexts are sorted by falling gate. A token that had a larger gate before is left out, whatever its case. Ends and
    languages are left out, too. There is no noise.

    Args:
        pairs: each of their sources is read once.

    Returns:
        for each expert: `load` (tokens over the mean), `divergence` (from the words of all tokens to the expert's, by
        gates, in nats, Kullback & Leibler 1951), and up to ten `contexts`: word before, word, word after, gate.
    """
    model.eval()
    layer = model.encoder_layer
    num_experts = len(layer.into)
    sources = sorted({tuple(pair.source) for pair in pairs}, key=lambda source: (len(source), source))
    top = TopContexts(num_experts, KEPT_CONTEXTS)
    ids = torch.tensor([token for source in sources for token in source])
    is_word = vocabulary.is_word(ids)
    gate_sums = torch.zeros(num_experts, len(vocabulary), dtype=torch.float64)
    load = torch.zeros(num_experts)
    first = 0
    for group in _equally_long(sources):
        model.encode(torch.tensor(group))
        expert_ids, gates = layer.routing
        positions = torch.arange(first, first + len(expert_ids))
        first += len(expert_ids)
        load += expert_ids.flatten().bincount(minlength=num_experts)
        kept = is_word[positions]
        expert_ids, gates, positions = expert_ids[kept], gates[kept], positions[kept]
        words = ids[positions][:, None].expand_as(expert_ids)
        gate_sums.index_put_((expert_ids, words), gates.double(), accumulate=True)
        top.add(expert_ids[:, None], gates[:, None], positions.int())
    top.merge()
    shares = gate_sums / gate_sums.sum(1, keepdim=True).clamp(min=1e-300)
    of_all = gate_sums.sum(0) / gate_sums.sum()
    divergences = torch.special.xlogy(shares, shares / of_all.clamp(min=1e-300)).sum(1)
    return [
        {
            "expert": expert,
            "load": round(float(load[expert] / load.mean()), 4),
            "divergence": round(float(divergences[expert]), 4),
            "contexts": _distinct_contexts(top.positions[expert], top.gates[expert], ids, vocabulary),
        }
        for expert in range(num_experts)
    ]


def _equally_long(sources: Sequence[Sequence[int]], most: int = 200) -> Iterator[Sequence[Sequence[int]]]:
    start = 0
    for place in range(1, len(sources) + 1):
        if place == len(sources) or len(sources[place]) != len(sources[start]) or place - start == most:
            yield sources[start:place]
            start = place


def _distinct_contexts(positions: Tensor, gates: Tensor, ids: Tensor, vocabulary: Vocabulary) -> list[list[Any]]:
    contexts: dict[str, list[Any]] = {}
    for position, gate in zip(positions.tolist(), gates.tolist(), strict=True):
        if position < 0 or len(contexts) == NUM_CONTEXTS:
            break
        around = ids[position - 1 : position + 2]
        before, word, after = (
            vocabulary.spell(int(token)) if is_word else ""
            for token, is_word in zip(around, vocabulary.is_word(around), strict=True)
        )
        contexts.setdefault(word.lower(), [before, word, after, round(gate, 4)])
    return list(contexts.values())


def choose_experts(experts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three experts of the table: those whose words differ most from all words, by `divergence`.

    Only experts that are used (half the mean load or more) and have ten contexts enter. The words of contexts are
    different, so this leaves out experts for one or a few words or signs.
    """
    entering = [e for e in experts if e["load"] >= LEAST_LOAD and len(e["contexts"]) == NUM_CONTEXTS]
    return sorted(entering, key=lambda expert: -expert["divergence"])[:NUM_SHOWN]


def make_context_table(experts: Sequence[dict[str, Any]]) -> str:
    """What three experts read, as a Markdown table: the word with the gate is bold. Empty if no expert enters."""
    chosen = choose_experts(experts)
    columns = {
        f"expert {expert['expert']}": [
            f"{before} **{word}** {after}".strip() for before, word, after, _ in expert["contexts"]
        ]
        for expert in chosen
    }
    rows = [dict(zip(columns, contexts, strict=True)) for contexts in zip(*columns.values(), strict=True)]
    return as_markdown(rows) if rows else ""

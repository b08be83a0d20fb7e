# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How far experts specialise: by the domain of a text, by token, and how early in training.

All functions take expert ids `(num_tokens, num_heads, num_active)`, as routing hooks give them, and plain tensors.

A pool of ten thousands of experts looks specialised by chance: an expert that read two tokens has read two domains at
most. Each figure is therefore free of that bias, or stands beside the same figure of labels that were shuffled.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from modeling_peer.analysis.statistics import shared_experts

NUM_SHUFFLES = 5
# Of the experts that a table shows: no token is more than this share of what they read.
LARGEST_TOKEN_SHARE = 0.2


def distinct_reads(expert_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which expert read which token, once even if several heads retrieved it.

    Returns:
        experts and positions of tokens, `(num_reads,)` each, int64, in the order of the tokens.
    """
    ids = expert_ids.flatten(1).long().sort(dim=1).values
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ids[is_new], is_new.nonzero()[:, 0]


def count_reads(
    experts: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, num_experts: int, num_labels: int
) -> torch.Tensor:
    """How many tokens of each label an expert read.

    Args:
        experts, positions: result of `distinct_reads`.
        labels: of each token, `(num_tokens,)`, int64.

    Returns:
        `(num_labels, num_experts)`, int64.
    """
    cells = labels[positions] * num_experts + experts
    return torch.bincount(cells, minlength=num_labels * num_experts).view(num_labels, num_experts)


def dispatch_entropy(counts: torch.Tensor) -> float:
    """Entropy of the label of a token that an expert read, in nats, weighted by the use of experts.

    The definition is that of Chen et al. 2022 (arXiv:2208.02813), with equal weight for all labels:

        share_(d,e) = counts_(d,e) / Σ_e counts_(d,e);  -Σ_e use_e Σ_d p_(d|e) ln p_(d|e)

    0: each expert reads one label. ln(num_labels): routing ignores labels.

    Args:
        counts: `(num_labels, num_experts)`, as by `count_reads`. Each label has been read.
    """
    shares = counts.double() / counts.sum(1, keepdim=True) / len(counts)  # joint distribution
    use = shares.sum(0)
    return float((torch.special.entr(shares).sum() - torch.special.entr(use).sum()).clamp(min=0))


def own_shares(counts: torch.Tensor) -> list[float]:
    """Of each label: the part of an expert's reads that has the label, averaged over the reads of the label.

    Labels have equal weight. 1: no other label goes to the label's experts. 1/num_labels: routing ignores the label.
    """
    shares = counts.double() / counts.sum(1, keepdim=True)
    return (shares * shares / shares.sum(0).clamp(min=1e-300)).sum(1).tolist()


def label_figures(
    expert_ids: torch.Tensor,
    sequence_labels: torch.Tensor,
    num_experts: int,
    num_labels: int,
    seed: int = 0,
    num_shuffles: int = NUM_SHUFFLES,
) -> dict[str, Any]:
    """How much an expert says about the label of the text that its tokens are from.

    A plain estimate of information is too high, and the more so the fewer tokens an expert reads. The baseline cannot
    carry information: whole sequences exchange their labels at random. What it gives is subtracted. The bias is
    largest where nothing is known, so the corrected figure is rather too low.

    Args:
        sequence_labels: of each sequence, `(num_sequences,)`, int64. All sequences have equally many tokens, and all
            labels equally many sequences.

    Returns:
        `entropy` (`dispatch_entropy`, nats), `entropy_shuffled` (mean of `num_shuffles`), `bits` (mutual information
        of expert and label: the difference of the two, in bits), `own_shares`.
    """
    length = len(expert_ids) // len(sequence_labels)
    experts, positions = distinct_reads(expert_ids)
    counts = count_reads(experts, positions, sequence_labels.repeat_interleave(length), num_experts, num_labels)
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for _ in range(num_shuffles):
        labels = sequence_labels[torch.randperm(len(sequence_labels), generator=generator)].repeat_interleave(length)
        shuffled.append(dispatch_entropy(count_reads(experts, positions, labels, num_experts, num_labels)))
    entropy, baseline = dispatch_entropy(counts), sum(shuffled) / len(shuffled)
    return {
        "entropy": entropy,
        "entropy_shuffled": baseline,
        "bits": (baseline - entropy) / math.log(2),
        "own_shares": own_shares(counts),
    }


def effective_tokens(experts: torch.Tensor, tokens: torch.Tensor, num_types: int) -> float:
    """Effective number of different tokens that an expert reads: 1 / P, by Simpson's index (1949).

    P is the probability that two reads of an expert are of the same token. An expert counts by its reads. The estimate
    `Σ c (c - 1) / (n (n - 1))` has no bias however few its reads are, because no read is paired with itself. Experts
    with one read are left out. NaN if no expert has two; infinite if no two reads are alike.

    Args:
        experts: of each read, `(num_reads,)`.
        tokens: id of the token that was read, same shape.
        num_types: size of the vocabulary.
    """
    reads = torch.bincount(experts).double()
    cells, counts = (experts * num_types + tokens).unique(return_counts=True)
    alike = torch.zeros_like(reads).index_add_(0, cells // num_types, (counts * (counts - 1)).double())
    often = reads >= 2
    if not often.any():
        return math.nan
    n = reads[often]
    probability = float((alike[often] / (n - 1)).sum() / n.sum())  # each expert's is weighted by n
    return 1 / probability if probability else math.inf


def token_figures(
    expert_ids: torch.Tensor, token_ids: torch.Tensor, num_types: int, seed: int = 0
) -> dict[str, float]:
    """`effective_tokens` of an expert, and `effective_tokens_shuffled`: of as many tokens drawn at random.

    Args:
        token_ids: `(num_tokens,)`, int64. For the second figure they exchange their places at random.
    """
    experts, positions = distinct_reads(expert_ids)
    order = torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(seed))
    return {
        "effective_tokens": effective_tokens(experts, token_ids[positions], num_types),
        "effective_tokens_shuffled": effective_tokens(experts, token_ids[order][positions], num_types),
    }


def agreement_with(expert_ids: torch.Tensor, final_ids: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """How much of the final routing an earlier checkpoint already has, on the same tokens.

    Args:
        expert_ids, final_ids: of the earlier and of the last checkpoint, same shape.

    Returns:
        `agreement`: the share of a head's experts that the same head retrieves at the end. `chance`: the same with
        the final experts of another token, drawn at random.
    """
    order = torch.randperm(len(final_ids), generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # no token is its own partner, if there are two
    return {
        "agreement": float(shared_experts(expert_ids, final_ids).double().mean()),
        "chance": float(shared_experts(expert_ids, final_ids[partner]).double().mean()),
    }


def beyond_chance(value: float, chance: float) -> float:
    """A share with what chance gives taken out: 1 stays 1, and chance becomes 0. NaN if chance is 1."""
    return (value - chance) / (1 - chance) if chance < 1 else math.nan


def typical_tokens(
    tokens: torch.Tensor, token_shares: torch.Tensor, num_tokens: int = 5
) -> tuple[list[tuple[int, float]], float]:
    """Tokens that an expert reads more than others do.

    Args:
        tokens: ids that the expert read, `(num_reads,)`.
        token_shares: of each token id in the whole text, `(num_types,)`, float64.

    Returns:
        pairs of token id and its share of the reads, those first that contribute most to the divergence, and the
        divergence: that of the expert's tokens from all tokens, in nats (Kullback & Leibler 1951).
    """
    if not len(tokens):
        return [], 0.0
    shares = torch.bincount(tokens, minlength=len(token_shares)).double() / len(tokens)
    parts = torch.special.xlogy(shares, shares / token_shares.clamp(min=1e-300))
    best = parts.topk(min(num_tokens, len(parts)))
    chosen = [
        (token, float(shares[token]))
        for part, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if part > 0
    ]
    return chosen, float(parts.sum())


def choose_cluster_experts(
    layers: Sequence[tuple[torch.Tensor, int]], token_ids: torch.Tensor, labels: torch.Tensor, num_labels: int
) -> list[tuple[int, int] | None]:
    """For each label, the expert whose tokens differ most from all tokens, by `typical_tokens`' divergence.

    An expert enters for the label that is the largest part of its reads. It has at least as many reads as the mean of
    its layer, and no token is more than `LARGEST_TOKEN_SHARE` of them: a cluster, rather than one token.

    Args:
        layers: expert ids of each layer, and its number of experts.
        token_ids, labels: `(num_tokens,)`, int64.

    Returns:
        place of the layer and id of the expert, by label; None if no expert enters.
    """
    num_types = int(token_ids.max()) + 1
    logs = (torch.bincount(token_ids).double() / len(token_ids)).clamp(min=1e-300).log()
    best: list[tuple[float, int, int] | None] = [None] * num_labels
    for place, (expert_ids, num_experts) in enumerate(layers):
        experts, positions = distinct_reads(expert_ids)
        reads = torch.bincount(experts, minlength=num_experts)
        cells, counts = (experts * num_types + token_ids[positions]).unique(return_counts=True)
        of_expert, shares = cells // num_types, counts.double()
        shares = shares / reads[of_expert]
        parts = shares * (shares.log() - logs[cells % num_types])
        divergence = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, of_expert, parts)
        largest = torch.zeros(num_experts, dtype=torch.float64).scatter_reduce_(0, of_expert, shares, "amax")
        by_label = count_reads(experts, positions, labels, num_experts, num_labels).double()
        first = (by_label / by_label.sum(1, keepdim=True).clamp(min=1)).argmax(0)
        enters = (reads >= reads.double().mean()) & (largest <= LARGEST_TOKEN_SHARE)
        for label in range(num_labels):
            scores = divergence.where(enters & (first == label), -1.0)
            expert = int(scores.argmax())
            score = float(scores[expert])
            if score >= 0 and (best[label] is None or score > best[label][0]):
                best[label] = (score, place, expert)
    return [None if found is None else found[1:] for found in best]

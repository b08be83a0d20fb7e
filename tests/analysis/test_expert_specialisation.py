# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Figures of specialisation against values worked out by hand, loops over sets, and routing that says nothing."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch

from modeling_peer.analysis.expert_specialisation import (
    agreement_with,
    beyond_chance,
    choose_cluster_experts,
    count_reads,
    dispatch_entropy,
    distinct_reads,
    effective_tokens,
    label_figures,
    own_shares,
    token_figures,
    typical_tokens,
)


def random_routing(num_tokens, num_experts=4000, heads=2, active=4, seed=0):
    """Of many experts and few tokens, whatever the token is."""
    return torch.randint(num_experts, (num_tokens, heads, active), generator=torch.Generator().manual_seed(seed))


def test_an_expert_that_two_heads_retrieve_reads_the_token_once():
    ids = torch.tensor([[[3, 1], [1, 0]], [[2, 3], [3, 2]]])
    experts, positions = distinct_reads(ids)
    assert list(zip(experts.tolist(), positions.tolist(), strict=True)) == [(0, 0), (1, 0), (3, 0), (2, 1), (3, 1)]
    counts = count_reads(experts, positions, torch.tensor([1, 0]), 5, 2)
    assert counts.tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 1, 0]]


def test_dispatch_entropy_is_its_definition_with_labels_of_equal_weight():
    assert dispatch_entropy(torch.tensor([[4, 0], [0, 9]])) == 0  # each expert reads one label
    # an expert in proportion to each label's reads: ln 2, although one label has more of them
    assert dispatch_entropy(torch.tensor([[1, 3], [10, 30]])) == pytest.approx(math.log(2))
    # label 0 gives half its reads to each expert, label 1 all to the second: joint 1/4, 1/4, 0, 1/2
    third = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)
    assert dispatch_entropy(torch.tensor([[5, 5], [0, 7]])) == pytest.approx(3 / 4 * third)


def test_own_share_is_one_where_experts_are_not_shared_and_its_chance_where_they_are():
    assert own_shares(torch.tensor([[4, 0], [0, 9]])) == pytest.approx([1, 1])
    assert own_shares(torch.tensor([[1, 3], [10, 30]])) == pytest.approx([1 / 2, 1 / 2])
    # half of label 0 goes to an expert of its own, half to one whose reads are a third of label 0
    assert own_shares(torch.tensor([[5, 5], [0, 7]])) == pytest.approx([1 / 2 + 1 / 2 * 1 / 3, 2 / 3])


def test_bits_are_all_where_experts_divide_by_label_and_none_where_routing_says_nothing():
    labels = torch.arange(4).repeat_interleave(16)  # 64 sequences of 8 tokens
    divided = labels.repeat_interleave(8)[:, None, None] * 1000 + random_routing(512, 1000)
    blind = random_routing(512)
    found, nothing = (label_figures(ids, labels, 4000, 4) for ids in (divided, blind))
    assert found["entropy"] == pytest.approx(0, abs=1e-9)
    assert found["own_shares"] == pytest.approx([1] * 4)
    # the plain estimate finds a bit where there is nothing: an expert has one read
    assert (math.log(4) - nothing["entropy"]) / math.log(2) > 0.7
    assert abs(nothing["bits"]) < 0.03
    # the correction takes too much rather than too little from routing that divides by label
    assert 0.5 < found["bits"] < 2
    many = labels.repeat_interleave(8)[:, None, None].expand(-1, 1, 1)  # four experts: hardly any bias
    assert 1.8 < label_figures(many, labels, 4, 4)["bits"] <= 2


def test_effective_tokens_equal_all_pairs_of_reads():
    generator = torch.Generator().manual_seed(0)
    experts, tokens = (torch.randint(n, (60,), generator=generator) for n in (7, 5))
    reads = {}
    for expert, token in zip(experts.tolist(), tokens.tolist(), strict=True):
        reads.setdefault(expert, []).append(token)
    used = {expert: of_it for expert, of_it in reads.items() if len(of_it) > 1}
    probability = sum(
        len(of_it) * sum(a == b for a, b in combinations(of_it, 2)) / math.comb(len(of_it), 2)
        for of_it in used.values()
    ) / sum(map(len, used.values()))
    assert effective_tokens(experts, tokens, 5) == pytest.approx(1 / probability)


def test_effective_tokens_of_few_reads_are_not_too_few():
    """Two reads an expert, of 50 tokens that are equally frequent: the plain index would give less than 2."""
    experts = torch.arange(20_000).repeat(2)
    tokens = torch.randint(50, (40_000,), generator=torch.Generator().manual_seed(0))
    assert effective_tokens(experts, tokens, 50) == pytest.approx(50, rel=0.15)
    assert math.isnan(effective_tokens(torch.tensor([0, 1]), torch.tensor([3, 3]), 4))  # no expert has two
    assert effective_tokens(torch.tensor([0, 0]), torch.tensor([1, 3]), 4) == math.inf  # no two are alike


def test_tokens_shuffled_is_the_text_itself_whatever_the_routing():
    tokens = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(1))
    by_token = (tokens[:, None, None] * 5 + random_routing(4000, 5)).int()
    found = token_figures(by_token, tokens, 20)
    assert found["effective_tokens"] == pytest.approx(1)
    assert found["effective_tokens_shuffled"] == pytest.approx(20, rel=0.05)
    assert token_figures(random_routing(4000), tokens, 20)["effective_tokens"] == pytest.approx(20, rel=0.05)


def test_agreement_compares_a_token_with_itself_and_chance_with_another():
    final = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]])
    assert agreement_with(final.flip(2), final) == {"agreement": 1, "chance": 0}
    assert agreement_with(torch.tensor([[[0, 9]], [[3, 2]], [[7, 7]]]), final)["agreement"] == pytest.approx(0.5)
    # a head is compared with itself
    assert agreement_with(torch.tensor([[[0], [1]]]), torch.tensor([[[1], [0]]]))["agreement"] == 0
    same = torch.zeros(4, 1, 2)  # all tokens have the same experts
    assert agreement_with(same, same) == {"agreement": 1, "chance": 1}
    assert beyond_chance(0.6, 0.2) == pytest.approx(0.5)
    assert beyond_chance(0.2, 0.2) == 0
    assert math.isnan(beyond_chance(1, 1))


def test_typical_tokens_are_those_that_contribute_most_to_the_divergence():
    all_tokens = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    typical, divergence = typical_tokens(torch.tensor([1, 1, 1, 0]), all_tokens)
    assert typical == [(1, 0.75)]  # token 0 is rarer than elsewhere
    assert divergence == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(0.5))
    assert typical_tokens(torch.tensor([], dtype=torch.int64), all_tokens) == ([], 0.0)


def test_the_experts_of_the_table_are_those_of_the_rule():
    """Loops over all experts of two layers, against the rule of the docstring."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(40, (600,), generator=generator)
    labels = torch.arange(3).repeat_interleave(200)
    layers = [((tokens[:, None, None] % 7 + random_routing(600, 6, 1, 2, seed)), 13) for seed in (0, 1)]
    layers[1][0][:, :, 0] += labels[:, None]  # the second layer divides by label a little
    layers = [(ids.clamp(max=12), 13) for ids, _ in layers]
    whole = Counter(tokens.tolist())
    best = [None] * 3
    for place, (ids, num_experts) in enumerate(layers):
        total = sum(len(set(row)) for row in ids.flatten(1).tolist())
        for expert in range(num_experts):
            read = (ids.flatten(1) == expert).any(1)
            counts, number = Counter(tokens[read].tolist()), int(read.sum())
            if number < total / num_experts or max(counts.values()) > 0.2 * number:
                continue
            in_label = [
                int((read & (labels == label)).sum())
                / sum(len(set(row)) for row in ids[labels == label].flatten(1).tolist())
                for label in range(3)
            ]
            divergence = sum(c / number * math.log(c / number / (whole[t] / 600)) for t, c in counts.items())
            label = in_label.index(max(in_label))
            if best[label] is None or divergence > best[label][0]:
                best[label] = (divergence, place, expert)
    assert sum(found is not None for found in best) >= 2
    expected = [found and found[1:] for found in best]
    assert choose_cluster_experts(layers, tokens, labels, 3) == expected

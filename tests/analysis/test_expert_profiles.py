# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Profiles of experts: their contexts and tokens in a text whose routing is known, and what they write."""

import pytest
import torch

from modeling_peer import PeerForCausalLM
from modeling_peer.analysis.expert_profiles import (
    Spelling,
    choose_experts,
    experts_of_tokens,
    profile_experts,
    read_along,
    written_tokens,
)
from modeling_peer.analysis.routing_hooks import find_routed_layers, observe_routing
from modeling_peer.analysis.routing_trace import TokenBatch, record_routing
from modeling_peer.data.tokenizers import byte_tokenizer

TEXTS = ["the cat sat on the mat, the end", "12 + 34 = 46; 5 + 6 = 11; 7 + 8"]  # 31 bytes each


@pytest.fixture
def recorded(tiny_config):
    tokenizer = byte_tokenizer()
    model = PeerForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
    rows = torch.tensor([tokenizer(text)["input_ids"] for text in TEXTS])
    trace = record_routing(
        model, [TokenBatch(rows, torch.tensor([0, 1]))], source_names=["words", "sums"], show_progress=False
    )
    return model, tokenizer, trace, find_routed_layers(model)[0]


def gates_by_expert(model, trace, expert):
    """The gate of an expert for each token, summed over heads; the largest of one head."""
    seen = []
    with torch.no_grad(), observe_routing(model, lambda layer, routing: seen.append(routing)):
        model(trace.token_ids.long().view(2, -1))
    mine = seen[0].gates * (seen[0].expert_ids == expert)
    return mine.sum(dim=(1, 2)), mine.amax(dim=(1, 2))


def test_a_profile_has_the_largest_gates_their_contexts_and_their_texts(recorded):
    model, tokenizer, trace, layer = recorded
    chosen = choose_experts(trace.layers[0], 12)
    assert len(chosen) <= 12
    assert len(chosen.unique()) == len(chosen)
    for profile in profile_experts(model, tokenizer, trace, layer, chosen, num_contexts=3):
        sums, largest = gates_by_expert(model, trace, profile.expert)
        best = largest.topk(3)
        kept = [value for value in best.values.tolist() if value > 0]
        assert [context["gate"] for context in profile.contexts] == pytest.approx(kept)
        for context, place in zip(profile.contexts, best.indices.tolist(), strict=False):
            text = TEXTS[place // 31]
            assert context["token"] == text[place % 31]
            assert context["source"] == ["words", "sums"][place // 31]
            assert text[: place % 31].endswith(context["before"])
            assert context["after"] in text
        assert profile.gate_sum == pytest.approx(sums.sum().item(), rel=1e-5)
        by_text = sums.view(2, 31).sum(1)
        shares = dict(profile.sources)
        assert shares.get("sums", 0.0) == pytest.approx((by_text[1] / by_text.sum()).item(), abs=1e-5)
        token, share = profile.tokens[0]
        mine = torch.tensor([one == token for text in TEXTS for one in text])
        assert share == pytest.approx((sums[mine].sum() / sums.sum()).item(), abs=1e-5)


def test_the_experts_of_a_token_are_those_with_the_largest_mean_gates(recorded):
    model, tokenizer, trace, _ = recorded
    found = experts_of_tokens(trace, trace.layers[0], num_experts=4)
    count, experts = found[tokenizer.convert_tokens_to_ids("t")]
    here = torch.tensor([one == "t" for text in TEXTS for one in text])
    assert count == int(here.sum())
    means = torch.stack([gates_by_expert(model, trace, expert)[0][here].mean() for expert in range(64)])
    assert [gate for _, gate in experts] == pytest.approx(means.topk(4).values.tolist(), rel=1e-5)
    assert tokenizer.convert_tokens_to_ids("c") not in found  # it occurs once


def test_reading_along_lists_the_strongest_experts_of_each_token(recorded):
    model, _, trace, _ = recorded
    rows = read_along(model, trace.token_ids[:31].tolist(), num_experts=2)["layer_1"]
    assert len(rows) == 31
    for place in (0, 17):
        gates = torch.stack([gates_by_expert(model, trace, expert)[0][place] for expert in range(64)])
        assert [gate for _, gate in rows[place]] == pytest.approx(gates.topk(2).values.tolist(), rel=1e-4)


def test_what_an_expert_writes_are_the_logits_that_it_raises(recorded):
    """A little of the expert's output, added to the last hidden state, changes the logits in the order of its scores.

    The output is made orthogonal to the hidden state: it then leaves the size by which the norm divides as it is.
    """
    model, _, _, layer = recorded
    hidden = torch.randn(32, dtype=torch.float64)
    with torch.no_grad():
        weight = model.get_decoder().norm.weight.uniform_(0.2, 2.0).double()
        row = layer.experts.up_embed[7]
        row.copy_(row.double() - (row.double() @ hidden) / (hidden @ hidden) * hidden)
        ((promoted, suppressed),) = written_tokens(model, layer, torch.tensor([7]), num_tokens=5)
        embedding = model.get_output_embeddings().weight.double()

        def logits(state):
            return embedding @ (weight * state / state.square().mean().sqrt())

        change = logits(hidden + 1e-3 * row.double()) - logits(hidden)
    assert [token for token, _ in promoted] == change.topk(5).indices.tolist()
    assert [token for token, _ in suppressed] == change.topk(5, largest=False).indices.tolist()
    scores = (change - change.mean()) / change.std()
    assert [score for _, score in promoted] == pytest.approx(scores.topk(5).values.tolist(), rel=1e-3)


def test_tokens_are_spelt_visibly():
    spell = Spelling(byte_tokenizer())
    tokens = spell.tokenizer("a\n\té")["input_ids"]
    assert [spell(token) for token in tokens[:3]] == ["a", "⏎", "⇥"]
    assert "\ufffd" not in spell(tokens[3])  # half a character
    assert spell.text(tokens) == "a⏎⇥é"

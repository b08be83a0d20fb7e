# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Recorded routing against loops over what the model returns, and the streaming parts against sorting everything."""

import pytest
import torch
from datasets import Dataset

from modeling_peer import PeerForCausalLM
from modeling_peer.analysis import routing_trace
from modeling_peer.analysis.routing_trace import Sample, TokenBatch, TopContexts, record_routing, token_batches
from modeling_peer.data.corpus import ENDS_DOCUMENT, Corpus
from modeling_peer.data.tokenizers import byte_tokenizer


def some_batches(masked):
    batches = []
    for _ in range(3):
        tokens = torch.randint(1, 99, (2, 7))
        mask = torch.rand(2, 7) < 0.7 if masked else None
        if masked:
            mask[:, 0] = True
        batches.append(TokenBatch(tokens, torch.tensor([0, 1]), mask))
    return batches


@pytest.mark.parametrize("masked", [False, True])
def test_counts_gates_and_contexts_are_those_of_the_outputs(tiny_config, masked):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["dense", "sparse", "sparse"]))
    batches = some_batches(masked)
    trace = record_routing(model, batches, source_names=["first", "second"], show_progress=False)
    assert model.training  # as it was
    model.eval()
    counts, sums, best = (torch.zeros(2, 2, 64, dtype=torch.float64) for _ in range(3))
    entries = {}
    start = 0
    for batch in batches:
        options = {} if batch.token_mask is None else {"attention_mask": batch.token_mask.long()}
        outputs = model(batch.input_ids, output_expert_ids=True, output_expert_gates=True, **options)
        for layer, (ids, gates) in enumerate(zip(outputs.expert_ids, outputs.expert_gates, strict=True)):
            for token, (token_ids, token_gates) in enumerate(zip(ids.flatten(0, 1), gates.flatten(0, 1), strict=True)):
                if masked and not batch.token_mask.flatten()[token]:
                    continue
                for head in range(2):
                    best[layer, head, token_ids[head, 0]] += 1
                    for expert, gate in zip(token_ids[head].tolist(), token_gates[head].tolist(), strict=True):
                        counts[layer, head, expert] += 1
                        sums[layer, head, expert] += gate
                        entries.setdefault((layer, expert), []).append((gate, start + token))
        start += 14
    for number, layer in enumerate(trace.layers):
        assert layer.name == f"layer_{number + 1}"
        assert torch.equal(layer.counts.double(), counts[number])
        assert torch.equal(layer.best_counts.double(), best[number])
        torch.testing.assert_close(layer.gate_sums.double(), sums[number], atol=1e-5, rtol=1e-5)
        positions, gates = layer.top_contexts()
        for expert in range(64):
            expected = sorted(entries.get((number, expert), []), reverse=True)[:10]
            kept = int((gates[expert] > 0).sum())
            assert kept == len(expected)
            torch.testing.assert_close(gates[expert, :kept].tolist(), [gate for gate, _ in expected])
            assert sorted(positions[expert, :kept].tolist()) == sorted(place for _, place in expected) or kept == 10
    assert trace.num_tokens == 42
    assert trace.sequence_starts.tolist() == [0, 7, 14, 21, 28, 35]
    assert trace.source_of(torch.tensor([0, 7, 41])).tolist() == [0, 1, 1]
    assert trace.position_in_sequence(torch.tensor([0, 6, 7, 30])).tolist() == [0, 6, 0, 2]
    tokens, place = trace.context(29, before=5, after=2)
    assert tokens == batches[2].input_ids[0, :4].tolist()
    assert place == 1
    num_real = sum(14 if b.token_mask is None else int(b.token_mask.sum()) for b in batches)
    assert len(trace.sample.columns["position"]) == num_real  # fewer than the sample may hold: all of them
    assert trace.probe.columns["layer_1/hidden_states"].shape == (num_real, 32)


@pytest.mark.parametrize("limit", [1, 100, 10**6])  # merged at each call, now and then, only at the end
def test_top_contexts_in_a_stream_equal_those_of_a_sort(monkeypatch, limit):
    monkeypatch.setattr(routing_trace, "PENDING_ASSIGNMENTS", limit)
    monkeypatch.setattr(routing_trace, "PENDING_PER_EXPERT", 0)
    top, entries = TopContexts(9, 3), []
    for batch in range(20):
        ids, gates = torch.randint(8, (5, 2, 4)), torch.rand(5, 2, 4)  # expert 8 is never retrieved
        positions = torch.arange(5 * batch, 5 * batch + 5, dtype=torch.int32)
        top.add(ids, gates, positions)
        where = positions[:, None, None].expand(ids.shape)
        entries += zip(ids.flatten().tolist(), gates.flatten().tolist(), where.flatten().tolist(), strict=True)
    top.merge()
    for expert in range(9):
        expected = sorted(((gate, place) for one, gate, place in entries if one == expert), reverse=True)[:3]
        assert top.gates[expert].tolist() == [gate for gate, _ in expected] or expert == 8
        assert top.positions[expert].tolist() == [place for _, place in expected] or expert == 8
    assert top.positions[8].tolist() == [-1, -1, -1]


def test_a_sample_is_even_and_keeps_its_columns_together():
    hits = torch.zeros(60)
    for seed in range(200):
        sample = Sample(6, seed)
        for batch in range(6):
            sample.draw(10)
            values = torch.arange(10 * batch, 10 * batch + 10)
            sample.put("value", values)
            sample.put("square", values**2)
            sample.close()
        columns = sample.columns
        assert len(columns["value"]) == 6
        assert torch.equal(columns["square"], columns["value"] ** 2)
        assert torch.equal(columns["value"], columns["value"].sort().values)
        hits[columns["value"]] += 1
    # 20 on average with a standard deviation of 4.2; the means of the first and the last ten differ by 1.9 at most
    assert hits.min() > 3
    assert hits.max() < 40
    assert abs(hits[:10].mean() - hits[-10:].mean()) < 8


def test_texts_are_read_in_turn_and_their_ends_are_kept():
    tokenizer = byte_tokenizer()
    texts = (["abcdefgh", "ij"], ["0123"])
    corpora = [
        Corpus(Dataset.from_dict({"text": rows, ENDS_DOCUMENT: [True] * len(rows)}), None, "text") for rows in texts
    ]
    batches = list(token_batches(corpora, tokenizer, sequence_length=5, batch_size=2))
    end = tokenizer.eos_token
    read = [(tokenizer.decode(row), int(s)) for b in batches for row, s in zip(b.input_ids, b.sources, strict=True)]
    # the short end of a text is a batch of its own, and does not wait for others
    assert read == [("abcde", 0), (f"0123{end}", 1), (f"j{end}", 0), (f"fgh{end}i", 0)]
    assert [len(batch.input_ids) for batch in batches] == [2, 1, 1]


def test_without_text_there_is_an_error_and_reading_stops_at_the_limit(tiny_config):
    model = PeerForCausalLM(tiny_config())
    with pytest.raises(ValueError, match="no text to record"):
        record_routing(model, [], show_progress=False)
    trace = record_routing(model, some_batches(False), max_tokens=15, show_progress=False)
    assert trace.num_tokens == 28

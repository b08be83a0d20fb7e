# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The importance of experts against a sum over tokens and experts, one by one."""

import pytest
import torch
from test_routing_hooks import tiny_mixtral

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.analysis.expert_importance import record_importance
from modeling_peer.analysis.routing_trace import TokenBatch

TOKENS = torch.arange(1, 25).view(4, 6)
# The second sequence of each batch ends with padding.
MASK = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]] * 2)


def batches():
    return [TokenBatch(TOKENS[i : i + 2], torch.zeros(2, dtype=torch.int64), MASK[i : i + 2]) for i in (0, 2)]


@pytest.mark.parametrize(
    "fields", [{}, {"gated_experts": True}, {"sparse_mlp": "product_key_memory"}, {"int4": True}], ids=str
)
def test_importance_is_a_sum_over_tokens(tiny_config, fields):
    quantised = fields.pop("int4", False)
    model = PeerForCausalLM(tiny_config(**fields)).eval()
    if quantised:
        quantise_expert_tables(model, "int4")
    (found,) = record_importance(model, batches(), show_progress=False)
    pool, inputs = model.model.layers[1].mlp.experts, []
    handle = pool.register_forward_pre_hook(lambda module, args: inputs.append([one.clone() for one in args]))
    with torch.no_grad():
        for batch in batches():
            model(batch.input_ids, attention_mask=batch.token_mask)
        handle.remove()
        counts, sums = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
        for hidden, ids, gates in inputs:
            for token in MASK[:2].flatten().nonzero().flatten():
                for expert, gate in zip(ids[token], gates[token], strict=True):
                    one = hidden[token : token + 1], expert.view(1, 1), gate.view(1, 1)
                    counts[expert] += 1
                    sums[expert] += pool(*one).norm()
    assert found.num_tokens == 18
    assert torch.equal(found.counts, counts.long())
    torch.testing.assert_close(found.output_sums, sums, atol=1e-6, rtol=1e-4)
    assert torch.equal(found.by("output"), found.output_sums)
    assert torch.equal(found.by("use"), counts.double())
    torch.testing.assert_close(found.by("mean_output") * counts, found.output_sums)


def test_it_stops_at_a_number_of_tokens_and_restores_the_mode(tiny_config):
    model = PeerForCausalLM(tiny_config()).train()
    (found,) = record_importance(model, batches(), max_tokens=1, show_progress=False)
    assert found.num_tokens == 9
    assert found.counts.sum() == 9 * 8
    assert model.training


def test_what_has_no_experts_of_one_neuron_or_no_text_is_refused(tiny_config):
    with pytest.raises(ValueError, match="layer_0, layer_1: experts are whole MLPs"):
        record_importance(tiny_mixtral(), batches())
    with pytest.raises(ValueError, match="no text"):
        record_importance(PeerForCausalLM(tiny_config()), [])

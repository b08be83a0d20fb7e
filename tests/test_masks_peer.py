# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Masks of padding: one that broadcasts works in training as in evaluation, one that does not fit is refused."""

import re

import pytest
import torch
from model_helpers import context
from transformers import DynamicCache

from modeling_peer import PeerForCausalLM, PeerForMaskedLM
from modeling_peer.configuration_peer import SPARSE_MLPS

MIXTURE = {"num_moe_experts": 4, "moe_intermediate_size": 16}
LAYERS = {name: {"sparse_mlp": name, **MIXTURE} for name in SPARSE_MLPS} | {
    "balance loss": {"balance_loss": "switch"},
    "switch": {"sparse_mlp": "top_k_moe", "moe_router": "switch", **MIXTURE},
}
BATCH_SIZE, LENGTH = 4, 7


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def model(request, tiny_config):
    causal = request.param.get("sparse_mlp") != "soft_moe"
    return (PeerForCausalLM if causal else PeerForMaskedLM)(tiny_config(**request.param, is_causal=causal))


@pytest.fixture
def causal_model(tiny_config):
    return PeerForCausalLM(tiny_config())


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (BATCH_SIZE, LENGTH))


@pytest.fixture
def mask():
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :2] = 0
    return mask


def results(model, tokens, mask, training):
    """Loss, logits, gradients and buffers of one forward and backward; noise is the same each time."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training).zero_grad()
    torch.manual_seed(0)
    outputs = model(tokens, attention_mask=mask, labels=tokens)
    outputs.loss.backward()
    found = [outputs.loss.detach(), outputs.logits.detach()]
    found += [p.grad.clone() for p in model.parameters() if p.grad is not None]  # noise has none in evaluation
    found += [value.clone() for value in model.state_dict().values()]
    model.load_state_dict(state)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_one_row_of_mask_stands_for_all_sequences(model, tokens, mask, training):
    expected = results(model, tokens, mask.expand(BATCH_SIZE, -1).contiguous(), training)
    for found, wanted in zip(results(model, tokens, mask, training), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_may_be_of_any_type(model, tokens, mask, dtype):
    expected = results(model, tokens, mask, training=True)
    for found, wanted in zip(results(model, tokens, mask.to(dtype), training=True), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (3, LENGTH),  # another batch
        (BATCH_SIZE, LENGTH - 1),
        (BATCH_SIZE, LENGTH + 1),
        (BATCH_SIZE, 1),
        (LENGTH,),
        (BATCH_SIZE, LENGTH, LENGTH),
        (3, 1, LENGTH, LENGTH),
        (BATCH_SIZE, 3, LENGTH, LENGTH),
        (BATCH_SIZE, 1, LENGTH - 1, LENGTH),
        (BATCH_SIZE, 1, LENGTH, LENGTH + 1),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused_with_both_shapes(causal_model, tokens, shape, training):
    message = rf"attention_mask is {re.escape(str(shape))}, .*4 sequences of 7 tokens.*\(4, 7\)"
    with pytest.raises(ValueError, match=message):
        causal_model.train(training)(tokens, attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("batch_size", [1, BATCH_SIZE])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_mask_of_who_sees_whom_broadcasts_too(causal_model, tokens, batch_size, num_heads):
    sees = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(batch_size, num_heads, -1, -1)
    for training in (True, False):
        for found, wanted in zip(
            results(causal_model, tokens, sees, training), results(causal_model, tokens, None, training), strict=True
        ):
            torch.testing.assert_close(found, wanted)


def test_a_mask_shorter_than_what_the_cache_holds_is_refused(causal_model, tokens):
    cache = DynamicCache(config=causal_model.config)
    causal_model.eval()(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask is \(4, 1\).* after 7 in the cache.*\(4, 8\)"):
        causal_model(tokens[:, :1], attention_mask=torch.ones(BATCH_SIZE, 1), past_key_values=cache)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (7,)])
def test_a_layer_by_itself_refuses_a_mask_that_does_not_fit(model, shape):
    layer = model.model.layers[1].mlp.train()
    if not any(name in type(layer).__name__ for name in ("Multilinear",)):  # which has no use for one
        tokens = {"tokens": context(torch.ones(2, 4, dtype=torch.long))} if "Hashed" in type(layer).__name__ else {}
        with pytest.raises(ValueError, match=rf"token_mask is {re.escape(str(shape))}, .*\(2, 4\)"):
            layer(torch.randn(2, 4, 32), torch.ones(shape), **tokens)

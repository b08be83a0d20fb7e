# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Soft mixture against slots computed one by one, and its truths."""

import pytest
import reference
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import assert_equals_oracle

from modeling_peer.soft_moe_peer import PeerSoftMoe


@pytest.fixture
def layer(tiny_config):
    """Parameters large enough for the softmaxes to be far from even, so that a wrong one shows."""

    def build(**options):
        config = tiny_config(sparse_mlp="soft_moe", is_causal=False, moe_intermediate_size=24, **options)
        layer = PeerSoftMoe(config)
        with torch.no_grad():
            layer.scale.fill_(5.0)
            layer.experts.gate_up_proj.normal_()
            layer.experts.down_proj.normal_()
        return layer

    return build


@pytest.mark.parametrize(
    ("num_moe_experts", "num_slots_per_expert"),
    [
        (4, 1),  # the papers' recommendation
        (3, 2),  # a slot finds its expert
        (1, 1),  # all tokens get the same output
        (2, 9),  # more slots than tokens
    ],
)
def test_layer_and_every_gradient_equal_slots_computed_one_by_one(layer, num_moe_experts, num_slots_per_expert):
    layer = layer(num_moe_experts=num_moe_experts, num_slots_per_expert=num_slots_per_expert).double()
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    token_mask = torch.tensor([[True] * 7, [False] * 2 + [True] * 4 + [False]])
    expected = reference.soft_moe(layer, hidden, token_mask)
    assert_equals_oracle(layer, hidden, layer(hidden, token_mask), expected)


def test_a_sequence_depends_on_its_own_tokens_and_on_all_of_them(layer):
    layer, hidden = layer(), torch.randn(3, 6, 32)
    output = layer(hidden)
    torch.testing.assert_close(layer(hidden[1]), output[1])
    changed = hidden.clone()
    changed[1, 5] += 1
    assert not torch.isclose(layer(changed)[1, 0], output[1, 0]).any()
    torch.testing.assert_close(layer(changed)[[0, 2]], output[[0, 2]])


@pytest.mark.parametrize("left", [0, 2, 3])
def test_padding_changes_nothing_on_either_side(layer, left):
    layer, hidden = layer(), torch.randn(2, 6, 32)
    padded = torch.full((2, 9, 32), 1e3)
    padded[:, left : left + 6] = hidden
    token_mask = torch.zeros(2, 9, dtype=torch.bool)
    token_mask[:, left : left + 6] = True
    torch.testing.assert_close(layer(padded, token_mask)[:, left : left + 6], layer(hidden))


def test_a_sequence_that_is_all_padding_stays_finite(layer):
    layer, hidden = layer(), torch.randn(2, 4, 32, requires_grad=True)
    output = layer(hidden, torch.tensor([[True] * 4, [False] * 4]))
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 1, 32), (3, 0, 32), (0, 5, 32), (2, 3, 4, 32)], ids=str)
def test_layer_keeps_any_leading_shape(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    y = layer()(x, torch.ones(shape[:-1], dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.isfinite(y).all()


def test_the_router_is_exact_in_half_precision_and_under_autocast(layer):
    """Logits near 50 have a spacing of 0.25 in bfloat16: the softmaxes would be of other tokens and slots."""
    layer, hidden = layer(), torch.randn(1, 8, 32).bfloat16()
    with torch.no_grad():
        layer.scale.fill_(100.0)
        layer.slot_embed.copy_(layer.slot_embed.bfloat16())
    seen = []
    layer.experts.of_slots = lambda slots: seen.append(slots) or slots
    layer(hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(hidden.float())
    assert layer.bfloat16()(hidden).dtype == torch.bfloat16
    exact, autocast, half = (slots.float() for slots in seen)
    # The mixtures' own rounding: up to 0.0085 at values up to 3.3 over five seeds; with rounded logits 0.04 to 0.18.
    torch.testing.assert_close(autocast, exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2)


def test_layer_compiles_to_one_graph(layer):
    layer, hidden = layer(num_slots_per_expert=2), torch.randn(2, 6, 32)
    token_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, token_mask), layer(hidden, token_mask))


def test_a_causal_model_refuses_it_with_the_reason(tiny_config):
    with pytest.raises(StrictDataclassError, match=r"later ones included.*is_causal=False, in PeerForMaskedLM"):
        tiny_config(sparse_mlp="soft_moe")
    with pytest.raises(StrictDataclassError, match="num_slots_per_expert must be at least 1, got 0"):
        tiny_config(sparse_mlp="soft_moe", is_causal=False, num_slots_per_expert=0)

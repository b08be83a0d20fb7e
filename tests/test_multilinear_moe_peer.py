# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Multilinear mixture against tensors of experts formed whole, and entmax against bisection."""

import pytest
import reference
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import assert_equals_oracle

from modeling_peer import PeerConfig
from modeling_peer.multilinear_moe_peer import PeerMultilinearMoe, entmax15

FORMS = {
    "cp": {"multilinear_form": "cp", "multilinear_ranks": [5]},
    "tensor ring": {"multilinear_form": "tensor_ring", "multilinear_ranks": [2, 3, 4]},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@pytest.fixture
def multilinear_config(tiny_config):
    return lambda **fields: tiny_config(sparse_mlp="multilinear_moe", num_moe_experts=6, **fields)


class TestEntmax:
    @pytest.mark.parametrize("size", [1, 2, 3, 64, 1000])
    @pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 1e4])
    def test_equals_bisection_and_sums_to_one(self, size, scale):
        logits = scale * torch.randn(20, size, dtype=torch.float64)
        expected = torch.stack([reference.entmax15(row) for row in logits])
        torch.testing.assert_close(entmax15(logits), expected, rtol=0, atol=1e-12)  # measured below 4e-13
        # float32: thresholds are differences of sums of up to 1,000 squares; measured below 3e-6
        torch.testing.assert_close(entmax15(logits.float()).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(entmax15(logits.float()).sum(-1), torch.ones(20), rtol=0, atol=1e-5)

    def test_lies_between_softmax_and_sparsemax(self):
        """Logits 2 apart: 1.5-entmax leaves one, where softmax leaves all; half a step apart it leaves several."""
        assert entmax15(torch.tensor([0.0, 2.0, 4.0])).tolist() == [0.0, 0.0, 1.0]
        probabilities = entmax15(torch.tensor([0.0, 0.0, 0.5, 1.0, -3.0]))
        assert (probabilities > 0).tolist() == [True, True, True, True, False]
        assert probabilities[0] == probabilities[1] < probabilities[2] < probabilities[3]

    def test_passes_gradcheck_and_gives_nothing_to_those_left_out(self):
        logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(entmax15, logits)
        probabilities = entmax15(2 * logits)
        (gradient,) = torch.autograd.grad(probabilities.square().sum(), logits)
        assert not gradient[probabilities == 0].any()
        assert (probabilities == 0).any()

    def test_passes_on_what_is_not_a_number(self):
        """A diverged training is to end with its loss, not with an index out of range."""
        assert entmax15(torch.tensor([[0.0, float("nan")], [0.0, float("inf")]])).isnan().all()


def layer_with_unequal_experts(config):
    """Float64, and gating weights that are not the initial zeros."""
    layer = PeerMultilinearMoe(config).double()
    torch.nn.init.normal_(layer.gating)
    return layer


@each_form
def test_layer_and_every_gradient_equal_the_tensors_of_experts(multilinear_config, form):
    layer = layer_with_unequal_experts(multilinear_config(hidden_size=8, moe_intermediate_size=7, **form))
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert (layer._coefficients(hidden) == 0).any(), "no expert is left out: the case shows less"
    assert_equals_oracle(layer, hidden, layer(hidden), reference.multilinear_moe(layer, hidden))


@each_form
def test_layer_starts_with_equal_experts_and_the_authors_scales(multilinear_config, form):
    layer = PeerMultilinearMoe(multilinear_config(**form))
    x = torch.randn(9, 32)
    torch.testing.assert_close(layer._coefficients(x), torch.full((9, 6), 1 / 6))
    inputs, outputs = [p for n, p in layer.first.named_parameters() if not n.startswith("expert")]
    for factor, fan_in in ((inputs, 32), (outputs, outputs.numel() // 64)):  # 64 features
        assert 0.9 * fan_in**-0.5 < factor.abs().max() < fan_in**-0.5


def test_slices_of_a_tensor_ring_start_diagonal_around_one(multilinear_config):
    core = PeerMultilinearMoe(multilinear_config(**FORMS["tensor ring"])).first.expert_core
    diagonal = torch.stack([core[i, :, i] for i in range(2)])
    assert torch.count_nonzero(core) == torch.count_nonzero(diagonal) == 12
    assert abs(diagonal.mean() - 1) < 1  # 12 numbers of standard deviation 1: within 3.5 of their mean's


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({}, [24]),
        ({"multilinear_form": "tensor_ring"}, [4, 4, 6]),
        ({"multilinear_ranks": [3]}, [3]),
        ({"hidden_size": 4, "num_attention_heads": 2, "multilinear_form": "tensor_ring"}, [4, 4, 1]),
    ],
    ids=str,
)
def test_ranks_follow_the_width_where_unset(multilinear_config, fields, ranks):
    config = multilinear_config(**fields)
    assert config.multilinear_factor_ranks == ranks
    assert PeerMultilinearMoe(config)(torch.randn(2, config.hidden_size)).shape == (2, config.hidden_size)


@each_form
def test_layer_keeps_the_dtype_and_routes_in_float32(multilinear_config, form):
    layer, x = PeerMultilinearMoe(multilinear_config(**form)), torch.randn(2, 3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer._coefficients(x).dtype == torch.float32
    x = x.bfloat16()
    assert layer.bfloat16()(x).dtype == torch.bfloat16
    assert layer._coefficients(x).dtype == torch.float32


@each_form
def test_no_tensor_of_experts_is_formed(multilinear_config, form):
    """A forward and a backward hold less than one layer's tensor would take: 6 experts of 33 by 4,096 numbers."""
    layer, x = PeerMultilinearMoe(multilinear_config(moe_intermediate_size=4096, **form)), torch.randn(2, 32)
    assert reference.peak_memory(lambda: layer(x).sum().backward()) < 6 * 33 * 4096 * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multilinear_ranks": [4, 4, 6]}, r"multilinear_ranks is \[4, 4, 6\], but the form 'cp' has 1"),
        ({"multilinear_form": "tensor_ring", "multilinear_ranks": [4, 0, 6]}, "'tensor_ring' has 3, each at least 1"),
        ({"multilinear_form": "tucker"}, "multilinear_form.*tucker"),
        ({"balance_loss": "switch"}, "balance_loss='switch' evens out product keys, which .*multilinear_moe"),
    ],
    ids=str,
)
def test_impossible_factors_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        PeerConfig(sparse_mlp="multilinear_moe", **fields)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantised tables in every implementation, against the float formula on the table's values."""

from functools import partial

import pytest
import reference
import torch
from kernel_helpers import assert_sums_close, output_and_gradients, positive
from torch.utils.flop_counter import FlopCounterMode

from modeling_peer import PeerConfig, PeerLayer, quantise_expert_tables
from modeling_peer.experts_peer import expert_mixture as eager_mixture
from modeling_peer.kernels import operators
from modeling_peer.product_key_memory_peer import PeerProductKeyMemory
from modeling_peer.row_formats_peer import TABLE_FORMATS, quantise_rows

FORMATS = tuple(TABLE_FORMATS)
TABLES = {"down_embed": "down_scale", "up_embed": "up_scale", "gate_embed": "gate_scale"}
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["eager", "cpu", "triton"])
def mixture(request, poisoned_memory):
    if request.param == "eager":
        return eager_mixture
    pytest.importorskip("numba" if request.param == "cpu" else "triton")
    return partial(operators.expert_mixture, implementation=request.param)


def quantised_inputs(table_format, num_tokens=5, num_active=6, width=34, num_experts=9, gated=False):
    """Inputs of a mixture, and the same with the values of the tables in place of tables and scales."""
    names = list(TABLES)[: 3 if gated else 2]
    inputs = {
        "hidden_states": torch.randn(num_tokens, width).requires_grad_(),
        "gates": torch.rand(num_tokens, num_active).requires_grad_(),
        "expert_ids": torch.randint(num_experts, (num_tokens, num_active)),
    }
    plain = dict(inputs)
    for name in names:
        inputs[name], inputs[TABLES[name]] = quantise_rows(torch.randn(num_experts, width), table_format)
        plain[name] = reference.dequantised(inputs[name], inputs[TABLES[name]])
    return inputs, plain


def in_double(inputs):
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


@pytest.mark.parametrize("table_format", FORMATS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"gated": True},
        {"num_tokens": 1, "num_active": 1, "width": 2, "num_experts": 1},  # the smallest
        {"num_tokens": 13, "num_active": 7, "width": 66, "num_experts": 40},  # no power of two, an odd last expert
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_loop_on_the_tables_values(mixture, table_format, sizes):
    inputs, plain = quantised_inputs(table_format, **sizes)
    activation = torch.nn.ReLU()  # keeps the signs of magnitudes
    output, gradients = output_and_gradients(partial(mixture, activation=activation), inputs)
    loop = partial(reference.expert_mixture, activation=activation)
    expected_output, expected = output_and_gradients(loop, in_double(plain))
    magnitudes, of_gradients = output_and_gradients(loop, in_double(positive(plain)), all_positive=True)
    assert gradients.keys() == {"hidden_states", "gates"}
    assert_sums_close(output, expected_output, magnitudes)
    for name in gradients:
        assert_sums_close(gradients[name], expected[name], of_gradients[name], message=name)


@pytest.mark.parametrize("table_format", FORMATS)
def test_no_token_and_one_expert_for_all(mixture, table_format):
    inputs, _ = quantised_inputs(table_format, num_tokens=0)
    assert mixture(**inputs).shape == (0, 34)
    inputs, plain = quantised_inputs(table_format)
    inputs["expert_ids"] = plain["expert_ids"] = torch.full_like(inputs["expert_ids"], 3)
    torch.testing.assert_close(
        mixture(**inputs).double(), reference.expert_mixture(**in_double(plain)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_every_float8_is_read_as_the_number_it_is(implementation, poisoned_memory):
    pytest.importorskip("numba" if implementation == "cpu" else "triton")
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1)
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    written = torch.ops.modeling_peer.write_experts(weights, ids, table, None, False, implementation)
    expected = reference.dequantised(table, torch.ones(1)).float()
    torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("table_format", FORMATS)
def test_the_operators_are_registered_for_compilers(table_format):
    pytest.importorskip("numba")
    table, _ = quantise_rows(torch.randn(9, 8), table_format)
    ids = torch.randint(9, (3, 4))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if table_format == "float8_e4m3":
        tests = tests[1:]  # the first computes with all inputs, and PyTorch does not compute with float8
    for operator, values in (
        (torch.ops.modeling_peer.read_experts, torch.randn(3, 8, requires_grad=True)),
        (torch.ops.modeling_peer.write_experts, torch.rand(3, 4, requires_grad=True)),
    ):
        torch.library.opcheck(operator, (values, ids, table, None, False, "cpu"), test_utils=tests)
    with FlopCounterMode(display=False) as counter:
        torch.ops.modeling_peer.write_experts(torch.rand(3, 4), ids, table, None, False, "cpu")
        torch.ops.modeling_peer.read_experts(torch.rand(3, 8), ids, table, None, False, "cpu")
    assert counter.get_total_flops() == 2 * 2 * 12 * 8  # a row of int4 has as many numbers as any


@pytest.mark.parametrize("table_format", FORMATS)
def test_what_does_not_fit_a_quantised_table_is_refused(table_format):
    pytest.importorskip("numba")
    mixture = partial(operators.expert_mixture, implementation="cpu")
    inputs, plain = quantised_inputs(table_format)
    scale = inputs["down_scale"]
    for wrong, message in (
        (None, "without scales"),
        (scale[:-1], "9 rows need"),
        (scale.double(), "of torch.float32"),
        (scale.to("meta"), "must be on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(**{**inputs, "down_scale": wrong})
    floats = {name: plain[name].float() for name in ("down_embed", "up_embed")}
    with pytest.raises(ValueError, match="with scales"):
        mixture(**{**inputs, **floats})
    with pytest.raises(ValueError, match="must have one width"):
        mixture(**{**inputs, "hidden_states": torch.randn(5, 17)})  # the bytes of a row of int4
    with pytest.raises(IndexError, match="the table has 9 experts"):
        mixture(**{**inputs, "expert_ids": inputs["expert_ids"] + 9})
    weights, tokens, ids = torch.rand(5, 6), torch.randn(5, 34), inputs["expert_ids"]
    order, table = ids.flatten().argsort(stable=True), inputs["up_embed"]
    gradients = torch.ops.modeling_peer
    with pytest.raises(ValueError, match="quantised: it has no gradient"):
        gradients.row_gradients(weights, tokens, ids, order, 9, table.dtype, False, "cpu")
    with pytest.raises(ValueError, match="quantised: it has no gradient"):
        gradients.write_experts_gradients(tokens, weights, ids, order, table, False, "cpu")
    sub_keys = torch.zeros(2, 4, 3, dtype=table.dtype)
    with pytest.raises(ValueError, match=r"sub_keys has dtype .* must be a floating-point"):
        gradients.product_key_top_k(torch.randn(2, 1, 6), sub_keys, 2, "cpu")


@torch.no_grad()
@pytest.mark.parametrize("table_format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (PeerLayer, {}),
        (PeerLayer, {"gated_experts": True}),
        (PeerProductKeyMemory, {"sparse_mlp": "product_key_memory"}),
    ],
    ids=["plain", "gated", "memory"],
)
def test_one_call_gives_what_many_give(monkeypatch, table_format, kind, changes):
    pytest.importorskip("numba")
    from modeling_peer.kernels.cpu import few_tokens

    calls, run_layer = [], few_tokens.run_layer
    monkeypatch.setattr(few_tokens, "run_layer", lambda *args: calls.append(args) or run_layer(*args))
    config = PeerConfig(
        hidden_size=20, num_attention_heads=2, num_sub_keys=9, num_retrieval_heads=3, num_experts_per_head=5,
        query_dim=10, **changes,
    )  # fmt: skip
    layer = quantise_expert_tables(kind(config).eval(), table_format)
    tokens = torch.randn(3, 20)
    config._experts_implementation = "cpu"
    output = layer(tokens)
    assert len(calls) == 1
    config._experts_implementation = "eager"
    # measured: 2e-7 of the largest; sums of 15 experts in another order
    torch.testing.assert_close(output, layer(tokens), rtol=0, atol=2e-6 * float(output.abs().max()))

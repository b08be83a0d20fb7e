# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Rows as int8, int4 and float8: what rounding loses, and rows that could go wrong."""

import pytest
import reference
import torch

from modeling_peer.row_formats_peer import (
    TABLE_FORMATS,
    dequantise_rows,
    format_of,
    is_quantised,
    numbers_of,
    quantise_rows,
    row_width,
)

FORMATS = tuple(TABLE_FORMATS)


@pytest.mark.parametrize("table_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 34), (0, 8)], ids=str)
def test_dequantised_rows_are_their_numbers_times_their_scales(table_format, shape):
    rows, scales = quantise_rows(torch.randn(shape), table_format)
    assert (rows.dtype, scales.dtype, scales.shape) == (TABLE_FORMATS[table_format].dtype, torch.float32, shape[:1])
    assert row_width(rows) == shape[1]
    assert format_of(rows) == table_format
    assert is_quantised(rows.dtype)
    expected = reference.dequantised(rows, scales).view(shape)
    # one product in float32
    torch.testing.assert_close(dequantise_rows(rows, scales).double(), expected, rtol=2**-23, atol=0)


def test_every_float8_is_the_number_that_its_bits_say():
    rows = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1)
    expected = reference.dequantised(rows, torch.ones(1))
    torch.testing.assert_close(numbers_of(rows, torch.float64), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_int8_rounds_to_the_nearest_of_255_steps(scale):
    values = torch.randn(50, 33) * scale
    rows, scales = quantise_rows(values, "int8")
    assert rows.min() >= -127
    torch.testing.assert_close(scales, values.abs().amax(-1) / 127)
    # half a step, and the rounding of the quotient and of the product
    assert ((dequantise_rows(rows, scales) - values).abs() <= scales[:, None] * (0.5 + 1e-4)).all()


def test_float8_rounds_to_three_bits_of_mantissa():
    values = torch.randn(50, 33)
    rows, scales = quantise_rows(values, "float8_e4m3")
    assert rows.float().isfinite().all()
    error = (dequantise_rows(rows, scales) - values).abs()
    # half of the last bit; below 2**-6 numbers are subnormal, 2**-9 apart
    assert (error <= torch.maximum(values.abs() * (2**-4 + 1e-6), scales[:, None] * 2**-10)).all()


def test_int4_clips_where_that_has_the_smaller_squared_error():
    values = torch.randn(200, 64)
    rows, scales = quantise_rows(values, "int4")
    unclipped = values.abs().amax(-1, keepdim=True) / 7
    plain = (values / unclipped).round() * unclipped
    chosen = (dequantise_rows(rows, scales) - values).square().sum(-1)
    assert (chosen <= (plain - values).square().sum(-1) * (1 + 1e-5)).all()
    # measured: 0.83 of the error without clipping
    assert chosen.sum() < 0.9 * (plain - values).square().sum()
    assert (numbers_of(rows, torch.float32).abs() <= 7).all()


@pytest.mark.parametrize("table_format", FORMATS)
def test_rows_of_zeros_and_of_one_value_are_exact(table_format):
    values = torch.zeros(3, 6)
    values[1, 2], values[2] = -3.0, 1e-44  # the last: its scale would be subnormal
    rows, scales = quantise_rows(values, table_format)
    dequantised = dequantise_rows(rows, scales)
    assert scales[0] == scales[2] == 1
    assert not dequantised[[0, 2]].any()
    torch.testing.assert_close(dequantised[1], values[1])


@pytest.mark.parametrize("table_format", FORMATS)
def test_rows_of_bfloat16_are_quantised_as_the_floats_they_are(table_format):
    values = torch.randn(9, 8).bfloat16()
    for one, other in zip(
        quantise_rows(values, table_format), quantise_rows(values.float(), table_format), strict=True
    ):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))

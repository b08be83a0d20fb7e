# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Rows of expert tables as small integers or float8, with one float32 scale per row.

    row = scale · numbers           int8: -127 to 127; int4: -7 to 7, two to a byte; float8_e4m3: up to 448

A table keeps its name and gets a second parameter beside it: `down_embed` and `down_scale`. The dtype of a table says
its format. The whole table is never dequantised. Implementations read the numbers of the retrieved rows and multiply
one number per retrieved row by its scale:

    x · down_i = scale_i · (x · numbers_i)          w · up_i = (w · scale_i) · numbers_i
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

# Values of a table that are quantised at a time. Rounding takes about eight float32 copies of them: 128 MiB.
CHUNK_ELEMENTS = 2**22
# Scales that are tried for a row of int4, as fractions of the one that clips nothing. With 15 levels, clipping the
# largest values of a row costs less than coarser steps for all of them. The least squared error is kept.
CLIP_RATIOS = tuple(1 - 0.04 * i for i in range(13))


class TableFormat(NamedTuple):
    """How rows are stored."""

    dtype: torch.dtype
    largest: float  # magnitude of a number
    numbers_per_element: int = 1


TABLE_FORMATS = {
    "int8": TableFormat(torch.int8, 127.0),
    # Column j of a row is in the low half of byte j, and column j + hidden_size / 2 in its high half, each plus 8.
    "int4": TableFormat(torch.uint8, 7.0, 2),
    "float8_e4m3": TableFormat(torch.float8_e4m3fn, 448.0),
}
_FORMAT_OF_DTYPE = {one.dtype: name for name, one in TABLE_FORMATS.items()}


def format_of(table: torch.Tensor) -> str | None:
    """Name of the format of a table or of its rows; None if it is not quantised."""
    return _FORMAT_OF_DTYPE.get(table.dtype)


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether tables of this dtype are quantised, rather than floats."""
    return dtype in _FORMAT_OF_DTYPE


def stored_width(hidden_size: int, table_format: str | None) -> int:
    """Elements in which a row of `hidden_size` numbers is stored."""
    return hidden_size if table_format is None else hidden_size // TABLE_FORMATS[table_format].numbers_per_element


def row_width(table: torch.Tensor) -> int:
    """Numbers in a row of `table`: the hidden size, for every format."""
    return table.shape[-1] * (2 if table.dtype == torch.uint8 else 1)


def numbers_of(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers `(..., hidden_size)` in rows of any format, in `dtype`, not multiplied by their scales."""
    if rows.dtype == torch.uint8:
        return torch.cat([rows & 15, rows >> 4], dim=-1).to(dtype) - 8
    return rows.to(dtype)


def scaled(values: torch.Tensor, scales: torch.Tensor | None, expert_ids: torch.Tensor) -> torch.Tensor:
    """`values`, one for each retrieved row, times the scales of these rows; as they are if rows have none.

    Args:
        values, expert_ids: `(num_tokens, num_active)`.
        scales: `(num_peer_experts,)`, float32.
    """
    if scales is None:
        return values
    # Not `F.embedding`, which takes 9 ms for 262,144 rows of one number; this takes 1 (one Zen 3 core).
    return values * scales.detach().index_select(0, expert_ids.flatten()).view(expert_ids.shape)


def dequantise_rows(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of rows.

    Args:
        rows: `(..., stored_width)`.
        scales: `(...)`, float32.

    Returns:
        `(..., hidden_size)`, float32.
    """
    return numbers_of(rows, torch.float32) * scales.unsqueeze(-1)


def quantise_rows(rows: torch.Tensor, table_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows symmetrically. The largest magnitude of a row, clipped for int4, becomes the largest number.

    Args:
        rows: `(num_rows, hidden_size)`, finite floating-point numbers.

    Returns:
        rows: `(num_rows, stored_width)` in the dtype of the format.
        scales: `(num_rows,)`, float32; 1 for a row of zeros.
    """
    dtype, largest, numbers_per_element = TABLE_FORMATS[table_format]
    rows = rows.detach().to(torch.float32)
    scales = rows.abs().amax(-1) / largest
    # A row of zeros, or of numbers so small that the scale would lose bits as a subnormal number.
    scales = scales.where(scales >= torch.finfo(torch.float32).tiny, 1.0)
    if not dtype.is_floating_point:
        numbers, scales = _rounded(rows, scales, largest, CLIP_RATIOS if table_format == "int4" else (1.0,))
    else:
        numbers = (rows / scales.unsqueeze(-1)).clamp(-largest, largest)
    if numbers_per_element == 2:
        low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=-1)
        return low | high << 4, scales
    return numbers.to(dtype), scales


def _rounded(rows, scales, largest, ratios) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and scales, of the clip ratio with the least squared error in each row."""
    best_numbers = best_scales = least = None
    for ratio in ratios:
        tried = ratio * scales
        numbers = (rows / tried.unsqueeze(-1)).round().clamp(-largest, largest)
        if len(ratios) == 1:
            return numbers, tried
        error = (rows - numbers * tried.unsqueeze(-1)).square().sum(-1)
        if least is None:
            best_numbers, best_scales, least = numbers, tried, error
        else:
            better = error < least
            best_numbers = torch.where(better.unsqueeze(-1), numbers, best_numbers)
            best_scales, least = tried.where(better, best_scales), error.where(better, least)
    return best_numbers, best_scales


def row_chunks(table: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of which one is quantised at a time."""
    size = max(1, CHUNK_ELEMENTS // max(1, row_width(table)))
    return (slice(start, start + size) for start in range(0, len(table), size))

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantised rows of expert tables, which the dtype of a table tells apart.

Kernels read their numbers. The scales of rows are applied outside, to one value per retrieved row (`operators`).
"""

import torch

# int8: one number an element. uint8: int4, column j in the low half of byte j and column j + width / 2 in its high
# half, each plus 8. float8: its own value.
QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn)


def is_quantised(dtype: torch.dtype) -> bool:
    return dtype in QUANTISED_DTYPES


def row_width(table: torch.Tensor) -> int:
    """Numbers in a row of `table` (num_experts, elements): the width of tokens it is read with."""
    return table.shape[1] * 2 if table.dtype == torch.uint8 else table.shape[1]

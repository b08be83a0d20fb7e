# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checks of the arguments of a row update: compiled loops check no bounds and could write outside the tensors."""

import torch

from .lazy_gradients import OuterProducts


def check_adamw_rows(
    table: torch.Tensor,
    exp_avg: torch.Tensor | None,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor | OuterProducts,
    catch_up: torch.Tensor,
    step: int,
) -> None:
    """Check the arguments of `adamw_rows_`. Values are read only on CPU, because there it needs no wait for a device.

    Args:
        table, exp_avg: `(num_rows, width)`. exp_avg may be None.
        exp_avg_sq: the same shape if there is exp_avg, or `(num_rows, 1)`.
        rows: `(num_touched,)` int64, each at most once.
        gradients: `(num_touched, width)`, computed or still as `OuterProducts`.
        catch_up: `(num_touched, 4)`.
        step: at least 1.

    Raises:
        ValueError: shapes do not fit together, rows are outside the table or given twice, or the step is below 1.
    """
    if table.dim() != 2:
        raise ValueError(f"table must have two dimensions; got the shape {tuple(table.shape)}.")
    num_rows, width = table.shape
    if exp_avg is not None:
        _require_shape("exp_avg", exp_avg, (num_rows, width))
    if tuple(exp_avg_sq.shape) != (num_rows, 1):
        _require_shape("exp_avg_sq", exp_avg_sq, (num_rows, 1 if exp_avg is None else width))
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be one-dimensional and int64; got {tuple(rows.shape)}, {rows.dtype}.")
    _require_shape("catch_up", catch_up, (len(rows), 4))
    if step < 1:
        raise ValueError(f"step ({step}) must be at least 1: the first step is number 1.")
    if isinstance(gradients, OuterProducts):
        _check_products(gradients, len(rows), width)
    else:
        _require_shape("gradients", gradients, (len(rows), width))
    if rows.device.type == "cpu" and len(rows):
        _require_range("rows", rows, num_rows)
        # Rows of a coalesced gradient are ascending, so none is repeated, and no sort is needed.
        if not (rows[1:] > rows[:-1]).all() and (repeated := len(rows) - len(rows.unique())):
            raise ValueError(f"{repeated} of {len(rows)} rows are repeated. Call coalesce() on the gradient.")


def _check_products(products: OuterProducts, num_touched: int, width: int) -> None:
    num_products, num_tokens = len(products.weights), len(products.tokens)
    _require_shape("starts", products.starts, (num_touched + 1,))
    _require_shape("token_ids", products.token_ids, (num_products,))
    _require_shape("tokens", products.tokens, (num_tokens, width))
    starts = products.starts
    if starts[0] != 0 or starts[-1] != num_products or (starts.diff() < 0).any():
        raise ValueError(f"starts must rise from 0 to {num_products}, the number of products.")
    if num_products:
        _require_range("token_ids", products.token_ids, num_tokens)


def _require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; the table and its rows need {shape}.")


def _require_range(name: str, ids: torch.Tensor, stop: int) -> None:
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= stop:
        raise ValueError(f"{name} must be from 0 to {stop - 1}; got {lowest} to {highest}.")

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW on the rows of a table that a step touched, in one pass over their memory."""

import math

import numpy as np
import torch

from . import cpu_threads
from .cpu_experts import all_below, sum_products
from .cpu_memory import array, move_to_huge_pages
from .cpu_simd import chance, compiled, narrow, narrow_by_chance, prefetch_row, widen
from .lazy_gradients import OuterProducts

PREFETCHED_ROWS = 2
MIN_ROWS_PER_THREAD = 256


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor | OuterProducts,
    asleep: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`training.row_sparse_adamw.adamw_rows_`, the same arguments and effect.

    Raises:
        ValueError: sizes or dtypes do not fit, as after loading the state of another optimizer.
        IndexError: `rows` are not ascending rows of the table.
    """
    _check(table, exp_avg, exp_avg_sq, rows, gradients, asleep)
    beta1, beta2 = betas
    factors = np.array(
        [1 - lr * weight_decay, beta1, beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps], np.float32
    )
    for memory in (table, exp_avg, exp_avg_sq):
        move_to_huge_pages(memory)
    one_square = exp_avg_sq.shape[1] < table.shape[1]  # for the whole row
    kernel = _adamw_rows_of_one_square if one_square else _adamw_rows
    if isinstance(gradients, OuterProducts):
        values, products = None, tuple(map(array, gradients[1:]))
    else:
        values, products = array(gradients.contiguous()), None
    tensors = [array(tensor) for tensor in (table, exp_avg, exp_avg_sq, rows)]
    arguments = (*tensors, values, products, array(asleep), factors, step)
    cpu_threads.run(kernel, len(rows), MIN_ROWS_PER_THREAD, *arguments)


def _check(table, exp_avg, exp_avg_sq, rows, gradients, asleep):
    """Kernels know a tensor by its address and would write beyond it."""
    num_rows, width = rows.shape[0] if rows.dim() == 1 else -1, table.shape[-1]
    if isinstance(gradients, OuterProducts):
        _check_products(gradients, num_rows, width)
    elif gradients.shape != (num_rows, width):
        raise ValueError(f"gradients {tuple(gradients.shape)} must be ({num_rows}, {width}): rows of the table.")
    if (
        table.dim() != 2
        or exp_avg.shape != table.shape
        or exp_avg_sq.shape not in (table.shape, (table.shape[0], 1))
        or asleep.shape != (num_rows, 4)
    ):
        raise ValueError(
            f"exp_avg {tuple(exp_avg.shape)}, exp_avg_sq {tuple(exp_avg_sq.shape)}, rows {tuple(rows.shape)} and "
            f"asleep {tuple(asleep.shape)} do not fit a table {tuple(table.shape)}. Is the optimizer's state that of "
            "another model?"
        )
    floats = (table, exp_avg, exp_avg_sq, *((gradients,) if isinstance(gradients, torch.Tensor) else ()))
    if rows.dtype != torch.int64 or any(tensor.dtype not in (torch.float32, torch.bfloat16) for tensor in floats):
        dtypes = ", ".join(str(tensor.dtype) for tensor in floats)
        raise ValueError(f"The table and its moments must be float32 or bfloat16, and rows int64; got {dtypes}.")
    if not all_below(array(rows), table.shape[0]) or (rows[1:] <= rows[:-1]).any():
        raise IndexError(f"rows must ascend, each once, within the table's {table.shape[0]}.")


def _check_products(products, num_rows, width):
    rows, starts, weights, token_ids, tokens = products
    fits = (
        rows.shape == (num_rows,)
        and starts.shape == (num_rows + 1,)
        and weights.dim() == 1
        and weights.shape == token_ids.shape
        and tokens.dim() == 2
        and tokens.shape[1] == width
    )
    if not fits:
        shapes = ", ".join(str(tuple(part.shape)) for part in products)
        raise ValueError(f"Products of shapes {shapes} are no gradients of {num_rows} rows of width {width}.")
    if starts[0] != 0 or starts[-1] != len(weights) or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"starts must ascend from 0 to {len(weights)}.")
    if not all_below(array(token_ids), len(tokens)):
        raise IndexError(f"token_ids must lie below {len(tokens)}.")


@compiled
def _gradient(gradients, products, i, total):
    """That of row i, which lies in `gradients`, or is multiplied out into `total`."""
    if products is not None:
        starts, weights, token_ids, tokens = products
        sum_products(total, starts[i], starts[i + 1], weights, token_ids, tokens)
        gradient = total
    if gradients is not None:  # no `else`: the compiler leaves out what tests for an argument that is None
        gradient = gradients[i]
    return gradient


@compiled
def _adamw_rows(table, exp_avg, exp_avg_sq, rows, gradients, products, asleep, factors, step, chunk, num_chunks):
    keep, beta1, beta2, step_size, correction, eps = factors
    one = np.float32(1)
    total = np.empty(table.shape[1], np.float32)
    stop = len(rows) * (chunk + 1) // num_chunks
    for i in range(len(rows) * chunk // num_chunks, stop):
        ahead = rows[min(i + PREFETCHED_ROWS, stop - 1)]
        prefetch_row(table, ahead)
        prefetch_row(exp_avg, ahead)
        prefetch_row(exp_avg_sq, ahead)
        weights, gradient = table[rows[i]], _gradient(gradients, products, i, total)
        means, squares = exp_avg[rows[i]], exp_avg_sq[rows[i]]
        kept, travelled, mean_kept, square_kept = asleep[i]
        for j in range(len(weights)):
            g, mean, square = widen(gradient[j]), widen(means[j]), widen(squares[j])
            weight = kept * widen(weights[j]) + travelled * mean / (np.sqrt(square) + eps)
            mean = beta1 * mean_kept * mean + (one - beta1) * g
            square = beta2 * square_kept * square + (one - beta2) * g * g
            change = step_size * mean / (np.sqrt(square) * correction + eps)
            means[j] = narrow(mean, means[j])
            squares[j] = narrow_by_chance(square, squares[j], chance(rows[i], j, step))
            weights[j] = narrow(keep * weight - change, weights[j])


@compiled
def _adamw_rows_of_one_square(
    table, exp_avg, exp_avg_sq, rows, gradients, products, asleep, factors, step, chunk, num_chunks
):
    keep, beta1, beta2, step_size, correction, eps = factors
    one = np.float32(1)
    total = np.empty(table.shape[1], np.float32)
    stop = len(rows) * (chunk + 1) // num_chunks
    for i in range(len(rows) * chunk // num_chunks, stop):
        ahead = rows[min(i + PREFETCHED_ROWS, stop - 1)]
        prefetch_row(table, ahead)
        prefetch_row(exp_avg, ahead)
        weights, means, gradient = table[rows[i]], exp_avg[rows[i]], _gradient(gradients, products, i, total)
        kept, travelled, mean_kept, square_kept = asleep[i]
        sum_of_squares = np.float32(0)
        for j in range(len(weights)):
            sum_of_squares += widen(gradient[j]) * widen(gradient[j])
        square = exp_avg_sq[rows[i], 0]
        travelled /= np.sqrt(square) + eps
        square = beta2 * square_kept * square + (one - beta2) * sum_of_squares / np.float32(len(weights))
        exp_avg_sq[rows[i], 0] = square
        rate = step_size / (np.sqrt(square) * correction + eps)
        for j in range(len(weights)):
            mean = widen(means[j])
            weight = kept * widen(weights[j]) + travelled * mean
            mean = beta1 * mean_kept * mean + (one - beta1) * widen(gradient[j])
            means[j] = narrow(mean, means[j])
            weights[j] = narrow(keep * weight - rate * mean, weights[j])

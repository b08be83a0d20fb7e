# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW on the rows of a table that a step touched, in one pass over their memory."""

import math

import numpy as np
import torch

from ..lazy_gradients import OuterProducts
from ..optimizer_arguments import check_adamw_rows
from . import threads
from .experts import sum_products
from .memory import array, move_to_huge_pages
from .simd import compiled, hash_to_16_bits, narrow, narrow_stochastically, prefetch_row, widen

PREFETCHED_ROWS = 2
MIN_ROWS_PER_THREAD = 256


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor | None,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor | OuterProducts,
    catch_up: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`optim.row_sparse_adamw.adamw_rows_`, with the same arguments and effect.

    Raises:
        ValueError: the compiled loop does not support the shapes, rows or dtypes.
    """
    check_adamw_rows(table, exp_avg, exp_avg_sq, rows, gradients, catch_up, step)
    one_square = exp_avg is None or exp_avg_sq.shape[1] < table.shape[1]  # one for the whole row
    _check_dtypes(table, exp_avg, exp_avg_sq, gradients, one_square)
    owners = [tensor for tensor in (table, exp_avg, exp_avg_sq) if tensor is not None]
    memories = [tensor.contiguous() for tensor in owners]
    beta1, beta2 = betas
    if exp_avg is None:
        beta1, kernel = 0.0, _adamw_rows_without_mean
    else:
        kernel = _adamw_rows_of_one_square if one_square else _adamw_rows
    factors = np.array(
        [1 - lr * weight_decay, beta1, beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps], np.float32
    )
    for memory in memories:
        move_to_huge_pages(memory)
    if isinstance(gradients, OuterProducts):
        values, products = None, tuple(array(tensor.contiguous()) for tensor in gradients[1:])
    else:
        values, products = array(gradients.contiguous()), None
    tensors = [array(tensor) for tensor in (*memories, rows.contiguous())]
    arguments = (*tensors, values, products, array(catch_up.float().contiguous()), factors, step)
    threads.run(kernel, len(rows), MIN_ROWS_PER_THREAD, *arguments)
    for owner, memory in zip(owners, memories, strict=True):
        if not owner.is_contiguous():
            owner.copy_(memory)


def _check_dtypes(table, exp_avg, exp_avg_sq, gradients, one_square: bool) -> None:
    floats = (torch.float32, torch.bfloat16)
    taken = {
        "table": (table, floats),
        "exp_avg_sq": (exp_avg_sq, floats[:1] if one_square else floats),
    }
    if exp_avg is not None:
        taken["exp_avg"] = (exp_avg, floats)
    if isinstance(gradients, OuterProducts):
        dtypes = (torch.int64, torch.int64, torch.float32, torch.int64, torch.float32)
        for name, tensor, dtype in zip(gradients._fields, gradients, dtypes, strict=True):
            taken[name] = (tensor, (dtype,))
    else:
        taken["gradients"] = (gradients, floats)
    for name, (tensor, dtypes) in taken.items():
        if tensor.dtype not in dtypes or tensor.device.type != "cpu":
            names = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} must be {names} on the CPU; got {tensor.dtype} on {tensor.device}.")


@compiled
def _gradient(gradients, products, i, total):
    """The gradient of row i, read from `gradients` or computed into `total`."""
    if products is not None:
        starts, weights, token_ids, tokens = products
        sum_products(total, starts[i], starts[i + 1], weights, token_ids, tokens)
        gradient = total
    if gradients is not None:  # no `else`: the compiler removes code that tests an argument for None
        gradient = gradients[i]
    return gradient


@compiled
def _adamw_rows(table, exp_avg, exp_avg_sq, rows, gradients, products, catch_up, factors, step, chunk, num_chunks):
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
        kept, travelled, mean_kept, square_kept = catch_up[i]
        for j in range(len(weights)):
            g, mean, square = widen(gradient[j]), widen(means[j]), widen(squares[j])
            weight = kept * widen(weights[j]) + travelled * mean / (np.sqrt(square) + eps)
            mean = beta1 * mean_kept * mean + (one - beta1) * g
            square = beta2 * square_kept * square + (one - beta2) * g * g
            change = step_size * mean / (np.sqrt(square) * correction + eps)
            means[j] = narrow(mean, means[j])
            squares[j] = narrow_stochastically(square, squares[j], hash_to_16_bits(rows[i], j, step))
            weights[j] = narrow(keep * weight - change, weights[j])


@compiled
def _adamw_rows_of_one_square(
    table, exp_avg, exp_avg_sq, rows, gradients, products, catch_up, factors, step, chunk, num_chunks
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
        kept, travelled, mean_kept, square_kept = catch_up[i]
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


@compiled
def _adamw_rows_without_mean(table, exp_avg_sq, rows, gradients, products, catch_up, factors, step, chunk, num_chunks):
    keep, _, beta2, step_size, correction, eps = factors
    one = np.float32(1)
    total = np.empty(table.shape[1], np.float32)
    stop = len(rows) * (chunk + 1) // num_chunks
    for i in range(len(rows) * chunk // num_chunks, stop):
        ahead = rows[min(i + PREFETCHED_ROWS, stop - 1)]
        prefetch_row(table, ahead)
        prefetch_row(exp_avg_sq, ahead)
        weights, gradient = table[rows[i]], _gradient(gradients, products, i, total)
        kept, _, _, square_kept = catch_up[i]
        sum_of_squares = np.float32(0)
        for j in range(len(weights)):
            sum_of_squares += widen(gradient[j]) * widen(gradient[j])
        square = beta2 * square_kept * exp_avg_sq[rows[i], 0]
        square += (one - beta2) * sum_of_squares / np.float32(len(weights))
        exp_avg_sq[rows[i], 0] = square
        rate = step_size / (np.sqrt(square) * correction + eps)
        for j in range(len(weights)):
            weights[j] = narrow(keep * (kept * widen(weights[j])) - rate * widen(gradient[j]), weights[j])

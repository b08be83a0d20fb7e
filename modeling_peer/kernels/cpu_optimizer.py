# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW on the rows of a table that a step touched, in one pass over their memory."""

import math

import numpy as np
import torch

from . import cpu_threads
from .cpu_memory import array, move_to_huge_pages
from .cpu_simd import compiled, narrow, prefetch_row, widen

PREFETCHED_ROWS = 2
MIN_ROWS_PER_THREAD = 256


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`training.row_sparse_adamw.adamw_rows_`, the same arguments and effect."""
    beta1, beta2 = betas
    factors = np.array(
        [1 - lr * weight_decay, beta1, beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps], np.float32
    )
    for memory in (table, exp_avg, exp_avg_sq):
        move_to_huge_pages(memory)
    arguments = (array(table), array(exp_avg), array(exp_avg_sq), array(rows), array(gradients), factors)
    cpu_threads.run(_adamw_rows, len(rows), MIN_ROWS_PER_THREAD, *arguments)


@compiled
def _adamw_rows(table, exp_avg, exp_avg_sq, rows, gradients, factors, chunk, num_chunks):
    keep, beta1, beta2, step_size, correction, eps = factors
    one = np.float32(1)
    stop = len(rows) * (chunk + 1) // num_chunks
    for i in range(len(rows) * chunk // num_chunks, stop):
        ahead = rows[min(i + PREFETCHED_ROWS, stop - 1)]
        prefetch_row(table, ahead)
        prefetch_row(exp_avg, ahead)
        prefetch_row(exp_avg_sq, ahead)
        weights, gradient = table[rows[i]], gradients[i]
        means, squares = exp_avg[rows[i]], exp_avg_sq[rows[i]]
        for j in range(len(weights)):
            g = widen(gradient[j])
            mean = beta1 * widen(means[j]) + (one - beta1) * g
            square = beta2 * widen(squares[j]) + (one - beta2) * g * g
            change = step_size * mean / (np.sqrt(square) * correction + eps)
            means[j], squares[j] = narrow(mean, means[j]), narrow(square, squares[j])
            weights[j] = narrow(keep * widen(weights[j]) - change, weights[j])

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Check that CPU kernels can be compiled and run here: import everything they need, and run a tiny one."""

import numpy as np

from . import optimizer, retrieval  # noqa: F401 (their imports are a part of the question)
from .experts import dot_row
from .products import FEW_KEYS, FEW_ROWS, score_few_block
from .simd import compiled, prefetch_row
from .threads import in_parallel

WIDTH = 8


def probe() -> None:
    """Compile and run the building blocks of all kernels: threads, prefetching, vectors.

    It needs no tensor, so it can run while PyTorch traces.

    Raises:
        Exception: of any kind, from the part that fails.
    """
    rows, columns = np.ones((FEW_KEYS, WIDTH), np.float32), np.ones((WIDTH, FEW_ROWS), np.float32)
    products, sums = np.zeros((FEW_KEYS, FEW_ROWS), np.float32), np.zeros(FEW_KEYS, np.float32)
    _probe(rows, columns, products, sums)
    if (products != WIDTH).any() or (sums != WIDTH).any():
        raise ArithmeticError(f"sums of {WIDTH} ones came out as {products[0, 0]} and {sums[0]}")


@compiled
def _probe(rows, columns, products, sums):
    score_few_block(rows, 0, columns, products, 0)
    in_parallel(_sum_rows, (rows, columns, sums), 2, 1)


@compiled
def _sum_rows(rows, columns, sums, chunk, num_chunks):
    for i in range(len(rows) * chunk // num_chunks, len(rows) * (chunk + 1) // num_chunks):
        prefetch_row(rows, i)
        sums[i] = dot_row(columns[:, 0].copy(), rows[i])

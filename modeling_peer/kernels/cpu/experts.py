# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing experts on CPU, at the speed of memory, and the gradients of their tables.

    read    pre[t, a] = tokens[t] · table[id]                     one pass over the rows of each token
    write   out[t]    = Σ_a weights[t, a] · table[id]             the same
    rows    grad[id]  = Σ_(t, a) weights[t, a] · tokens[t]        one pass over assignments sorted by expert, at once
                                                                  or when an optimizer reads the row (`OuterProducts`)

A row may be anywhere in a table of gigabytes, so the next rows are prefetched while one is used. Rows are not gathered
into a separate tensor. Sums run in float32; tables are float32, bfloat16 or quantised (`row_formats_peer`). Numbers of
quantised rows are widened in registers. One thread computes each element in a fixed order. So results are
bit-identical from run to run, whatever the number of threads.
"""

import numpy as np
import torch

from ...row_formats_peer import row_width
from ..checks import check_ids_exist, raise_unsorted
from ..lazy_gradients import OuterProducts
from . import threads
from .memory import array, borrowed, floats, move_to_huge_pages
from .simd import compiled, is_packed, narrow, prefetch_row, widen, widen_high

# Rows prefetched ahead of the current one: best of 0, 1, 2, 4, 8, 16 on two Zen 4 cores, rows of 1 KiB, 2026-11-22.
PREFETCHED_ROWS = 8
# A row of 1 KiB takes about 0.1 us: see `cpu.threads.run`.
MIN_ASSIGNMENTS_PER_THREAD = 1024
RADIX_BITS = 11


def group_by_expert(expert_ids: torch.Tensor) -> torch.Tensor:
    """Positions in flattened `expert_ids` (t, a), int64, sorted stably by expert: (t * a,), int64."""
    ids = expert_ids.flatten()
    order = torch.empty_like(ids)
    if len(ids):
        lowest, highest = (int(bound) for bound in ids.aminmax())
        if lowest < 0:
            raise IndexError(f"expert_ids lie from {lowest} to {highest}: an expert's id is 0 or more.")
        _radix_argsort(array(ids), highest, array(order))
    return order


@compiled
def _radix_argsort(ids, largest, order):
    """Stable radix sort with `RADIX_BITS` per pass, lowest bits first: two passes for a million experts."""
    mask = np.int64((1 << RADIX_BITS) - 1)
    other = np.empty_like(order)
    for i in range(len(ids)):
        order[i] = i
    shift = 0
    while shift == 0 or largest >> shift:
        starts = np.zeros((1 << RADIX_BITS) + 1, np.int64)
        for i in range(len(ids)):
            starts[((ids[i] >> shift) & mask) + 1] += 1
        for digit in range(1 << RADIX_BITS):
            starts[digit + 1] += starts[digit]
        for i in range(len(ids)):
            position = order[i]
            digit = (ids[position] >> shift) & mask
            other[starts[digit]] = position
            starts[digit] += 1
        order[:] = other
        shift += RADIX_BITS


def read_experts(tokens: torch.Tensor, expert_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Dot products (t, a), float32, of `tokens` (t, d) with their rows of `table` (N, d)."""
    tokens, products = tokens.to(torch.float32), torch.empty_like(expert_ids, dtype=torch.float32)
    ids, rows = ids_and_rows(expert_ids, table)
    _for_assignments(_read, expert_ids.numel(), borrowed(tokens), ids, rows, borrowed(products))
    return products


@compiled
def _read(tokens, expert_ids, table, products, chunk, num_chunks):
    num_active = expert_ids.shape[1]
    ids, out = expert_ids.reshape(-1), products.reshape(-1)
    stop = len(ids) * (chunk + 1) // num_chunks
    for slot in range(len(ids) * chunk // num_chunks, stop):
        prefetch_row(table, ids[min(slot + PREFETCHED_ROWS, stop - 1)])
        out[slot] = dot_row(tokens[slot // num_active], table[ids[slot]])


def write_experts(weights: torch.Tensor, expert_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Weighted sums (t, d), float32, of rows of `table` (N, d), with `weights` (t, a)."""
    weights = weights.to(torch.float32)
    outputs = torch.empty(expert_ids.shape[0], row_width(table), dtype=torch.float32, device="cpu")
    ids, rows = ids_and_rows(expert_ids, table)
    _for_assignments(_write, expert_ids.numel(), borrowed(weights), ids, rows, borrowed(outputs))
    return outputs


@compiled
def _write(weights, expert_ids, table, outputs, chunk, num_chunks):
    num_tokens, num_active = expert_ids.shape
    ids = expert_ids.reshape(-1)
    last = num_tokens * num_active - 1
    for token in range(num_tokens * chunk // num_chunks, num_tokens * (chunk + 1) // num_chunks):
        output = outputs[token]
        output[:] = 0
        first = token * num_active
        for a in range(0, num_active - 1, 2):  # two at a time, to load and store the output half as often
            prefetch_row(table, ids[min(first + a + PREFETCHED_ROWS, last)])
            prefetch_row(table, ids[min(first + a + PREFETCHED_ROWS + 1, last)])
            _add_two(
                output, weights[token, a], table[ids[first + a]], weights[token, a + 1], table[ids[first + a + 1]]
            )
        if num_active % 2:
            add_row(output, weights[token, num_active - 1], table[ids[first + num_active - 1]])


def row_gradients(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    row_sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of `weights` (t, a) times `tokens` (t, d) over the assignments of each expert, in `dtype`.

    Returns:
        rows: experts with assignments, ascending, `(u,)`; empty without `row_sparse`.
        values: their gradients, `(u, d)`; or those of all experts, `(num_experts, d)`.
    """
    products = OuterProducts.group(expert_ids, order, weights, tokens, num_experts)
    rows, values, targets = _gradient(products.rows, num_experts, tokens.shape[1], dtype, row_sparse)
    _multiply_out_into(products, targets, values)
    return rows, values


def write_experts_gradients(
    grad_outputs: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    table: torch.Tensor,
    row_sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `write_experts` for `grad_outputs` (t, d): those of `weights`, (t, a), and those of `table`.

    The latter are as in `row_gradients`. One pass computes both. It loads each row once for all its assignments, and
    each token once for both gradients.
    """
    touched, starts = segments(expert_ids, order, table.shape[0])
    rows, values, targets = _gradient(touched, *table.shape, table.dtype, row_sparse)
    grad_weights = torch.empty(expert_ids.shape, dtype=torch.float32, device="cpu")
    arguments = (floats(weights), floats(grad_outputs), array(order), array(starts), array(targets))
    arguments += (array(values), array(touched), array(table), array(grad_weights))
    _for_assignments(_sum_rows_and_read, expert_ids.numel(), *arguments)
    return grad_weights, rows, values


@compiled
def _sum_rows_and_read(weights, tokens, order, starts, targets, values, rows, table, products, chunk, num_chunks):
    num_active = weights.shape[1]
    flat_weights, flat_products = weights.reshape(-1), products.reshape(-1)
    total = np.empty(tokens.shape[1], np.float32)
    stop = len(rows) * (chunk + 1) // num_chunks
    for segment in range(len(rows) * chunk // num_chunks, stop):
        prefetch_row(table, rows[min(segment + PREFETCHED_ROWS, stop - 1)])
        row = table[rows[segment]]
        total[:] = 0
        for i in range(starts[segment], starts[segment + 1]):
            token = tokens[order[i] // num_active]
            flat_products[order[i]] = dot_row(token, row)
            add_row(total, flat_weights[order[i]], token)
        _store(total, values[targets[segment]])


def read_experts_in_order(products: OuterProducts, order: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`read_experts` of the tokens in `products`, whose assignments `order` sorted: (t * a,), float32.

    Each row is loaded once for all its assignments, and rows are read in memory order.
    """
    results = torch.empty(len(order), dtype=torch.float32, device="cpu")
    rows, starts, _, token_ids, tokens = map(array, products)
    _for_assignments(
        _read_in_order, len(order), tokens, token_ids, starts, rows, array(order), array(table), array(results)
    )
    return results


@compiled
def _read_in_order(tokens, token_ids, starts, rows, order, table, results, chunk, num_chunks):
    stop = len(rows) * (chunk + 1) // num_chunks
    for i in range(len(rows) * chunk // num_chunks, stop):
        prefetch_row(table, rows[min(i + PREFETCHED_ROWS, stop - 1)])
        for j in range(starts[i], starts[i + 1]):
            results[order[j]] = dot_row(tokens[token_ids[j]], table[rows[i]])


def multiply_out(products: OuterProducts, dtype: torch.dtype) -> torch.Tensor:
    """Values (u, d) of the rows of `products`."""
    values = torch.empty(len(products.rows), products.tokens.shape[1], dtype=dtype, device="cpu")
    _multiply_out_into(products, torch.arange(len(values), device="cpu"), values)
    return values


def _multiply_out_into(products, targets, values):
    arguments = (*map(array, products[1:]), array(targets), array(values))
    _for_assignments(_multiply_out, len(products.weights), *arguments)


@compiled
def _multiply_out(starts, weights, token_ids, tokens, targets, values, chunk, num_chunks):
    total = np.empty(tokens.shape[1], np.float32)
    for i in range(len(targets) * chunk // num_chunks, len(targets) * (chunk + 1) // num_chunks):
        sum_products(total, starts[i], starts[i + 1], weights, token_ids, tokens)
        _store(total, values[targets[i]])


def squared_norms(products: OuterProducts) -> torch.Tensor:
    """Squared norm of each row of `products`: (u,), float32."""
    norms = torch.empty(len(products.rows), dtype=torch.float32, device="cpu")
    _for_assignments(_square, len(products.weights), *map(array, products[1:]), array(norms))
    return norms


@compiled
def _square(starts, weights, token_ids, tokens, norms, chunk, num_chunks):
    total = np.empty(tokens.shape[1], np.float32)
    for i in range(len(norms) * chunk // num_chunks, len(norms) * (chunk + 1) // num_chunks):
        sum_products(total, starts[i], starts[i + 1], weights, token_ids, tokens)
        norms[i] = dot_row(total, total)


@compiled
def sum_products(total, start, stop, weights, token_ids, tokens):
    """Compute one row of `OuterProducts` into `total`."""
    total[:] = 0
    for j in range(start, stop):
        add_row(total, weights[j], tokens[token_ids[j]])


def segments(expert_ids: torch.Tensor, order: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts with assignments, ascending, `(u,)`, and where the assignments of each start in `order`, `(u + 1,)`.

    Raises:
        ValueError: `order` is not `group_by_expert(expert_ids)`.
        IndexError: some of `num_experts` experts do not exist.
    """
    ids = expert_ids.flatten()
    rows, starts = torch.empty_like(order), torch.empty(len(order) + 1, dtype=torch.int64, device="cpu")
    count = _find_segments(array(ids), array(order), array(rows), array(starts)) if len(ids) == len(order) else -1
    if count < 0:
        raise_unsorted(order)
    if count and not 0 <= int(rows[0]) <= int(rows[count - 1]) < num_experts:
        check_ids_exist(ids, num_experts)
    # Clones, because the full-length buffers would otherwise live as long as the gradient.
    return rows[:count].clone(), starts[: count + 1].clone()


@compiled
def _find_segments(ids, order, rows, starts):
    """Number of segments; -1 if `order` does not sort all positions by id, and equal ids by position.

    With such an order, kernels would read beyond memory or leave positions without a result.
    """
    count = 0
    for i in range(len(order)):
        if not 0 <= order[i] < len(ids):
            return -1
        expert_id = ids[order[i]]
        if count == 0 or rows[count - 1] < expert_id:
            rows[count], starts[count] = expert_id, i
            count += 1
        elif rows[count - 1] > expert_id or order[i - 1] >= order[i]:
            return -1
    starts[count] = len(order)
    return count


def _gradient(touched, num_experts, width, dtype, row_sparse):
    """`rows` and `values` as `row_gradients` returns them, and the row of `values` for each touched expert."""
    if row_sparse:
        return (
            touched,
            torch.empty(len(touched), width, dtype=dtype, device="cpu"),
            torch.arange(len(touched), device="cpu"),
        )
    # Not in huge pages: with half a GiB of them per step, Linux soon takes longer to find them than they save.
    return touched.new_empty(0), torch.zeros(num_experts, width, dtype=dtype, device="cpu"), touched


def ids_and_rows(expert_ids: torch.Tensor, table: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as borrowed arrays, after a check that the experts exist."""
    ids, num_experts = borrowed(expert_ids), table.shape[0]
    if not all_below(ids, num_experts):
        check_ids_exist(expert_ids, num_experts)
    return ids, rows_of(table)


def rows_of(table: torch.Tensor) -> np.ndarray:
    """A table as a borrowed array, in huge pages if it is large."""
    move_to_huge_pages(table)
    return borrowed(table)


@compiled
def all_below(expert_ids, num_experts):
    outside = 0
    for expert_id in expert_ids.reshape(-1):
        outside += (expert_id < 0) | (expert_id >= num_experts)
    return outside == 0


def _for_assignments(kernel, num_assignments, *arguments):
    threads.run(kernel, num_assignments, MIN_ASSIGNMENTS_PER_THREAD, *arguments)


@compiled
def dot_row(token, row):
    total, half = np.float32(0), len(row)
    if is_packed(row):
        for i in range(half):
            total += token[i] * widen(row[i]) + token[half + i] * widen_high(row[i])
    else:
        for i in range(len(row)):
            total += token[i] * widen(row[i])
    return total


@compiled
def add_row(total, weight, row):
    if is_packed(row):
        half = len(row)
        for i in range(half):
            total[i] += weight * widen(row[i])
        for i in range(half):
            total[half + i] += weight * widen_high(row[i])
    else:
        for i in range(len(total)):
            total[i] += weight * widen(row[i])


@compiled
def _add_two(total, weight, row, other_weight, other_row):
    if is_packed(row):
        half = len(row)
        for i in range(half):
            total[i] += weight * widen(row[i]) + other_weight * widen(other_row[i])
        for i in range(half):
            total[half + i] += weight * widen_high(row[i]) + other_weight * widen_high(other_row[i])
    else:
        for i in range(len(total)):
            total[i] += weight * widen(row[i]) + other_weight * widen(other_row[i])


@compiled
def _store(total, row):
    for i in range(len(row)):
        row[i] = narrow(total[i], row[i])

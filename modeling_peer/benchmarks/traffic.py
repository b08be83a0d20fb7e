# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Bytes that must move between memory and processor.

They are a lower bound for the time of a layer whose speed memory bandwidth limits.
"""

from dataclasses import dataclass

import torch

from modeling_peer.benchmarks.contenders import Contender
from modeling_peer.benchmarks.settings import Case


@dataclass(frozen=True)
class Rows:
    """Rows of expert tables that one call uses, all tables together."""

    requested: int  # num_tokens * h * k in each table
    distinct: int  # different rows among them


def count_rows(contender: Contender, tokens: torch.Tensor) -> Rows:
    """Count the rows that the contender retrieves for `tokens`, `(1, num_tokens, hidden_size)`; 0 for a dense MLP."""
    if contender.find_experts is None:
        return Rows(0, 0)
    with torch.no_grad():
        expert_ids = contender.find_experts(tokens)
    num_tables = len(contender.tables)
    return Rows(num_tables * expert_ids.numel(), num_tables * expert_ids.unique().numel())


def bytes_to_move(
    task: str, rows_read: int, rows_touched: int, row_bytes: int, token_bytes: int, weight_bytes: int
) -> int:
    """Bytes of one call. Each tensor counts once per pass that needs it; temporaries may stay in the cache.

        forward            rows read + tokens in and out + weights
        backward           rows read again, their gradients written; tokens and the output's gradient in, the tokens'
                           gradient out; weights in, their gradients out
        update (AdamW)     gradient in; weight and two moments in and out: 7 values of the weights' type for each
                           parameter touched

    With `rows_read = rows_touched = distinct rows` this is the minimum of an implementation that writes the gradients
    of rows to memory. Lazy gradients (`kernels.lazy_gradients`) are not written, but count the same, so that
    contenders compare. With requested rows it is the traffic of an implementation that reuses no row.

    Queries, scores, ids and gates are not counted. Neither are dense gradients and dense updates of whole tables,
    because they depend on the implementation.

    Args:
        task: one of `TASKS`.
        rows_read, rows_touched: rows of all tables together.
        row_bytes: bytes of one row, in the table's dtype.
        token_bytes: bytes of all tokens of the call, `num_tokens * hidden_size` values.
        weight_bytes: bytes of the parameters that a call uses whole: query network and sub-keys, or a dense MLP.
    """
    total = rows_read * row_bytes + 2 * token_bytes + weight_bytes
    if task in ("forward_backward", "step"):
        total += 2 * rows_read * row_bytes + 3 * token_bytes + 2 * weight_bytes
    if task == "step":
        total += 7 * (rows_touched * row_bytes + weight_bytes)
    return total


def measure_traffic(
    contender: Contender, case: Case, rows: Rows, median_ms: float, copy_bytes_per_second: float
) -> dict[str, float]:
    """Traffic of one measured contender: bytes, GB/s, and percent of the machine's copy bandwidth."""
    itemsize = next(contender.module.parameters()).element_size()
    tables = {id(table) for table in contender.tables}
    weight_bytes = sum(p.nbytes for p in contender.module.parameters() if id(p) not in tables)
    row_bytes = contender.tables[0][0].nbytes if contender.tables else 0
    sizes = (row_bytes, case.num_tokens * case.hidden_size * itemsize, weight_bytes)
    must_move = bytes_to_move(case.task, rows.distinct, rows.distinct, *sizes)
    requested = bytes_to_move(case.task, rows.requested, rows.distinct, *sizes)
    seconds = median_ms / 1000
    return {
        "must_move_bytes": must_move,
        "must_move_gb_per_s": round(must_move / seconds / 1e9, 3),
        "requested_bytes": requested,
        "requested_gb_per_s": round(requested / seconds / 1e9, 3),
        "percent_of_copy_bandwidth": round(100 * must_move / seconds / copy_bytes_per_second, 2),
    }

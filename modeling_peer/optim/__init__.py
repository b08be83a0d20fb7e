# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Optimization of models with huge tables, in any loop: row-sparse gradients, `RowSparseAdamW`, parameter groups."""

from modeling_peer.optim.parameter_groups import parameter_groups, schedule_tables
from modeling_peer.optim.row_sparse_adamw import RowSparseAdamW
from modeling_peer.optim.row_sparse_gradients import average_over_processes, clip_gradients, row_sparse_gradients
from modeling_peer.optim.sparse_embeddings import train_rows_sparsely

__all__ = [
    "RowSparseAdamW",
    "average_over_processes",
    "clip_gradients",
    "parameter_groups",
    "row_sparse_gradients",
    "schedule_tables",
    "train_rows_sparsely",
]

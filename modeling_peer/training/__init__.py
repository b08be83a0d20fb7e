# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training: recipes, `PeerTrainer`, checkpoints, runs. It needs the `train` extra; loading a model does not."""

from importlib.util import find_spec

_MISSING = [name for name in ("accelerate", "datasets", "evaluate") if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"training needs packages that are not installed: {', '.join(_MISSING)}. "
        "Install them with `pip install -e '.[train]'` in a clone of PEER, or by name.",
        name=_MISSING[0],
    )

from modeling_peer.optim import (  # noqa: E402
    RowSparseAdamW,
    average_over_processes,
    clip_gradients,
    parameter_groups,
    row_sparse_gradients,
    schedule_tables,
    train_rows_sparsely,
)
from modeling_peer.training.arguments import PeerTrainingArguments  # noqa: E402
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback  # noqa: E402
from modeling_peer.training.trainer import PeerTrainer  # noqa: E402

__all__ = [
    "ExpertUsageCallback",
    "PeerTrainer",
    "PeerTrainingArguments",
    "RowSparseAdamW",
    "average_over_processes",
    "clip_gradients",
    "parameter_groups",
    "row_sparse_gradients",
    "schedule_tables",
    "train_rows_sparsely",
]

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Detects optimizers that do not support row-sparse gradients, and raises an error with the optimizer and the way out.

PyTorch's own error is "Adam does not support sparse gradients, please consider SparseAdam instead". It names none of
our settings and proposes an optimizer for embeddings.
"""

from weakref import WeakValueDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Optimizers of torch.optim. Optimizers from elsewhere are not checked.
OPTIMIZERS_OF_SPARSE_GRADIENTS = ("SGD", "SparseAdam", "Adagrad", "LBFGS")
WAY_OUT = (
    "Train with modeling_peer.training.PeerTrainer, or in a loop of your own with RowSparseAdamW and clip_gradients; "
    "or set row_sparse_gradients=False in the model's configuration."
)

_tables: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_hooks = []


def expect_row_sparse_gradients(*tables: torch.Tensor | None) -> None:
    """Register that a forward with gradients will give these tables row-sparse gradients.

    From the first call on, every optimizer step checks whether it is a PyTorch optimizer that does not support them.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))
    _tables.update((id(table), table) for table in tables if table is not None)


def _check_optimizer(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or kind.__name__ in OPTIMIZERS_OF_SPARSE_GRADIENTS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse and _tables.get(id(parameter)) is parameter:
                raise ValueError(
                    f"An expert table {tuple(parameter.shape)} has a row-sparse gradient (row_sparse_gradients=True), "
                    f"and torch.optim.{kind.__name__} supports dense gradients only. {WAY_OUT}"
                )

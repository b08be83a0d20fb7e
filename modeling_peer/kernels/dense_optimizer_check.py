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
    "or set {setting}=False {place}."
)
# what has the gradient, the setting that caused it, and where to turn that off
EXPERT_TABLE = ("An expert table", "row_sparse_gradients", "in the model's configuration")
EMBEDDING = ("An embedding", "sparse", "on the embedding")

_tables = {kind: WeakValueDictionary() for kind in (EXPERT_TABLE, EMBEDDING)}  # tensors by their id()
_hooks = []


def expect_row_sparse_gradients(*tables: torch.Tensor | None, kind: tuple[str, str, str] = EXPERT_TABLE) -> None:
    """Register that a forward with gradients will give these tables row-sparse gradients.

    From the first call on, every optimizer step checks whether it is a PyTorch optimizer that does not support them.

    Args:
        kind: `EXPERT_TABLE` or `EMBEDDING`, for the message.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))
    _tables[kind].update((id(table), table) for table in tables if table is not None)


def _check_optimizer(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    name = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim.") or name in OPTIMIZERS_OF_SPARSE_GRADIENTS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or not gradient.is_sparse:
                continue
            for (what, setting, place), tables in _tables.items():
                if tables.get(id(parameter)) is parameter:
                    raise ValueError(
                        f"{what} {tuple(parameter.shape)} has a row-sparse gradient ({setting}=True), and torch.optim."
                        f"{name} supports dense gradients only. {WAY_OUT.format(setting=setting, place=place)}"
                    )

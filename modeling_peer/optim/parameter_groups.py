# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Parameter groups with separate learning rates and weight decays, and the schedule of tables."""

import re
from collections import defaultdict
from functools import partial
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# tables trained by an adapter (PEFT's modules_to_save) are one module deeper
EXPERT_TABLE = re.compile(r"(^|\.)experts\.(modules_to_save\.\w+\.)?\w+_embed$")
RETRIEVAL = re.compile(r"(^|\.)retrieval\.")
DENSE, WITHOUT_DECAY, RETRIEVAL_GROUP = "dense", "without_decay", "retrieval"
EXPERT_TABLES, SPARSE_EMBEDDINGS = "expert_tables", "sparse_embeddings"
TABLE_GROUPS = (EXPERT_TABLES, SPARSE_EMBEDDINGS)
TABLE_SCHEDULES = ("multiple", "decaying", "constant")


def expert_tables(model: nn.Module) -> list[nn.Parameter]:
    """The trained expert tables of `model`. A table that layers share is listed once."""
    return [p for name, p in model.named_parameters() if EXPERT_TABLE.search(name) and p.requires_grad]


def sparse_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights of embeddings with row-sparse gradients (`train_rows_sparsely`), each once.

    Raises:
        ValueError: one was sharded over processes after `train_rows_sparsely`, as by FSDP2's `fully_shard`.
    """
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and module.weight.requires_grad:
            if hasattr(module.weight, "device_mesh"):
                raise ValueError(
                    f"{name} has row-sparse gradients and is sharded over processes, which reduce only dense "
                    f"gradients. Set {name}.sparse = False, or use DistributedDataParallel and average_over_processes."
                )
            weights[id(module.weight)] = module.weight
    return list(weights.values())


def trained_tables(model: nn.Module) -> list[nn.Parameter]:
    """All trained tables of `model`: of experts, and of embeddings whose gradients are row-sparse."""
    return [*expert_tables(model), *sparse_embeddings(model)]


def expert_pools(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold expert tables, by a method, since remote code has classes of its own."""
    return [module for module in model.modules() if hasattr(type(module), "has_row_sparse_gradients")]


def has_row_sparse_gradients(model: nn.Module) -> bool:
    """Whether gradients of expert tables of `model` are row-sparse, by its configuration or in this run."""
    return any(pool.has_row_sparse_gradients() for pool in expert_pools(model))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    table_learning_rate_multiple: float = 1.0,
    table_weight_decay: float = 0.0,
    retrieval_learning_rate_multiple: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups of `model` for any optimizer of torch.

    - `"dense"`: the weight matrices, with `weight_decay`.
    - `"without_decay"`: norms and biases.
    - `"retrieval"`: query networks and sub-keys, without decay. Their learning rate is a multiple of the others'. If
      it is high, they soon agree on few experts (docs/study_tables.md).
    - `"expert_tables"`: a learning rate that is a multiple of the others', since few tokens train a row. There is no
      decay by default, because it would shrink the rows that no token retrieves at every step.
    - `"sparse_embeddings"`: embeddings with row-sparse gradients (`train_rows_sparsely`), with the settings of expert
      tables.

    A group whose gradients are row-sparse has `row_sparse=True`, so that `RowSparseAdamW` knows it before the first
    step. Empty groups are left out. Parameters on different device meshes do not share a group,
    because no optimizer updates them in one call.

    Args:
        learning_rate: per step, for dense weights and those without decay. The other groups use multiples of it.
    """
    of_tables = {"lr": learning_rate * table_learning_rate_multiple, "weight_decay": table_weight_decay}
    settings = {
        DENSE: {"lr": learning_rate, "weight_decay": weight_decay},
        WITHOUT_DECAY: {"lr": learning_rate, "weight_decay": 0.0},
        RETRIEVAL_GROUP: {"lr": learning_rate * retrieval_learning_rate_multiple, "weight_decay": 0.0},
        EXPERT_TABLES: {**of_tables},
        SPARSE_EMBEDDINGS: {**of_tables, "row_sparse": True},
    }
    if has_row_sparse_gradients(model):
        settings[EXPERT_TABLES]["row_sparse"] = True
    members, embeddings = defaultdict(list), {id(weight) for weight in sparse_embeddings(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = SPARSE_EMBEDDINGS if id(parameter) in embeddings else _group_of(name, parameter)
            members[group, getattr(parameter, "device_mesh", None)].append(parameter)
    order = list(settings)
    return [
        {"params": parameters, "name": name, **settings[name]}
        for (name, _), parameters in sorted(members.items(), key=lambda item: order.index(item[0][0]))
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if EXPERT_TABLE.search(name):
        return EXPERT_TABLES
    if RETRIEVAL.search(name):
        return RETRIEVAL_GROUP
    return WITHOUT_DECAY if parameter.ndim < 2 else DENSE


def schedule_tables(scheduler: LRScheduler, schedule: str, multiple: float, num_training_steps: int) -> LRScheduler:
    """Give the groups of tables a separate schedule. Their learning rate depends on `schedule`:

    - `"multiple"`: `multiple` times the others', at every step.
    - `"decaying"`: `multiple` times the others' at the first step. The factor falls linearly to 1 at the last step
      (UltraMem, arXiv:2411.12364, from 10).
    - `"constant"`: `multiple` times `learning_rate`, without warm-up or decay (Lample et al. 2019).

    Args:
        scheduler: scheduler of an optimizer built from `parameter_groups` with the same `multiple`. Except for
            `"multiple"` it must be a `LambdaLR`, as most of Transformers' schedulers are.

    Returns:
        For `"multiple"` the same scheduler, otherwise a new one.

    Raises:
        ValueError: the schedule is unknown, or cannot be combined with this scheduler.
    """
    if schedule not in TABLE_SCHEDULES:
        raise ValueError(
            f"table_learning_rate_schedule must be one of {', '.join(TABLE_SCHEDULES)}; got {schedule!r}."
        )
    if schedule == "multiple":
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"table_learning_rate_schedule={schedule!r} needs a LambdaLR, such as Transformers' linear, cosine and "
            f'constant schedulers; got {type(scheduler).__name__}. Use "multiple" with it.'
        )
    lambdas = [
        partial(
            _table_factor, others=others, schedule=schedule, multiple=multiple, num_training_steps=num_training_steps
        )
        if group.get("name") in TABLE_GROUPS
        else others
        for group, others in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True)
    ]
    return LambdaLR(scheduler.optimizer, lambdas)


# At module level and used as a partial, so that a scheduler's state does not contain it and can be saved.
def _table_factor(step: int, others, schedule: str, multiple: float, num_training_steps: int) -> float:
    """The factor of the group's `learning_rate * multiple` at `step`."""
    if schedule == "constant":
        return 1.0
    remaining = max(0.0, 1 - step / max(1, num_training_steps))
    return others(step) * (1 + (multiple - 1) * remaining) / multiple

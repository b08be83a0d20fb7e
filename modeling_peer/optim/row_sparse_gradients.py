# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Row-sparse gradients between backward and optimizer step: coalescing, clipping, averaging over processes."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_peer.kernels.lazy_gradients import LazyRowGradient, OuterProducts
from modeling_peer.optim.parameter_groups import EXPERT_TABLE, expert_pools, trained_tables


@contextmanager
def row_sparse_gradients(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside this context, gradients of the expert tables of `model` are row-sparse; with `enabled=False`, dense.

    This is a setting of the run rather than of the model. The configuration keeps its value, so any optimizer can
    train a checkpoint that is saved inside or outside the context.
    """
    pools = expert_pools(model)
    if enabled and not pools:
        raise ValueError(f"{type(model).__name__} has no expert tables, so it cannot have row-sparse gradients.")
    before = [pool.row_sparse for pool in pools]
    for pool in pools:
        pool.row_sparse = enabled
    try:
        yield
    finally:
        for pool, row_sparse in zip(pools, before, strict=True):
            pool.row_sparse = row_sparse


def coalesced(gradient: torch.Tensor) -> torch.Tensor:
    """A row-sparse gradient with each row once, in order.

    Raises:
        ValueError: the gradient is sparse in more than its rows.
    """
    if isinstance(gradient, DTensor):
        return DTensor(coalesced(gradient._local_tensor), gradient._spec, requires_grad=False)
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"A gradient of shape {tuple(gradient.shape)} is sparse in {gradient.sparse_dim()} dimensions: "
            "only the first dimension, the rows, may be sparse."
        )
    if gradient.is_coalesced():
        return gradient
    # Autograd drops the coalesced flag. Sorting again would take as long as the optimizer's step.
    rows = gradient._indices()
    if (rows[0, 1:] > rows[0, :-1]).all():
        return _row_sparse(rows, gradient._values(), gradient.shape)
    return gradient.coalesce()


def touched_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | OuterProducts]:
    """The rows in this rank's part of a row-sparse gradient, and their gradients.

    Returns:
        rows: `(num_touched,)`, int64.
        gradients: `(num_touched, width)`, or the `OuterProducts` that they are sums of.
    """
    gradient = local_rows(gradient)
    if (products := lazy_products(gradient)) is not None:
        return products.rows, products
    gradient = coalesced(gradient)
    return gradient._indices()[0], gradient._values()


def is_row_sparse(gradient: torch.Tensor) -> bool:
    """Whether a gradient contains only some rows. It also works for a `LazyRowGradient` inside a DTensor."""
    return local_rows(gradient).is_sparse


def lazy_products(gradient: torch.Tensor) -> OuterProducts | None:
    """The outer products of a gradient whose rows are not computed yet; None for any other gradient."""
    return gradient.products() if isinstance(gradient, LazyRowGradient) else None


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor sharded over processes, or all rows of any other tensor.

    `DTensor.to_local` does not support sparse tensors.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def sharded_as(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor sharded like `table`, of which `rows` is this rank's part."""
    if not isinstance(table, DTensor):
        return rows
    shape = torch.Size((len(table), *rows.shape[1:]))
    return DTensor.from_local(
        rows, table.device_mesh, table.placements, run_check=False, shape=shape, stride=rows.stride()
    )


def _row_sparse(
    rows: torch.Tensor, values: torch.Tensor, shape: torch.Size, is_coalesced: bool = True
) -> torch.Tensor:
    # device: without it, the tensor would move to the default device
    return torch.sparse_coo_tensor(
        rows, values, shape, device=values.device, is_coalesced=is_coalesced, check_invariants=False
    )


class GradientNorms(NamedTuple):
    """Norms before clipping, float32 scalars."""

    tables: torch.Tensor
    others: torch.Tensor


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> GradientNorms:
    """Clip the gradients of tables to `max_norm`, and separately all others to `max_norm`.

    Tables are those of experts, and embeddings whose gradients are row-sparse (`train_rows_sparsely`).

    It replaces `torch.nn.utils.clip_grad_norm_`, which does not support sparse gradients. Clipping is separate, as in
    the code of Memory Layers at Scale (arXiv:2412.09764). An unusual gradient of the tables then does not change the
    step of the dense weights. `float("inf")` measures and does not clip.
    """
    tables = trained_tables(model)
    table_ids = {id(table) for table in tables}
    others = [parameter for parameter in model.parameters() if id(parameter) not in table_ids]
    return GradientNorms(_clip(tables, max_norm), _clip(others, max_norm))


def _clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    groups: dict = {}  # gradients on different device meshes can't be in one call
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            if is_row_sparse(gradient) and lazy_products(gradient) is None:
                parameter.grad = coalesced(gradient)
                # the norm of a sharded table covers the values of all ranks
                gradient = sharded_as(parameter, local_rows(parameter.grad)._values())
            groups.setdefault((getattr(gradient, "device_mesh", None), gradient.device), []).append(gradient)
    if not groups:
        return torch.zeros((), dtype=torch.float32, device="cpu")  # not the default device and dtype
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in groups.values()]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.nn.utils.get_total_norm(norms)
    if max_norm < math.inf:
        # multiplied even if it is 1: a check would wait for the device
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for (_, device), gradients in groups.items():
            torch._foreach_mul_(gradients, scale.to(device))
    return total


def average_over_processes(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Make `DistributedDataParallel` train a model whose tables have row-sparse gradients. Call it before wrapping.

    DDP reduces only sparse gradients that come from `nn.Embedding`, and NCCL reduces none. Tables are therefore left
    out of DDP, embeddings with row-sparse gradients too. They start with the first process's values. As soon as a
    backward has accumulated a table's gradient, the processes exchange the rows they touched and take the mean. If the
    outer products of all processes are no larger than the table, they exchange these instead.

    The mean of equal gradients is the gradient itself, so extra exchanges, such as under `DDP.no_sync`, are harmless.
    Inside `Accelerator.accumulate` and Trainer, only the last micro-batch causes an exchange, as in DDP. All processes
    run the same backward, so they exchange the same table at the same time.

    Raises:
        ValueError: the tables are sharded, so no process has them whole.
    """
    tables = trained_tables(model)
    if any(hasattr(table, "device_mesh") for table in tables):
        raise ValueError("The expert tables are sharded over processes. Set row_sparse_gradients to false.")
    ids = {id(table) for table in tables}
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if EXPERT_TABLE.search(name) or id(parameter) in ids]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for table in tables:
        dist.broadcast(table.data, dist.get_global_rank(process_group, 0) if process_group else 0, process_group)
        table.register_post_accumulate_grad_hook(lambda table: _average(table, process_group))


def _average(table: nn.Parameter, process_group: dist.ProcessGroup | None) -> None:
    if not _is_last_micro_batch():
        return
    if not table.grad.is_sparse:
        raise ValueError(
            f"The gradient of a table of shape {tuple(table.shape)} is dense. After average_over_processes, "
            "DistributedDataParallel does not average it. Set row_sparse_gradients, or do not call "
            "average_over_processes."
        )
    num_processes = dist.get_world_size(process_group)
    products = lazy_products(table.grad)
    may_be_lazy = products is not None and num_processes * products.nbytes <= table.nbytes
    # If one process has to compute its rows, or already did because they were read, all processes compute theirs.
    all_lazy = torch.tensor(int(may_be_lazy), device=table.device)
    dist.all_reduce(all_lazy, dist.ReduceOp.MIN, process_group)
    if all_lazy:
        products = products._replace(weights=products.weights / num_processes)
        parts = [OuterProducts(*tensors) for tensors in _exchange(products, process_group)]
        table.grad = LazyRowGradient.of(parts, table)
        return
    gradient = coalesced(table.grad)
    parts = _exchange((gradient._indices()[0], gradient._values() / num_processes), process_group)
    rows, values = map(torch.cat, zip(*parts, strict=True))
    table.grad = _row_sparse(rows.unsqueeze(0), values, table.shape, is_coalesced=False).coalesce()


def _is_last_micro_batch() -> bool:
    """Whether Accelerate synchronizes gradients in this backward. True in a loop without Accelerate."""
    try:
        from accelerate.state import GradientState
    except ModuleNotFoundError:
        return True
    return GradientState().sync_gradients


def _exchange(
    tensors: tuple[torch.Tensor, ...], process_group: dist.ProcessGroup | None
) -> list[tuple[torch.Tensor, ...]]:
    """The `tensors` of every process. Their lengths differ, so they are padded for the exchange."""
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    all_lengths = [torch.empty_like(lengths) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(all_lengths, lengths, process_group)
    gathered = []
    for tensor, counts in zip(tensors, torch.stack(all_lengths, dim=1).tolist(), strict=True):
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        all_padded = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(all_padded, padded, process_group)
        gathered.append([padded[:count].clone() for padded, count in zip(all_padded, counts, strict=True)])
    return list(zip(*gathered, strict=True))

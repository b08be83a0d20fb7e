# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Row-sparse gradients between backward and the optimizer's step: added up, averaged over processes, clipped."""

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
from modeling_peer.optim.parameter_groups import EXPERT_TABLE, expert_tables


def has_row_sparse_gradients(model: nn.Module) -> bool:
    """Whether the configuration of `model` says so."""
    return getattr(getattr(model, "config", None), "row_sparse_gradients", False)


@contextmanager
def row_sparse_gradients(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within, gradients of the expert tables of `model` are row-sparse, or not `enabled` dense.

    A setting of the run rather than of the model: a checkpoint saved outside is trained by any optimizer again.
    """
    if enabled == has_row_sparse_gradients(model):
        yield
        return
    if not hasattr(model.config, "row_sparse_gradients"):
        raise ValueError(f"{type(model).__name__} has no expert tables: row_sparse_gradients is of PEER models.")
    model.config.row_sparse_gradients = enabled
    try:
        yield
    finally:
        model.config.row_sparse_gradients = not enabled


def coalesced(gradient: torch.Tensor) -> torch.Tensor:
    """A row-sparse gradient with every row once, in order.

    Raises:
        ValueError: a gradient that is sparse in more than its rows.
    """
    if isinstance(gradient, DTensor):
        return DTensor(coalesced(gradient._local_tensor), gradient._spec, requires_grad=False)
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"A gradient of shape {tuple(gradient.shape)} is sparse in {gradient.sparse_dim()} dimensions: "
            "only gradients that are sparse in rows are taken."
        )
    if gradient.is_coalesced():
        return gradient
    # Autograd forgets that a gradient is coalesced, and sorting it again would cost as much as the optimizer's step.
    rows = gradient._indices()
    if (rows[0, 1:] > rows[0, :-1]).all():
        return _row_sparse(rows, gradient._values(), gradient.shape)
    return gradient.coalesce()


def touched_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | OuterProducts]:
    """Rows that this rank's part of a row-sparse gradient touches, `(num_touched,)`, and their gradients."""
    gradient = local_rows(gradient)
    if (products := lazy_products(gradient)) is not None:
        return products.rows, products
    gradient = coalesced(gradient)
    return gradient._indices()[0], gradient._values()


def is_row_sparse(gradient: torch.Tensor) -> bool:
    """Whether a gradient holds some rows only. A DTensor does not know it of a `LazyRowGradient` inside."""
    return local_rows(gradient).is_sparse


def lazy_products(gradient: torch.Tensor) -> OuterProducts | None:
    """What a gradient that is not multiplied out yet is made of; None of any other."""
    return gradient.products() if isinstance(gradient, LazyRowGradient) else None


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that is sharded over processes (`DTensor.to_local` refuses sparse ones), or all."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def sharded_as(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What this rank has for its rows of `table`, as part of a tensor that is sharded as `table` is."""
    if not isinstance(table, DTensor):
        return rows
    shape = torch.Size((len(table), *rows.shape[1:]))
    return DTensor.from_local(
        rows, table.device_mesh, table.placements, run_check=False, shape=shape, stride=rows.stride()
    )


def _row_sparse(
    rows: torch.Tensor, values: torch.Tensor, shape: torch.Size, is_coalesced: bool = True
) -> torch.Tensor:
    # device: without it, the default one would take them there
    return torch.sparse_coo_tensor(
        rows, values, shape, device=values.device, is_coalesced=is_coalesced, check_invariants=False
    )


class GradientNorms(NamedTuple):
    """Norms before clipping, float32 scalars."""

    tables: torch.Tensor
    others: torch.Tensor


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> GradientNorms:
    """Clip the gradients of expert tables to `max_norm`, and apart from them all others to `max_norm`.

    In place of `torch.nn.utils.clip_grad_norm_`, which knows no sparse gradients. Apart, as in the code of Memory
    Layers at Scale (arXiv:2412.09764): an unusual step of the tables then leaves that of the dense weights as it is.
    `float("inf")` measures and clips nothing.
    """
    tables = expert_tables(model)
    apart = {id(table) for table in tables}
    others = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    return GradientNorms(_clip(tables, max_norm), _clip(others, max_norm))


def _clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    groups: dict = {}  # gradients on different device meshes can't be in one call
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            if is_row_sparse(gradient) and lazy_products(gradient) is None:
                parameter.grad = coalesced(gradient)
                # of a sharded table, the norm is that of all ranks' values
                gradient = sharded_as(parameter, local_rows(parameter.grad)._values())
            groups.setdefault((getattr(gradient, "device_mesh", None), gradient.device), []).append(gradient)
    if not groups:
        return torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the defaults are
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in groups.values()]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.nn.utils.get_total_norm(norms)
    if max_norm < math.inf:
        # multiplied by 1 if need be: to ask whether it is would be to wait for the device
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for (_, device), gradients in groups.items():
            torch._foreach_mul_(gradients, scale.to(device))
    return total


def average_over_processes(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Make `DistributedDataParallel` train a model whose tables have row-sparse gradients. Call it before wrapping.

    DDP reduces only those sparse gradients that come from `nn.Embedding`, and NCCL none. Tables are therefore left out
    of it: they begin as the first process has them, and as soon as a backward has added up the gradient of one, the
    processes exchange the rows that they touched, or what these are made of while that is less, and each takes the
    mean. A mean of equal gradients is the gradient, so nothing goes wrong where this happens more often than needed,
    such as under `DDP.no_sync`; inside `Accelerator.accumulate` and Trainer it waits for the last micro-batch, as DDP
    does. All processes run the same backward, and so exchange the same table at the same time.

    Raises:
        ValueError: the tables are sharded: no process has them whole.
    """
    tables = expert_tables(model)
    if any(hasattr(table, "device_mesh") for table in tables):
        raise ValueError("The expert tables are sharded over processes: set row_sparse_gradients to false.")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if EXPERT_TABLE.search(name)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for table in tables:
        dist.broadcast(table.data, dist.get_global_rank(process_group, 0) if process_group else 0, process_group)
        table.register_post_accumulate_grad_hook(lambda table: _average(table, process_group))


def _average(table: nn.Parameter, process_group: dist.ProcessGroup | None) -> None:
    if not _is_last_micro_batch():
        return
    if not table.grad.is_sparse:
        raise ValueError(
            f"The gradient of an expert table {tuple(table.shape)} is dense, and DistributedDataParallel was told to "
            "leave it out: set row_sparse_gradients before average_over_processes, or call neither."
        )
    num_processes = dist.get_world_size(process_group)
    products = lazy_products(table.grad)
    may_be_lazy = products is not None and num_processes * products.nbytes <= table.nbytes
    # All multiply theirs out where one has to, or did since somebody looked.
    all_lazy = torch.tensor(int(may_be_lazy), device=table.device)
    dist.all_reduce(all_lazy, dist.ReduceOp.MIN, process_group)
    if all_lazy:
        products = products._replace(weights=products.weights / num_processes)
        parts = [OuterProducts(*of_process) for of_process in _exchange(products, process_group)]
        table.grad = LazyRowGradient.of(parts, table)
        return
    gradient = coalesced(table.grad)
    parts = _exchange((gradient._indices()[0], gradient._values() / num_processes), process_group)
    rows, values = map(torch.cat, zip(*parts, strict=True))
    table.grad = _row_sparse(rows.unsqueeze(0), values, table.shape, is_coalesced=False).coalesce()


def _is_last_micro_batch() -> bool:
    """What Accelerate says while it accumulates gradients; True in a loop without it."""
    try:
        from accelerate.state import GradientState
    except ModuleNotFoundError:
        return True
    return GradientState().sync_gradients


def _exchange(
    tensors: tuple[torch.Tensor, ...], process_group: dist.ProcessGroup | None
) -> list[tuple[torch.Tensor, ...]]:
    """The `tensors` of every process; they differ in length, collectives do not."""
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    all_lengths = [torch.empty_like(lengths) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(all_lengths, lengths, process_group)
    gathered = []
    for tensor, counts in zip(tensors, torch.stack(all_lengths, dim=1).tolist(), strict=True):
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        of_processes = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(of_processes, padded, process_group)
        gathered.append([padded[:count].clone() for padded, count in zip(of_processes, counts, strict=True)])
    return list(zip(*gathered, strict=True))

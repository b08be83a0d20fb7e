# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the processes of tests/optim/test_sharded_embeddings.py run."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from modeling_peer.optim import (
    RowSparseAdamW,
    average_over_processes,
    clip_gradients,
    parameter_groups,
    train_rows_sparsely,
)

TOKENS = torch.tensor([[1, 5, 7, 5], [2, 5, 9, 3]])  # a row for each process


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))


def refusals() -> dict[str, str]:
    """What is said of embeddings that are sharded before and after `train_rows_sparsely`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_rows, before, after = new_model(), new_model(), new_model()
    by_rows[0].weight = nn.Parameter(distribute_tensor(by_rows[0].weight.detach(), mesh, [Shard(0)]))
    fully_shard(before, mesh=mesh)
    train_rows_sparsely(after, "0")
    fully_shard(after, mesh=mesh)
    calls = {
        "rows": lambda: train_rows_sparsely(by_rows, "0"),
        "before": lambda: train_rows_sparsely(before, "0"),
        "groups": lambda: parameter_groups(after, 0.01),
        "clip": lambda: clip_gradients(after, 1.0),
        "average": lambda: average_over_processes(after),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    after[0].sparse = False  # the way out
    after(TOKENS[dist.get_rank()]).sum().backward()
    torch.optim.AdamW(parameter_groups(after, 0.01)).step()
    said["way out"] = str(after[0].weight.full_tensor().shape)
    return said


def three_steps(in_processes: bool) -> torch.Tensor:
    """The embedding after three steps of both rows of tokens: a row for each process, or both in this one."""
    model = new_model()
    train_rows_sparsely(model, "0")
    optimizer = RowSparseAdamW(parameter_groups(model, 0.1))
    network, tokens = model, TOKENS
    if in_processes:
        average_over_processes(model)
        network, tokens = DistributedDataParallel(model), TOKENS[dist.get_rank()].unsqueeze(0)
    for step in range(3):
        network((tokens + step) % 10).square().mean().backward()
        clip_gradients(model, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model[0].weight.detach()

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Processes that form one gloo group on the CPU, started from a process that has imported everything."""

import os
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS_PER_GROUP = 240
MODULES = ["torch.distributed.tensor", "torch.distributed.fsdp", "modeling_peer.modeling_peer", "parallel_training"]


def run_ranks(num_ranks: int, folder: Path, function, *args) -> list:
    """What `function(*args)` returns on each of `num_ranks` processes, in order of rank.

    The first that raises ends the others, and its error is raised here.

    Args:
        folder: place for the ranks' meeting point and results.
        function: importable by name.

    Raises:
        TimeoutError: not done within `SECONDS_PER_GROUP`; all are killed.
    """
    forkserver._forkserver.set_forkserver_preload(MODULES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    context = mp.start_processes(
        _rank, (num_ranks, folder, function, args), num_ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS_PER_GROUP
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{num_ranks} ranks did not finish in {SECONDS_PER_GROUP} s")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank, num_ranks, folder, function, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    # a file, not a port: two tests cannot collide on it
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=num_ranks)
    try:
        torch.save(function(*args), folder / f"result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()

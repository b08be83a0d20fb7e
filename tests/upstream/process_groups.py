# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Stands in for `tests/distributed_testing_utils.py`: processes that form one gloo group on the CPU."""

import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A test takes some twenty seconds on two cores. When one rank fails, the others may wait for it forever.
SECONDS_PER_TEST = 300


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    """Nothing to choose: every rank computes on the CPU."""


def _start_rank_processes(function, args, nprocs):
    """Call `function(rank, *args)` in `nprocs` new processes; the first that raises ends the others.

    Raises:
        TimeoutError: the ranks did not finish in `SECONDS_PER_TEST`; they are killed.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores; more threads each only slow them down
    try:
        ranks = mp.spawn(function, args=args, nprocs=nprocs, join=False)
        deadline = time.monotonic() + SECONDS_PER_TEST
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{nprocs} ranks did not finish in {SECONDS_PER_TEST} s: one may have failed")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _join_group(rank, function, args, world_size, rendezvous):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # a file, not a port: two test processes cannot collide on it
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """Return a decorator: the function then runs as `function(rank, *args)` on every rank of a new group."""

    def decorate(function):
        def on_every_rank(*args):
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = (Path(folder) / "rendezvous").as_uri()
                _start_rank_processes(_join_group, (function, args, world_size, rendezvous), world_size)

        return on_every_rank

    return decorate

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How CPU kernels share work: on the threads that PyTorch has, each running Numba's code without the GIL.

Threads of our own beside PyTorch's would fight for the cores: OpenMP's spin for milliseconds after every operation
(retrieval of 2,048 tokens on two cores: 74 ms on a pool of our own, 60 ms on PyTorch's).
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(kernel: Callable, num_items: int, items_per_chunk: int, *args, chunks_per_thread: int = 4) -> None:
    """Call `kernel(*args, chunk, num_chunks)` for every chunk of `num_items` items of work.

    Args:
        items_per_chunk: least number of items for which another thread is worth waking, about 0.1 ms of work.
        chunks_per_thread: at most; several, so that a thread that was held up leaves the rest to the others.
    """
    num_threads = torch.get_num_threads()
    num_chunks = max(1, min(num_threads * chunks_per_thread, num_items // items_per_chunk))
    if num_threads == 1 or num_chunks == 1:
        kernel(*args, 0, 1)
    else:
        _side_by_side()(lambda chunk: kernel(*args, chunk, num_chunks), num_chunks, num_threads)


_forked = False


@cache
def _side_by_side() -> Callable[[Callable[[int], None], int, int], None]:
    """What calls `work(chunk)` for every chunk, on several threads, and returns when all are done."""
    # The GNU OpenMP that PyTorch loads on Linux; `#pragma omp parallel` compiles to this call.
    gomp_parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if torch.backends.openmp.is_available() else None
    if gomp_parallel is None or _forked:
        return _on_a_pool

    def on_openmp(work, num_chunks, num_threads):
        chunks, errors = iter(range(num_chunks)), []

        def take_chunks(_):
            try:
                for chunk in chunks:
                    work(chunk)
            except BaseException as error:  # an exception can't pass through OpenMP
                errors.append(error)

        gomp_parallel(_Work(take_chunks), None, ctypes.c_uint(min(num_threads, num_chunks)), ctypes.c_uint(0))
        if errors:
            raise errors[0]

    return on_openmp


def _forget_openmp() -> None:
    global _forked
    _forked = True
    _side_by_side.cache_clear()


# OpenMP's threads do not survive a fork: a child that waits for them waits for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_openmp)


def _on_a_pool(work: Callable[[int], None], num_chunks: int, num_threads: int) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_chunks)))

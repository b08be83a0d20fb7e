# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How CPU kernels share work between threads.

They run on PyTorch's threads if it uses GNU OpenMP, as on Linux. These do not need the GIL. Elsewhere, and after a
fork, they run on a Python thread pool (`run`) or on one thread (`in_parallel`).

Our own threads beside PyTorch's would compete for the cores, because OpenMP's spin for milliseconds after every
operation. Retrieval of 2,048 tokens on two cores takes 74 ms on our own pool and 60 ms on PyTorch's. Threads that get
their work through Python wait for the GIL. An empty kernel then takes 55 to 110 us, and 3 to 6 without the GIL (two
Zen 3 cores).
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import FunctionType

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import compiled

# `#pragma omp parallel` compiles to this function of GNU OpenMP, which PyTorch loads on Linux: every thread runs a
# function.
_HAS_OPENMP = os.name == "posix" and torch.backends.openmp.is_available()
_OPENMP = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if _HAS_OPENMP else None
# Compiled code references it, even where it never calls it.
_ADDRESS = 1 if _OPENMP is None else ctypes.cast(_OPENMP, ctypes.c_void_p).value
llvm.add_symbol("modeling_peer_start_threads", _ADDRESS)
BYTES_PER_THREAD = 2**16  # about 5 us from a core's own cache
_INT32, _INT64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def run(kernel: Callable, num_items: int, items_per_chunk: int, *args, chunks_per_thread: int = 4) -> None:
    """Call `kernel(*args, chunk, num_chunks)`, compiled by Numba, for every chunk of `num_items` items of work.

    Args:
        items_per_chunk: least number of items for which waking another thread is worthwhile, about 0.01 ms of work.
        chunks_per_thread: at most this many. With several, other threads take over the work of a delayed one.
    """
    num_threads = torch.get_num_threads()
    num_chunks = max(1, min(num_threads * chunks_per_thread, num_items // items_per_chunk))
    if num_threads == 1 or num_chunks == 1:
        kernel(*args, 0, 1)
    elif _OPENMP is None or _forked:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda chunk: kernel(*args, chunk, num_chunks), range(num_chunks)))
    else:
        _launcher(kernel)(num_chunks, min(num_threads, num_chunks), *args)


def num_threads_for(num_bytes: int) -> int:
    """Number of threads worth waking for kernels that read `num_bytes` and share work by `in_parallel`."""
    if _OPENMP is None or _forked:
        return 1
    return max(1, min(torch.get_num_threads(), num_bytes // BYTES_PER_THREAD))


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not survive a fork: a child process that waits for them hangs.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@cache
def _launcher(kernel: Callable) -> Callable:
    """`_launch` for one kernel, as if it were defined beside it.

    Numba caches compiled functions on disk by file and name, but none that takes another function as an argument.
    """
    code = _launch.__code__.replace(co_filename=kernel.py_func.__code__.co_filename)
    known = {"__name__": kernel.py_func.__module__, "_kernel": kernel, "in_parallel": in_parallel}
    launch = FunctionType(code, known)
    launch.__qualname__ = f"launch{kernel.py_func.__qualname__}"
    return compiled(launch)


def _launch(num_chunks, num_threads, *args):
    in_parallel(_kernel, args, num_chunks, num_threads)  # noqa: F821


@intrinsic
def in_parallel(typing_context, kernel, args, num_chunks, num_threads):
    """Call `kernel(*args, chunk, num_chunks)` for every chunk, and return when all are done.

    Each of `num_threads` threads takes one chunk after the other. More than one needs OpenMP (`num_threads_for`).

    Raises:
        RuntimeError: the kernel failed for some chunk; the others were computed. It is raised with one thread too: a
            kernel's own exception survives only if `run` calls it from Python.
    """
    kernel_signature = kernel.get_call_type(typing_context, (*args.types, types.int64, types.int64), {})

    def generate(context, builder, signature, values):
        compilation = kernel.dispatcher.overloads[kernel_signature.args]
        context.active_code_library.add_linking_library(compilation.library)
        # Shared by the threads: arguments, number of chunks, the next chunk, whether a kernel failed.
        parts = [values[1], values[2], _INT64(0), _INT64(0)]
        shared = cgutils.alloca_once(builder, ir.LiteralStructType([part.type for part in parts]))
        for i, part in enumerate(parts):
            builder.store(part, cgutils.gep_inbounds(builder, shared, 0, i))
        work = _define_work(context, builder.module, shared.type, compilation.fndesc)
        start_type = ir.FunctionType(ir.VoidType(), [work.type, _BYTES, _INT32, _INT32])
        start = cgutils.get_or_insert_function(builder.module, start_type, "modeling_peer_start_threads")
        num_threads, data = builder.trunc(values[3], _INT32), builder.bitcast(shared, _BYTES)
        with builder.if_else(builder.icmp_signed(">", num_threads, _INT32(1))) as (several, one):
            with several:
                builder.call(start, [work, data, num_threads, _INT32(0)])
            with one:
                builder.call(work, [data])
        failed = builder.load(cgutils.gep_inbounds(builder, shared, 0, 3))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, failed)):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a CPU kernel failed: out of memory?",))
        return context.get_dummy_value()

    return types.void(kernel, args, types.int64, types.int64), generate


def _define_work(context, module, shared_type, kernel):
    """The function of each thread: take the next chunk, until there is none."""
    function_type = ir.FunctionType(ir.VoidType(), [_BYTES])
    function = ir.Function(module, function_type, module.get_unique_name("work"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    shared = builder.bitcast(function.args[0], shared_type)
    arguments, num_chunks, next_chunk, failed = (cgutils.gep_inbounds(builder, shared, 0, i) for i in range(4))
    arguments = cgutils.unpack_tuple(builder, builder.load(arguments))
    num_chunks = builder.load(num_chunks)
    take, compute, done = (builder.append_basic_block() for _ in range(3))
    builder.branch(take)

    builder.position_at_end(take)
    chunk = builder.atomic_rmw("add", next_chunk, _INT64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", chunk, num_chunks), compute, done)

    builder.position_at_end(compute)
    status, _ = context.call_conv.call_function(
        builder,
        context.declare_function(module, kernel),
        kernel.restype,
        kernel.argtypes,
        [*arguments, chunk, num_chunks],
    )
    with cgutils.if_unlikely(builder, status.is_error):
        builder.store(_INT64(1), failed)
    builder.branch(take)

    builder.position_at_end(done)
    builder.ret_void()
    return function

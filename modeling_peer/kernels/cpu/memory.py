# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tensors as NumPy arrays on the same memory, for Numba's kernels; large ones in huge pages."""

import threading
import weakref
from functools import lru_cache

import numpy as np
import torch

from ...mapped_memory_peer import COLLAPSE, HUGE_PAGE, advise, is_mapped_file

BYTES_OF_HUGE_PAGE = 2**21
MIN_BYTES = 2**25  # glibc gives larger allocations their own pages
MOVED_AT_ONCE = 2**26  # bytes; between two such pieces a table may be freed

_moved: set[tuple[int, int]] = set()
_movers: list[threading.Thread] = []


class _Memory:
    """Memory described by NumPy's array interface.

    After `Tensor.numpy()` the tensor's storage could not be resized, but FSDP resizes the storage of parameters.
    """

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: torch.dtype, owner: torch.Tensor | None = None):
        self.owner = owner  # the array references this object, which keeps the memory
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(shape),
            "typestr": _TYPES[dtype],
            "data": (address, False),
        }
        if dtype == torch.float8_e4m3fn:
            self.__array_interface__ |= {"typestr": _FLOAT8.str, "descr": _FLOAT8.descr}


# NumPy has no bfloat16. Its bits are passed instead, for `cpu.simd.widen` and `narrow`.
_TYPES = {torch.float32: "<f4", torch.bfloat16: "<u2", torch.int64: "<i8", torch.int8: "|i1", torch.uint8: "|u1"}
# Nor has it float8. Its bits are passed in a structure, to tell them from int4's.
_FLOAT8 = np.dtype([("bits", "|u1")])
_TYPES[torch.float8_e4m3fn] = _FLOAT8


def array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as a NumPy array, bfloat16 as uint16."""
    _check_contiguous(tensor)
    if not tensor.numel():
        return np.empty(tensor.shape, _TYPES[tensor.dtype])
    return np.asarray(_Memory(_check_address(tensor.data_ptr()), tensor.shape, tensor.dtype, owner=tensor))


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor as contiguous float32; itself if it is one (`Tensor.to` takes 3 us to check that)."""
    return (tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)).contiguous()


def floats(tensor: torch.Tensor) -> np.ndarray:
    """Values of any floating-point type as float32, in the same memory if they are float32."""
    return array(as_float32(tensor.detach()))


def borrowed(tensor: torch.Tensor, *shape: int) -> np.ndarray:
    """`array` in the tensor's shape or another. The array does not keep the tensor alive: the caller must.

    Arrays are cached by address. In a decoding loop tables stay in place, and other tensors reuse a few addresses.
    This takes 0.4 instead of 1.5 us for each of a token's dozen arrays.
    """
    _check_contiguous(tensor)
    return _array_at(tensor.data_ptr(), shape or tensor.shape, tensor.dtype)


@lru_cache(maxsize=256)
def _array_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    return np.empty(shape, _TYPES[dtype]) if 0 in shape else np.asarray(_Memory(_check_address(address), shape, dtype))


# Errors, not assertions: with `python -O` a kernel would read beyond the tensor.
def _check_contiguous(tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"A tensor {tuple(tensor.shape)} of strides {tensor.stride()} is not contiguous.")


def _check_address(address: int) -> int:
    if not address:
        raise ValueError("A tensor has no memory: its storage was freed, as FSDP frees that of parameters.")
    return address


def move_to_huge_pages(table: torch.Tensor) -> None:
    """Begin to move a large `table` to huge pages, once, on another thread; about a second for 1 GiB.

    Scattered rows then need no walk through the page tables (36 against 26 ms for 256 MiB of rows). A mapped file is
    left as it is: the move would read all of it into memory of this process.
    """
    memory = (table.data_ptr(), table.nbytes)
    if table.nbytes > MIN_BYTES and memory not in _moved:
        _moved.add(memory)
        storage = table.untyped_storage()
        # Another table may get the same address later.
        weakref.finalize(storage, _moved.discard, memory).atexit = False
        if not is_mapped_file(memory[0]):
            mover = threading.Thread(target=_move, args=(weakref.ref(storage), *memory), daemon=True)
            _movers[:] = [other for other in _movers if other.is_alive()] + [mover]
            mover.start()


def _move(storage: weakref.ref, address: int, num_bytes: int) -> None:
    start = -(-address // BYTES_OF_HUGE_PAGE) * BYTES_OF_HUGE_PAGE
    end = (address + num_bytes) // BYTES_OF_HUGE_PAGE * BYTES_OF_HUGE_PAGE
    for first in range(start, end, MOVED_AT_ONCE):
        kept = storage()  # the table can't be freed while a piece of it is moved
        if kept is None:
            return
        for advice in (HUGE_PAGE, COLLAPSE):
            advise(first, min(MOVED_AT_ONCE, end - first), advice)
        del kept


def wait_for_huge_pages() -> None:
    """Wait until all tables are moved. Benchmarks measure the speed after that."""
    for mover in _movers:
        mover.join()

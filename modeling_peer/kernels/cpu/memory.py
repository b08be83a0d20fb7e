# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tensors as NumPy arrays on the same memory, for Numba's kernels; large ones in huge pages."""

import ctypes
import sys
import weakref
from functools import lru_cache

import numpy as np
import torch

HUGE_PAGE = 2**21  # bytes
MIN_BYTES = 2**25  # glibc gives larger allocations their own pages
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # <sys/mman.h>, Linux; the second since 6.1

_moved: set[tuple[int, int]] = set()


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
    """Move a large `table` to huge pages, once; that takes about a second for 1 GiB.

    Scattered rows then need no walk through the page tables (36 against 26 ms for 256 MiB of rows).
    """
    memory = (table.data_ptr(), table.nbytes)
    if table.nbytes > MIN_BYTES and memory not in _moved:
        _moved.add(memory)
        # Another table may get the same address later.
        weakref.finalize(table.untyped_storage(), _moved.discard, memory).atexit = False
        _advise(table, MADV_HUGEPAGE)
        _advise(table, MADV_COLLAPSE)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Give Linux `advice` on the huge pages within `tensor`. If Linux ignores it, only the speed changes."""
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)

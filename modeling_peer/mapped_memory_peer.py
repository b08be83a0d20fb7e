# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Memory that is a mapped file, and advice to the operating system on memory. Linux; elsewhere nothing is known."""

import ctypes
import os
import sys
from functools import cache

import torch

PAGE = 4096  # bytes
# <sys/mman.h>; POPULATE_READ since Linux 5.14, COLLAPSE since 6.1
RANDOM, WILL_NEED, HUGE_PAGE, POPULATE_READ, COLLAPSE = 1, 3, 14, 22, 25
PROCESS_MADVISE = 440  # <asm/unistd.h>, the same number for every processor
MAX_RANGES = 1024  # of one call of process_madvise: IOV_MAX
PIECE = 2**21  # bytes whose pages are looked at together: those of one page of the page table


def is_mapped_file(address: int) -> bool:
    """Whether the memory at `address` shows a file: its pages are read when they are used, and can be dropped."""
    return mapped_file(address) is not None


def mapped_file(address: int) -> str | None:
    """Path of the file that the memory at `address` shows; None if it shows none.

    A path ends in ` (deleted)` if the file was removed, or another was moved to its place.
    """
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/self/maps", "rb") as mappings:
            for line in mappings:  # start-end permissions offset device inode path
                fields = line.split(None, 5)
                start, end = (int(bound, 16) for bound in fields[0].split(b"-"))
                if start <= address < end:
                    return os.fsdecode(fields[5].rstrip(b"\n")) if fields[4] != b"0" else None
    except OSError:
        pass
    return None


def advise(address: int, num_bytes: int, advice: int) -> None:
    """Give advice on the pages from `address`, which must be the start of a page. If ignored, only speed changes."""
    if num_bytes > 0 and (madvise := _madvise()) is not None:
        madvise(address, num_bytes, advice)


def advise_all(starts: torch.Tensor, lengths: torch.Tensor, advice: int) -> None:
    """`advise` on many ranges, 1,024 of them in one call of the system where it allows that (Linux 6.13, or as root).

    Args:
        starts, lengths: `(num_ranges,)`, int64; bytes.
    """
    ranges = torch.stack([starts, lengths], dim=1).contiguous()  # struct iovec
    for first in range(0, len(ranges), MAX_RANGES):
        part = ranges[first : first + MAX_RANGES]
        if not _advise_together(part, advice):
            for start, length in part.tolist():
                advise(start, length, advice)


def _advise_together(ranges: torch.Tensor, advice: int) -> bool:
    system_call, process = _system_call(), _this_process(os.getpid())
    if system_call is None or process is None:
        return False
    return system_call(PROCESS_MADVISE, process, ranges.data_ptr(), len(ranges), advice, 0) >= 0


@cache
def _this_process(process_id: int) -> int | None:
    """A descriptor of this process. By its id: after a fork it is another one."""
    try:
        return os.pidfd_open(process_id)
    except (AttributeError, OSError):
        return None


@cache
def _system_call():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).syscall
    integer, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = (ctypes.c_long, integer, pointer, size, integer, ctypes.c_uint)
    function.restype = ctypes.c_long
    return function


def map_cached_pages(address: int, num_bytes: int) -> None:
    """Enter pages of a mapped file that are in the page cache into this process's page table, and read none.

    Otherwise the first use of each would be a page fault, even if nothing has to be read. Pieces of which a page is
    missing in the page cache are left as they are.

    Args:
        address: the start of a page.
    """
    end = address + num_bytes // PAGE * PAGE
    for first in range(address, end, PIECE):
        length = min(PIECE, end - first)
        if num_cached_pages(first, length) == length // PAGE:
            advise(first, length, POPULATE_READ)


def num_cached_pages(address: int, num_bytes: int) -> int | None:
    """How many pages of a mapped file are in the page cache; None if it cannot be known, as of memory that was freed.

    Args:
        address: the start of a page.
    """
    mincore, num_pages = _mincore(), -(-num_bytes // PAGE)
    if mincore is None:
        return None
    resident = (ctypes.c_char * num_pages)()  # a byte per page
    return None if mincore(address, num_bytes, resident) else resident.raw.count(b"\x01")


@cache
def _madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


@cache
def _mincore():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return function

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Memory that is a mapped file, and advice to the operating system on memory. Linux; elsewhere nothing is known."""

import ctypes
import os
import sys
from functools import cache

PAGE = 4096  # bytes
RANDOM, WILL_NEED, HUGE_PAGE, COLLAPSE = 1, 3, 14, 25  # <sys/mman.h>; COLLAPSE since Linux 6.1


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


@cache
def _madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Memory that is a mapped file, and advice to the operating system on memory. Linux; elsewhere nothing is known."""

import ctypes
import sys
from functools import cache

PAGE = 4096  # bytes
RANDOM, WILL_NEED, HUGE_PAGE, COLLAPSE = 1, 3, 14, 25  # <sys/mman.h>; COLLAPSE since Linux 6.1


def is_mapped_file(address: int) -> bool:
    """Whether the memory at `address` shows a file: its pages are read when they are used, and can be dropped."""
    if sys.platform != "linux":
        return False
    try:
        with open("/proc/self/maps", "rb") as mappings:
            for line in mappings:  # start-end permissions offset device inode path
                fields = line.split(None, 5)
                start, end = (int(bound, 16) for bound in fields[0].split(b"-"))
                if start <= address < end:
                    return fields[4] != b"0"
    except OSError:
        pass
    return False


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

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A disk's own random reads, and files without a page in memory. Linux."""

import mmap
import os
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from modeling_peer.mapped_memory_peer import PAGE, advise, num_cached_pages

DONT_NEED = 4  # <sys/mman.h>
SECTOR = 512  # bytes; reads past the page cache are of whole sectors


def drop_pages(files: Iterable[Path], mapped: Iterable[tuple[int, int]] = ()) -> None:
    """Remove clean pages of files from the page cache. It needs no root.

    The system keeps pages that a process has mapped, so this process first gives up those that it maps.

    Args:
        mapped: address and bytes of views of these files, which were never written to. They stay valid.
    """
    for address, num_bytes in mapped:
        first = address // PAGE * PAGE
        advise(first, address + num_bytes - first, DONT_NEED)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of files that are in the page cache."""
    found = 0
    for file in files:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            content = np.frombuffer(mapping, np.uint8)
            num_pages = num_cached_pages(content.ctypes.data, len(content))
            del content  # or the mapping could not be closed
            if num_pages is None:
                raise OSError(f"the system does not tell which pages of {file} are in the page cache.")
            found += PAGE * num_pages
    return found


def read_bytes() -> int:
    """Bytes that this process had read from disks so far (0 if the system does not count them)."""
    try:
        with open("/proc/self/io") as counts:
            return next(int(line.split()[1]) for line in counts if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return 0


def random_reads_per_second(
    files: Sequence[Path], num_bytes: int, at_once: int, num_reads: int, seed: int
) -> dict[str, float]:
    """How many random reads the disk of `files` does in a second.

    Each read is aligned to its size, and its place is drawn evenly from all files.

    Args:
        num_bytes: of a read; rounded up to whole sectors where reads go past the page cache.
        at_once: reads that are in progress at a time.

    Returns:
        by how reads are made:
        "direct": past the page cache (`O_DIRECT`), on `at_once` threads. Left out if the file system has none.
        "requested": groups of `at_once` are requested (`posix_fadvise`), then read. What was read is dropped again.
    """
    rng = random.Random(seed)
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]

        def places(step):
            drawn = rng.choices(range(len(files)), weights=sizes, k=num_reads)
            return [(i, rng.randrange(max(1, sizes[i] // step)) * step) for i in drawn]

        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        found = {}
        size = -(-num_bytes // SECTOR) * SECTOR
        with suppress(OSError):  # EINVAL, as on tmpfs
            found["direct"] = num_reads / _direct_seconds(files, places(size), size, at_once)
        drop_pages(files)
        wanted = [(descriptors[i], offset) for i, offset in places(num_bytes)]
        started = time.perf_counter()
        for first in range(0, num_reads, at_once):
            group = wanted[first : first + at_once]
            if at_once > 1:
                for descriptor, offset in group:
                    os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)
            for descriptor, offset in group:
                os.pread(descriptor, num_bytes, offset)
        found["requested"] = num_reads / (time.perf_counter() - started)
        drop_pages(files)
        return {name: round(rate, 1) for name, rate in found.items()}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _direct_seconds(files: Sequence[Path], places: list[tuple[int, int]], size: int, at_once: int) -> float:
    descriptors = []

    def read(part):
        with mmap.mmap(-1, -(-size // PAGE) * PAGE) as buffer:  # such reads need memory that is aligned
            for i, offset in part:
                os.preadv(descriptors[i], [memoryview(buffer)[:size]], offset)

    try:
        descriptors += [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(read, [[]] * at_once))  # starts the threads
            started = time.perf_counter()
            for _ in threads.map(read, [places[i::at_once] for i in range(at_once)]):
                pass
            return time.perf_counter() - started
    finally:
        for descriptor in descriptors:
            os.close(descriptor)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Measured memory: memory in use, the peak of a call, and memory still available."""

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch


def forget_peak_memory(device: torch.device) -> str | None:
    """Reset the peak of memory, or return why that is impossible."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return None
    if sys.platform != "linux":
        return f"peak resident memory is read from /proc, which {sys.platform} does not have"
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except OSError as error:
        return f"the kernel does not reset its high-water mark here: {error}"
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since `forget_peak_memory`.

    On CUDA it is the memory allocated by PyTorch. On a CPU it is the resident memory of this process, which includes
    compilers and Numba's code.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def memory_bytes(device: torch.device) -> int:
    """Memory in use now, counted as in `peak_memory_bytes`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str | None]:
    """Peak memory of `call` beyond the memory in use before it; or None, and why it cannot be measured.

    Freed pages that the process still holds are first returned to the system.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if why := forget_peak_memory(device):
        return None, why
    before = memory_bytes(device)
    call()
    return max(0, peak_memory_bytes(device) - before), None


def available_bytes(device: torch.device) -> int:
    """Memory still available on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    import psutil  # of an extra

    return psutil.virtual_memory().available

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Measurements of memory: in use, peak of a call, and available."""

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
            file.write("5")  # resets the peak, VmHWM
    except OSError as error:
        return f"this kernel does not reset the peak of resident memory: {error}"
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


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs: mapped files and the page cache do not count. Linux."""
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str | None]:
    """Peak memory of `call` beyond the memory in use before it.

    Freed pages that the process still holds are first returned to the system.

    Returns:
        bytes and None, or None and the reason why the peak cannot be measured.
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
    """Available memory of the device, in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    import psutil  # of an extra

    return psutil.virtual_memory().available

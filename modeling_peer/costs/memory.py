# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Memory as it is measured: what is held, the peak of a call, what can still be had."""

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch


def forget_peak_memory(device: torch.device) -> str | None:
    """Take the peak of memory from here on; or say why it can't be."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return None
    if sys.platform != "linux":
        return f"peak resident memory is read from /proc, which {sys.platform} does not have"
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
    except OSError as error:
        return f"the kernel does not reset its high-water mark here: {error}"
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since `forget_peak_memory`: on CUDA what PyTorch allocated, on a CPU what is resident of this
    process, which counts compilers and Numba's code, too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def memory_bytes(device: torch.device) -> int:
    """What is held now, as `peak_memory_bytes` counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str | None]:
    """Most memory that `call` holds beyond what was there before it; or None, and why that cannot be told.

    Pages that were freed but not yet returned to the system are returned first.
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
    """Memory that can still be had on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    import psutil  # of an extra

    return psutil.virtual_memory().available

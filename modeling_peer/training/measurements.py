"""What a training run cost: the time of its steps and its peak memory."""

import sys
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback


class CostOfSteps(TrainerCallback):
    """Times every optimizer step, its accumulated micro-batches included, evaluation and saving left out; and takes
    the peak of this process's memory from the first step to the last."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak_memory_bytes: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.device = args.device
        self.can_measure_peak = forget_peak_memory(self.device) is None

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = _now(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now(self.device) - self.began)

    def on_train_end(self, args, state, control, **kwargs):
        if self.can_measure_peak:
            self.peak_memory_bytes = peak_memory_bytes(self.device)

    def summary(self) -> dict[str, Any]:
        """Median seconds of a step and bytes of peak memory; None for what was not measured."""
        return {
            "seconds_per_step": round(median(self.seconds), 5) if self.seconds else None,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

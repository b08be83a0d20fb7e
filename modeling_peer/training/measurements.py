"""What a training run cost: the time of its steps and its peak memory."""

import sys
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback


class CostOfSteps(TrainerCallback):
    """Times every optimizer step, its accumulated micro-batches included, evaluation and saving left out."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self.began)

    def summary(self) -> dict[str, Any]:
        """Median seconds of a step (None if there was none) and bytes of peak memory of this process."""
        return {
            "seconds_per_step": round(median(self.seconds), 5) if self.seconds else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def peak_memory_bytes() -> int | None:
    """Most memory this process has held: on the GPU, if it used one, else resident in RAM; None where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # POSIX only
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()

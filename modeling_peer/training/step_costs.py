# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a training run cost: the time of its steps and its peak memory."""

import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from modeling_peer.costs.memory import forget_peak_memory, peak_memory_bytes


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

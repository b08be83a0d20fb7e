# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The cost of a training run: time per step and peak memory."""

import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from modeling_peer.costs.memory import forget_peak_memory, peak_memory_bytes


class CostOfSteps(TrainerCallback):
    """Measures the time of each optimizer step, and the peak memory of this process.

    A step includes its accumulated micro-batches, but no evaluation and no saving. The peak is that of the whole
    training, evaluation and saving included.
    """

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
        """Median seconds per step and peak memory in bytes. None if not measured."""
        return {
            "seconds_per_step": round(median(self.seconds), 5) if self.seconds else None,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

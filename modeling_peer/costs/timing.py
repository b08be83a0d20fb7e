# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Timing of calls. Contenders are measured in turn, on new inputs. Results are medians."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeling_peer.kernels.cpu.memory import wait_for_huge_pages

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
EVICTION_BYTES = 2**28  # larger than the cache of any GPU
MIN_REPEATS = 3
# Shorter calls are measured several in a row, because a decoding loop also has its code and weights in the cache. On
# CUDA each call has its own pair of events.
MIN_SECONDS = {"cpu": 0.02, "cuda": 0.0}
MAX_CALLS_IN_A_ROW = 64


@dataclass(frozen=True)
class Summary:
    """Summary of one contender's times, in milliseconds."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


def summarize(seconds: list[float]) -> Summary:
    """Median and quartiles, interpolated linearly between measurements."""
    quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    lower, median, upper = (1000 * quartiles).tolist()
    return Summary(median, lower, upper, len(seconds))


def interleave(
    calls: dict[str, Callable[[Any], Any]],
    new_input: Callable[[int], Any],
    clock: Callable[[Callable[[], Any]], float],
    repeats: int,
    max_seconds: float,
    min_seconds: float = 0.0,
) -> dict[str, Summary]:
    """Measure each contender once per round, so that slow phases of the machine affect all of them.

    Every call has its own input, drawn the same way for all. With another contender's input, the rows of shared tables
    would be in the cache. The first calls of each contender are not counted. Each contender may use an equal share of
    `max_seconds`. One that needs more is left out of some rounds, spread evenly. It is still measured at least
    `MIN_REPEATS` times (or `repeats`, if fewer).

    Args:
        calls: one function per contender; each takes an input.
        new_input: makes an input from its number, 0, 1, 2, ...
        clock: returns the seconds of a call.
        min_seconds: calls shorter than this are measured several in a row, and their mean counts once.
    """
    numbers = itertools.count()

    def measure(call, num_calls=1):
        inputs = [new_input(next(numbers)) for _ in range(num_calls)]
        return clock(lambda: [call(one) for one in inputs]) / num_calls

    num_calls = {}
    for name, call in calls.items():
        measure(call)  # may compile
        num_calls[name] = min(MAX_CALLS_IN_A_ROW, max(1, math.ceil(min_seconds / max(measure(call), 1e-9))))
    wait_for_huge_pages()  # which the first calls asked for
    seconds = {name: [] for name in calls}
    for round_number in range(repeats):
        for name, call in calls.items():
            if _is_due(seconds[name], round_number, repeats, max_seconds / len(calls) / num_calls[name]):
                seconds[name].append(measure(call, num_calls[name]))
    return {name: summarize(times) for name, times in seconds.items()}


def _is_due(times: list[float], round_number: int, repeats: int, share: float) -> bool:
    if not times:
        return True
    affordable = int(share / max(summarize(times).median_ms / 1000, 1e-9))
    return len(times) * repeats <= round_number * min(repeats, max(MIN_REPEATS, affordable))


class Clock:
    """Seconds of a call on a device.

    On CUDA it is the time between two events. Before, the device is idle and its cache is evicted. So the launch is
    included, and weights come from memory, as in a deep model whose other layers used the cache.

    On a CPU nothing is evicted, because that would remove the interpreter from the cache, too. New inputs ensure that
    rows come from memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.eviction = torch.ones(EVICTION_BYTES // 4, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            return self._seconds_on_cuda(call)
        # OpenMP's threads wait in a busy loop after the previous contender. They would occupy this call's core.
        time.sleep(0.002)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _seconds_on_cuda(self, call: Callable[[], Any]) -> float:
        self.eviction.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def copy_bandwidth(device: torch.device, repeats: int = 9) -> float:
    """Bytes per second of copying a buffer much larger than the caches. Bytes read and bytes written both count."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    seconds = [clock(lambda: target.copy_(source)) for _ in range(repeats + 2)][2:]
    num_bytes = 2 * source.nbytes
    if device.type == "cuda":
        del source, target
        torch.cuda.empty_cache()  # frees memory for the measuring processes
    return 1000 * num_bytes / summarize(seconds).median_ms


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of PyTorch. PEER's CPU kernels use the same number. None: no change."""
    if threads is not None:
        torch.set_num_threads(threads)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Estimates of the memory of a call, a check that contenders fit, and new processes to measure in."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from modeling_peer.benchmarks.contenders import (
    COMPILED,
    DENSE_ACTIVE,
    DENSE_WIDE,
    EAGER,
    PEER_PYTORCH,
    quantised,
    row_sparse,
)
from modeling_peer.benchmarks.settings import Case, LayerArguments
from modeling_peer.console.files import RESOURCES

# Share of the available memory. The rest is for other programs and for errors of the estimate.
USABLE = 0.85


def in_new_process(function: str, *arguments: Any) -> Any:
    """Call `package.module:function` in a new process. Arguments and result are passed as JSON.

    If the process is killed, for example because memory ran out, the result is `{"why": ...}`.

    Raises:
        RuntimeError: the function failed; its traceback is on stderr.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(RESOURCES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "modeling_peer.benchmarks.memory", function, json.dumps(arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    if process.returncode > 0:
        raise RuntimeError(f"{function} failed in its process with status {process.returncode}; see the error above.")
    if process.returncode:
        return {"why": f"its process ended with status {process.returncode}"}
    return json.loads(process.stdout.strip().splitlines()[-1])


def weight_bytes(name: str, case: Case, settings: LayerArguments) -> int:
    """Bytes of a contender's expert tables. PEER's own implementations share one pair of tables."""
    if name in (DENSE_ACTIVE, DENSE_WIDE):
        return 0
    if name == quantised(settings.device):
        return 2 * case.num_experts * (case.hidden_size + 4)  # a scale per row
    return 2 * case.num_experts * case.hidden_size * settings.torch_dtype.itemsize


def call_bytes(name: str, case: Case, settings: LayerArguments) -> tuple[int, int]:
    """Estimate the memory of a case beside the weights.

    Returns:
        bytes held between calls (optimizer state), and bytes held during a call.
    """
    if name in (DENSE_ACTIVE, DENSE_WIDE):
        return 0, 0
    itemsize = settings.torch_dtype.itemsize
    requested = case.num_tokens * settings.num_retrieval_heads * settings.num_experts_per_head
    tables = weight_bytes(name, case, settings)
    during = 0
    if name in (
        COMPILED,
        PEER_PYTORCH,
    ):  # both gather every row of both tables; the compiled formula does so in float32
        gathered = 2 * requested * case.hidden_size * (4 if name == COMPILED else itemsize)
        during += gathered * (2 if case.trains else 1)
    if case.trains and name == row_sparse(settings.device):
        during += 2 * 2 * min(requested, case.num_experts) * case.hidden_size * itemsize
    elif case.trains:
        # eager also sums in float32; an update makes temporaries, on CUDA as large as both tables
        during += tables + (tables // itemsize * 4 if name == EAGER else 0)
        during += tables if case.task == "step" else 0
    # RowSparseAdamW's two moments are float32; AdamW's have the type of the weights
    moments = 2 * tables // itemsize * (4 if name == row_sparse(settings.device) else itemsize)
    return (moments if case.task == "step" else 0), during


def fit(
    names: list[str], needs: Callable[[str], tuple[int, int]], available: int, shares: Callable[[str], Any]
) -> tuple[list[str], dict[str, str]]:
    """Choose, in order, the contenders that fit in memory together, and give reasons for the others.

    Args:
        needs: for a contender, bytes held between its calls, and bytes held during a call.
        available: available memory in bytes.
        shares: contenders for which it returns the same value share what they hold between calls.
    """
    held, largest_call = {}, 0
    fitting, reasons = [], {}
    for name in names:
        own, during = needs(name)
        total = sum((held | {shares(name): own}).values()) + max(largest_call, during)
        if total > USABLE * available:
            reasons[name] = (
                f"would need {total / 2**30:.1f} GiB with the others, of {available / 2**30:.1f} GiB available"
            )
            continue
        held[shares(name)] = own
        largest_call = max(largest_call, during)
        fitting.append(name)
    return fitting, reasons


def _main():
    function, arguments = sys.argv[1:]
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))


if __name__ == "__main__":
    _main()

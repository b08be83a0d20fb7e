# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of a call, what would not fit, and processes of their own to measure in."""

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

# of what is free; the rest is for other programs and for what the estimate does not know
USABLE = 0.85


def in_new_process(function: str, *arguments: Any) -> Any:
    """Call `package.module:function` in a fresh process: arguments and result travel as JSON.

    A process that is killed, for want of memory for example, gives `{"why": ...}`.

    Raises:
        RuntimeError: it failed, and has said why on stderr.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(RESOURCES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "modeling_peer.benchmarks.memory", function, json.dumps(arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    if process.returncode > 0:
        raise RuntimeError(f"{function} failed in its process, status {process.returncode}; its error stands above.")
    if process.returncode:
        return {"why": f"its process ended with status {process.returncode}"}
    return json.loads(process.stdout.strip().splitlines()[-1])


def weight_bytes(name: str, case: Case, settings: LayerArguments) -> int:
    """Of a contender's expert tables; PEER's own implementations share those of the first."""
    if name in (DENSE_ACTIVE, DENSE_WIDE):
        return 0
    if name == quantised(settings.device):
        return 2 * case.num_experts * (case.hidden_size + 4)  # a scale per row
    return 2 * case.num_experts * case.hidden_size * settings.torch_dtype.itemsize


def call_bytes(name: str, case: Case, settings: LayerArguments) -> tuple[int, int]:
    """Estimate what a case needs beside the weights: bytes held between calls (optimizer state), and during one."""
    if name in (DENSE_ACTIVE, DENSE_WIDE):
        return 0, 0
    itemsize = settings.torch_dtype.itemsize
    requested = case.num_tokens * settings.num_retrieval_heads * settings.num_experts_per_head
    tables = weight_bytes(name, case, settings)
    during = 0
    if name in (COMPILED, PEER_PYTORCH):  # gather every row of both tables, the compiled formula in float32
        gathered = 2 * requested * case.hidden_size * (4 if name == COMPILED else itemsize)
        during += gathered * (2 if case.trains else 1)
    if case.trains and name == row_sparse(settings.device):
        during += 2 * 2 * min(requested, case.num_experts) * case.hidden_size * itemsize
    elif case.trains:
        # eager sums in float32 first; an update makes temporaries, on CUDA as large as all tables together
        during += tables + (tables // itemsize * 4 if name == EAGER else 0)
        during += tables if case.task == "step" else 0
    # RowSparseAdamW's two moments are float32, AdamW's are of the weights' type
    moments = 2 * tables // itemsize * (4 if name == row_sparse(settings.device) else itemsize)
    return (moments if case.task == "step" else 0), during


def fit(
    names: list[str], needs: Callable[[str], tuple[int, int]], available: int, shares: Callable[[str], Any]
) -> tuple[list[str], dict[str, str]]:
    """Choose, in order, the contenders that fit in memory together, and say why the others do not.

    Args:
        needs: bytes held between the calls of a contender, and during one.
        available: bytes.
        shares: contenders with the same value hold one thing together.
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

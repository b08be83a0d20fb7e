# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Fast implementations of retrieval and expert mixture: tensors in, tensors out; nothing here knows the model.

operators.py             the operators of PyTorch, their backward, and the public functions
checks.py                whether an operator's arguments fit, so that nothing is read beyond memory
dispatch.py              whether operators, hooks or gradients have to be seen
lazy_gradients.py        row-sparse gradients of tables, multiplied out row by row in an optimizer's step
gradient_takers.py       which optimizers are refused row-sparse gradients
optimizer_arguments.py   what an update of some rows may be given
one_call.py              when a token or a few, without gradients, go through a layer in one call
cpu/                     compiled by Numba: experts, retrieval, optimizer, a layer in one call (few_tokens)
triton/                  compiled by Triton: experts, retrieval
cpu/probe.py, triton/probe.py   whether that works here
"""

import os
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

# Implementation of each type of device, and the dtypes of tables and sub-keys it reads.
IMPLEMENTATION_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_CAPABILITY = (8, 0)  # products of bfloat16, and of float32 in tf32, on tensor cores
_COMPILERS = {"cpu": "numba", "triton": "triton"}
_failures: dict[str, str] = {}  # of compilers that did not work for some kernel: why
after_failure: list[Callable[[], None]] = []  # called then: whoever remembers which implementation works, forgets


def obstacle(implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `implementation` ("cpu" or "triton") can't use tables of `dtype` on such a device; `None` if it can.

    Triton's interpreter (`TRITON_INTERPRET=1`), which runs GPU kernels slowly for tests, counts as a GPU.
    """
    compiler = _COMPILERS[implementation]
    if not _is_installed(compiler):
        return f"needs {compiler}, which is not installed (pip install {compiler})"
    interpreted = implementation == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if IMPLEMENTATION_OF_DEVICE.get(device_type) != implementation and not interpreted:
        return f"needs {'CPU' if implementation == 'cpu' else 'CUDA'} tensors; got {device_type}"
    if implementation == "triton" and not interpreted and (capability := _capability()) < OLDEST_CAPABILITY:
        return f"needs a GPU of compute capability {_dotted(OLDEST_CAPABILITY)} or newer; got {_dotted(capability)}"
    if dtype not in _DTYPES[implementation]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[implementation])
        return f"needs tables of {names}; got {str(dtype).removeprefix('torch.')}"
    return None


def defect(implementation: str) -> str | None:
    """Why `implementation` can't run although its compiler is installed; `None` if it can.

    Its modules are imported and a tiny kernel is run, once: Numba refuses some versions of NumPy, Triton wants a C
    compiler, and so on.
    """
    if implementation not in _failures:
        return _find_defect(implementation)
    return _failures[implementation]


@cache
def _find_defect(implementation: str) -> str | None:
    try:
        import_module(f"{__package__}.{implementation}.probe").probe()
    except Exception as error:
        return _describe(implementation, error)
    return None


def give_up_after(error: Exception, implementation: str) -> str | None:
    """If the compiler of `implementation` raised `error`, the cause, which `defect` then names from now on; `None` if
    anything else did, a kernel that it compiled too."""
    compilers = ("numba", "llvmlite") if implementation == "cpu" else ("triton.compiler", "triton.backends")
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if f"{frame.f_globals.get('__name__')}.".startswith(tuple(f"{name}." for name in compilers)):
            cause = _failures.setdefault(implementation, _describe(implementation, error))
            for forget in after_failure:
                forget()
            return cause
    return None


def _describe(implementation: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    cause = type(error).__name__ + (f": {lines[0]}" if lines else "")
    return f"needs {_COMPILERS[implementation]}, which is installed but does not work here ({cause})"


def _capability() -> tuple[int, int]:
    """Of the current GPU; where nobody can tell, as where models are only traced, the oldest that will do."""
    if not torch.cuda.is_available() or torch.version.hip:
        return OLDEST_CAPABILITY
    return torch.cuda.get_device_capability()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # it was put into sys.modules by hand; `defect` says whether it works
        return True

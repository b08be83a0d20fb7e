# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Fast implementations of retrieval and expert mixture: tensors in, tensors out, independent of the model.

operators.py             the operators of PyTorch, their backward, and the public functions
checks.py                checks of an operator's arguments, so that kernels read only valid memory
dispatch.py              whether a call needs PyTorch's dispatch
lazy_gradients.py        row-sparse gradients of tables, computed row by row in an optimizer's step
dense_optimizer_check.py an error if an optimizer does not support row-sparse gradients
optimizer_arguments.py   checks of the arguments of a row update
row_formats.py           dtypes of quantised tables
one_call.py              when one or a few tokens, without gradients, run through a layer in one call
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

from ..row_formats_peer import is_quantised

# The implementation for each device type, and the dtypes of tables and sub-keys it reads. Tables may be quantised too.
IMPLEMENTATION_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_CAPABILITY = (8, 0)  # tensor cores for bfloat16, and for float32 as tf32
_COMPILERS = {"cpu": "numba", "triton": "triton"}
_failures: dict[str, str] = {}  # the cause for each compiler that failed on a kernel
on_compiler_failure: list[Callable[[], None]] = []  # to clear caches of working implementations


def obstacle(implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `implementation` ("cpu" or "triton") cannot use tables of `dtype` on such a device; `None` if it can.

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
    if dtype not in _DTYPES[implementation] and not is_quantised(dtype):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[implementation])
        return f"needs tables of {names}; got {str(dtype).removeprefix('torch.')}"
    return None


def defect(implementation: str) -> str | None:
    """Why `implementation` cannot run although its compiler is installed; `None` if it can.

    Its modules are imported and a tiny kernel is run, once. For example, Numba rejects some versions of NumPy, and
    Triton needs a C compiler.
    """
    if implementation not in _failures:
        return _find_defect(implementation)
    return _failures[implementation]


@cache
def _find_defect(implementation: str) -> str | None:
    try:
        import_module(f"{__package__}.{implementation}.probe").probe()
    except Exception as error:  # any kind, from the compiler or from what it needs
        return _describe(implementation, error)
    return None


def record_compiler_failure(error: Exception, implementation: str) -> str | None:
    """Record that the compiler of `implementation` raised `error`, and return the cause. `defect` then returns it too.

    `None` if anything else raised the error, including a compiled kernel.
    """
    compilers = ("numba", "llvmlite") if implementation == "cpu" else ("triton.compiler", "triton.backends")
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if f"{frame.f_globals.get('__name__')}.".startswith(tuple(f"{name}." for name in compilers)):
            cause = _failures.setdefault(implementation, _describe(implementation, error))
            for clear_cache in on_compiler_failure:
                clear_cache()
            return cause
    return None


def _describe(implementation: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    cause = type(error).__name__ + (f": {lines[0]}" if lines else "")
    return f"needs {_COMPILERS[implementation]}, which is installed but does not work here ({cause})"


def _capability() -> tuple[int, int]:
    """Compute capability of the current GPU. If unknown, as when models are only traced, the oldest supported one."""
    if not torch.cuda.is_available() or torch.version.hip:
        return OLDEST_CAPABILITY
    return torch.cuda.get_device_capability()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # inserted into sys.modules without a spec; `defect` checks whether it works
        return True

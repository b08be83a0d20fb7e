# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Check that GPU kernels can be compiled and run here: Triton, and the C compiler and driver that it needs."""

import os

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import retrieval  # noqa: F401 (its import is a part of the question)
from .experts import read_experts

WIDTH = 16


def probe() -> None:
    """Compile and run a tiny kernel, if a GPU is free for it; Triton's interpreter compiles nothing.

    Raises:
        Exception: of any kind, from the part that fails.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        return
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        ones = torch.ones(1, WIDTH, device="cuda")
        product = read_experts(ones, torch.zeros(1, 1, dtype=torch.int64, device="cuda"), ones)
        if product.item() != WIDTH:
            raise ArithmeticError(f"a sum of {WIDTH} ones came out as {product.item()}")

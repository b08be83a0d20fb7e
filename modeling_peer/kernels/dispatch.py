# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Whether a call needs PyTorch's dispatcher, or the operator's function can be called directly."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def needs_dispatch(args: tuple) -> bool:
    """Whether the PyTorch operator has to be called.

    Gradients need it, and so does code that traces, counts or wraps operators and tensors. So does a tensor whose
    values are not those in its memory.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return True
    needs_gradient = torch.is_grad_enabled()
    return any(
        type(arg) not in (torch.Tensor, nn.Parameter)
        or (needs_gradient and arg.requires_grad)
        or arg.is_meta
        or not torch._C._has_storage(arg)  # in a batched backward
        or arg.is_neg()
        or arg._is_zerotensor()
        for arg in args
        if isinstance(arg, torch.Tensor)
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are those in its memory, as with no subclass that computes them (quantized).

    A fake tensor, which replaces a plain one while PyTorch infers shapes, is plain too.
    """
    return type(tensor) in (nn.Parameter, torch.Tensor, FakeTensor)


def are_ordinary(*tensors: torch.Tensor | None) -> bool:
    """Whether parameters and buffers are ordinary, so that a call may use their memory.

    It takes a tenth of the time of `needs_dispatch`, which is for computed tensors.
    """
    needs_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, torch.Tensor)
            or (needs_gradient and tensor.requires_grad)
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            return False
    return True

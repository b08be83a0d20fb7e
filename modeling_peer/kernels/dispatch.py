# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Whether an operator has to be called through PyTorch, or its function can be called directly."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def needs_dispatch(args: tuple) -> bool:
    """Whether the operator of PyTorch has to be called: for a gradient, for what traces, counts, or wraps operators
    and tensors, or since a tensor is not what lies in its memory."""
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
        or not torch._C._has_storage(arg)  # of a batched backward
        or arg.is_neg()
        or arg._is_zerotensor()
        for arg in args
        if isinstance(arg, torch.Tensor)
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what lies in its memory, or stands for such a one while PyTorch works out shapes: no
    subclass that computes its values, as a quantized one."""
    return type(tensor) in (nn.Parameter, torch.Tensor, FakeTensor)


def are_ordinary(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing is special about parameters and buffers, so that a call may take their memory: in a tenth of the
    time of `needs_dispatch`, which is asked about what is computed."""
    needs_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, torch.Tensor)
            or (needs_gradient and tensor.requires_grad)
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            return False
    return True

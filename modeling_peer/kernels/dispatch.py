# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Whether somebody looks: where nobody can tell, several calls become one, and an operator a plain function."""

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook


def somebody_looks(args: tuple) -> bool:
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
    time of `somebody_looks`, which is asked about what is computed."""
    needs_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, torch.Tensor)
            or (needs_gradient and tensor.requires_grad)
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            return False
    return True


_CALL = nn.Module.__call__
_forwards: dict[type, Callable] = {}


def remember_forwards(*classes: type[nn.Module]) -> None:
    """Note what the `forward` of these classes is, so that `is_unobserved` notices when another one is put into its
    place later. One that was replaced before is not noted: its modules count as observed."""
    for cls in classes:
        forward = cls.forward
        if forward.__module__ in {base.__module__ for base in cls.__mro__} and not hasattr(forward, "__wrapped__"):
            _forwards[cls] = forward


def is_unobserved(module: nn.Module) -> bool:
    """Whether calling `module` does what its class was written to do, and nothing else: no hook, no `forward` of its
    own, none that replaced its class's, and the class is one that `remember_forwards` was given."""
    cls, own = type(module), vars(module)
    return (
        cls.forward is _forwards.get(cls, own)
        and cls.__call__ is _CALL
        and "forward" not in own
        and "_compiled_call_impl" not in own
        and not (module._forward_hooks or module._forward_pre_hooks or has_any_global_hook())
    )

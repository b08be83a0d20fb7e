# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checks of the operators' arguments before a kernel reads memory.

Compiled, exported and loaded graphs call the operators without the public functions, which check for users. Sizes,
dtypes and devices are checked here, in constant time. Ids and `order` are values. Kernels for CPU check them while
they read them anyway (`cpu.experts`). Kernels for GPU never read a row that does not exist (`triton.experts`); an
error there would make the host wait. In Triton's interpreter ids are checked here.
"""

from functools import cache

import torch

from ..row_formats_peer import is_quantised, row_width
from . import IMPLEMENTATION_OF_DEVICE, obstacle

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATION_OF_DEVICE.values():
        known = ", ".join(sorted(IMPLEMENTATION_OF_DEVICE.values()))
        raise ValueError(f'implementation="{implementation}" does not exist; use one of {known}.')


@cache
def _obstacle(implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    check_name(implementation)
    return obstacle(implementation, device_type, dtype)


def _check_place(implementation, dtype, **tensors):
    """Check that all tensors are on one device where `implementation` supports tables of `dtype`."""
    device = next(iter(tensors.values())).device
    cause = _obstacle(implementation, device.type, dtype)
    if cause is not None:
        raise ValueError(f'implementation="{implementation}" {cause}.')
    for name, tensor in tensors.items():
        if tensor.device != device or tensor.layout is not torch.strided:
            raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}; it must be strided on {device}.")


def _check_floats(**tensors):
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point dtype.")


def _check_ids(name, ids, num_dims=None):
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {ids.dtype}; it must be torch.int64. Use {name}.long().")
    if num_dims is not None and ids.dim() != num_dims:
        raise ValueError(f"{name} {tuple(ids.shape)} must have {num_dims} dimensions.")


def _check_shapes(fits: bool, what: str, **tensors):
    if not fits:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes} do not fit together: {what}.")


def check_retrieval(query: torch.Tensor, sub_keys: torch.Tensor, implementation: str) -> None:
    """Check the arguments of retrieval.

    Args:
        query: `(num_tokens, num_heads, query_dim)`, float32.
        sub_keys: `(2, num_sub_keys, query_dim // 2)`, or one such pair for each head.
    """
    _check_floats(query=query, sub_keys=sub_keys)
    _check_place(implementation, sub_keys.dtype, query=query, sub_keys=sub_keys)
    if query.dtype != torch.float32:
        raise ValueError(f"query has dtype {query.dtype}; it must be torch.float32. Use query.float().")
    *codebooks, num_sub_keys, half = sub_keys.shape if sub_keys.dim() > 1 else (0, 0)
    fits = query.dim() == 3 and codebooks in ([2], [query.shape[1], 2]) and query.shape[2] == 2 * half
    what = "(tokens, heads, 2 * half), and (2, sub-keys, half) or (heads, 2, sub-keys, half)"
    _check_shapes(fits, what, query=query, sub_keys=sub_keys)
    _check_shapes(
        query.shape[1] and num_sub_keys and half,
        "each size must be at least 1",
        query=query,
        sub_keys=sub_keys,
    )
    if num_sub_keys**2 > 2**31:
        raise ValueError(
            f"{num_sub_keys} sub-keys make {num_sub_keys**2} experts; an id has 31 bits. Use at most 46,340."
        )


def check_top_k(top_k: int, sub_keys: torch.Tensor) -> None:
    num_sub_keys = sub_keys.shape[-2]
    if top_k > num_sub_keys:
        raise ValueError(f"top_k ({top_k}) exceeds the {num_sub_keys} sub-keys of a codebook.")
    if top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be 1 or more.")


def check_retrieved(
    grad_scores: torch.Tensor,
    expert_ids: torch.Tensor,
    query: torch.Tensor,
    sub_keys: torch.Tensor,
    implementation: str,
) -> None:
    """Check `grad_scores` and `expert_ids`, `(num_tokens, num_heads, top_k)`; the others as in `check_retrieval`."""
    check_retrieval(query, sub_keys, implementation)
    _check_place(implementation, sub_keys.dtype, query=query, grad_scores=grad_scores, expert_ids=expert_ids)
    _check_floats(grad_scores=grad_scores)
    _check_ids("expert_ids", expert_ids, 3)
    fits = grad_scores.shape == expert_ids.shape and expert_ids.shape[:2] == query.shape[:2]
    _check_shapes(
        fits, "one row of each for a token and head", grad_scores=grad_scores, expert_ids=expert_ids, query=query
    )
    if implementation == "triton" and expert_ids.is_cpu:
        check_ids_exist(expert_ids, sub_keys.shape[-2] ** 2)


def check_assigned(expert_ids: torch.Tensor, implementation: str) -> None:
    """Check `expert_ids` of any shape."""
    _check_place(implementation, torch.float32, expert_ids=expert_ids)
    _check_ids("expert_ids", expert_ids)
    if implementation == "triton" and expert_ids.is_cpu:
        check_ids_exist(expert_ids, 2**31)


def check_assignments(
    expert_ids: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    implementation: str,
    *,
    tokens: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> None:
    """Check the arguments of operators that read, write or differentiate rows.

    Args:
        expert_ids, weights: `(num_tokens, num_active)`.
        tokens: `(num_tokens, width)`.
        table: `(num_experts, width)`, of `dtype`; quantised ones have no gradient.
        order: order of all assignments, if a gradient of the table is computed.
    """
    values = {"tokens": tokens, "weights": weights, "table": table}
    values = {name: tensor for name, tensor in values.items() if tensor is not None}
    others = values if order is None else {**values, "order": order}
    _check_place(implementation, dtype, expert_ids=expert_ids, **others)
    quantised = is_quantised(dtype)
    _check_floats(**{name: tensor for name, tensor in values.items() if not (quantised and name == "table")})
    if quantised and order is not None:
        raise ValueError(f"A table of {dtype} is quantised: it has no gradient. Differentiate for the others only.")
    _check_ids("expert_ids", expert_ids, 2)
    if num_experts < 0:
        raise ValueError(f"num_experts ({num_experts}) must be 0 or more.")
    fits = weights is None or weights.shape == expert_ids.shape
    if tokens is not None:
        fits = fits and tokens.dim() == 2 and tokens.shape[0] == expert_ids.shape[0]
    if table is not None:
        fits = fits and table.dim() == 2 and (tokens is None or tokens.shape[1] == row_width(table))
    what = "expert_ids, weights and tokens have one row per token, and tokens and table one width"
    _check_shapes(fits, what, expert_ids=expert_ids, **values)
    if order is not None:
        _check_ids("order", order, 1)
        _check_shapes(order.shape[0] == expert_ids.numel(), "a place for each id", expert_ids=expert_ids, order=order)
    if implementation == "triton" and expert_ids.is_cpu:
        check_ids_exist(expert_ids, num_experts)
        if order is not None and not torch.equal(order, expert_ids.flatten().argsort(stable=True)):
            raise_unsorted(order)


def check_scales(num_experts: int, device: torch.device, **tables: tuple[torch.Tensor | None, torch.Tensor | None]):
    """Check that each quantised table has scales `(num_experts,)` in float32, and no other table has.

    Args:
        tables: a table and its scales, or None.
    """
    for name, (table, scale) in tables.items():
        if (scale is not None) != (table is not None and is_quantised(table.dtype)):
            kind = "no table" if table is None else f"a table of {table.dtype}"
            raise ValueError(
                f"{name}: {kind} {'with' if scale is not None else 'without'} scales. Quantised tables have one scale "
                "for each row, and others have none."
            )
        if scale is not None and (scale.shape != (num_experts,) or scale.dtype != torch.float32):
            raise ValueError(
                f"{name}: the scales are {tuple(scale.shape)} of {scale.dtype}; {num_experts} rows need "
                f"({num_experts},) of torch.float32."
            )
        if scale is not None and scale.device != device:
            raise ValueError(f"{name}: the scales are on {scale.device}; they must be on {device}.")


def check_ids_exist(expert_ids: torch.Tensor, num_experts: int) -> None:
    """Raise IndexError if an id does not exist. On a GPU the host waits for the check."""
    if not expert_ids.numel():
        return
    lowest, highest = torch.stack(expert_ids.aminmax()).tolist()
    if lowest < 0 or highest >= num_experts:
        raise IndexError(f"expert_ids are from {lowest} to {highest}, but the table has {num_experts} experts.")


def raise_unsorted(order: torch.Tensor) -> None:
    raise ValueError(
        f"order does not sort the {order.numel()} assignments by expert. It must be group_by_expert(expert_ids)."
    )

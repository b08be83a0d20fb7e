# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Row-sparse gradients of expert tables, stored as the outer products they sum. On CPU so far (`cpu.experts`).

A token adds a multiple of itself to the gradients of its hundred experts: one row of memory instead of a hundred.
An optimizer that supports these gradients computes one row at a time, just before it updates that row.
"""

from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only


@cache
def _kernels():
    return import_module(f"{__package__}.cpu.experts")  # needs a compiler that may not be installed


class OuterProducts(NamedTuple):
    """A sparse matrix of weights times a matrix of tokens. Empty rows of the sparse matrix are left out.

    grad[rows[i]] = Σ_j weights[j] · tokens[token_ids[j]]        starts[i] <= j < starts[i + 1]
    """

    rows: torch.Tensor  # (u,) int64, ascending
    starts: torch.Tensor  # (u + 1,) int64
    weights: torch.Tensor  # (m,) float32
    token_ids: torch.Tensor  # (m,) int64
    tokens: torch.Tensor  # (t, d) float32

    @classmethod
    def group(
        cls,
        expert_ids: torch.Tensor,
        order: torch.Tensor,
        weights: torch.Tensor,
        tokens: torch.Tensor,
        num_experts: int,
    ) -> "OuterProducts":
        """Group assignments by expert. The inputs are copied: a layer's caller may overwrite them before the step.

        Raises as `cpu.experts.segments` does if `order` is wrong or an expert does not exist.

        Args:
            expert_ids, weights: assignments, (t, a).
            order: positions of the assignments sorted by expert, (t * a,).
        """
        rows, starts = _kernels().segments(expert_ids, order, num_experts)
        token_ids = order // max(1, expert_ids.shape[1])
        tokens = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device).copy_(tokens)
        return cls(rows, starts, weights.flatten()[order].float(), token_ids, tokens)

    @classmethod
    def join(cls, parts: list["OuterProducts"]) -> "OuterProducts":
        """The sum of `parts`."""
        if len(parts) == 1:
            return parts[0]
        expert_ids = torch.cat([part.rows.repeat_interleave(part.starts.diff()) for part in parts])
        first_tokens = accumulate((len(part.tokens) for part in parts), initial=0)
        token_ids = torch.cat([part.token_ids + first for part, first in zip(parts, first_tokens, strict=False)])
        order = _kernels().group_by_expert(expert_ids)
        weights, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("weights", "tokens"))
        num_experts = 1 + int(max((part.rows.max() for part in parts if len(part.rows)), default=-1))
        return cls(*_kernels().segments(expert_ids, order, num_experts), weights[order], token_ids[order], tokens)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the gradients of `rows`: `(u, d)`."""
        return _kernels().multiply_out(self, dtype)

    def norm(self) -> torch.Tensor:
        """Euclidean norm of all values, without storing them: a float32 scalar."""
        return _kernels().squared_norms(self).sum(dtype=torch.float64).sqrt().float()


class LazyRowGradient(torch.Tensor):
    """A row-sparse gradient that computes its rows only when they are read.

    Scaling, the norm, and addition of another such gradient (while the sum is smaller than the table) need no rows.
    Any other operation permanently turns it into a wrapper of the coalesced sparse COO tensor that it represents.
    In-place changes of that tensor's values then change the gradient. So it works wherever row-sparse gradients work,
    and a hook may return a result of one. Autograd alone sees a strided tensor without memory, because it would read
    the parts of a sparse one.

    Args:
        content: shared by tensors that share memory, as with `detach()`.
    """

    is_sparse = True
    layout = torch.sparse_coo
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content: "_Content"):
        return cls._make_wrapper_subclass(cls, content.shape, dtype=content.dtype)

    def __init__(self, content: "_Content"):
        self._content = content

    @classmethod
    def of(cls, parts: list[OuterProducts], table: torch.Tensor) -> "LazyRowGradient":
        """The gradient of `table` (num_experts, d), in its dtype: the sum of `parts`."""
        return cls(_Content(parts, table.shape, table.dtype))

    @staticmethod
    def saves_memory(expert_ids: torch.Tensor, table: torch.Tensor) -> bool:
        """Whether such a gradient of assignments (t, a) takes less memory than a dense one of `table`."""
        # Size of `OuterProducts` if no expert repeats: rows, starts and token ids in int64, the rest float32.
        num_bytes = (3 * 8 + 4) * expert_ids.numel() + 4 * expert_ids.shape[0] * table.shape[1]
        return num_bytes <= table.nbytes

    @property
    def data(self) -> "LazyRowGradient":
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor):
        self._content.replace(value._content if isinstance(value, LazyRowGradient) else _Content.of(value))

    def products(self) -> OuterProducts | None:
        """The outer products it sums; None once its rows were computed."""
        return self._content.join()

    def __reduce_ex__(self, protocol):
        return self._content.multiply_out().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"LazyRowGradient(shape={tuple(self.shape)}, dtype={self.dtype}, {self._content.describe()})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        lazy = _LAZY_OPERATIONS.get(func)
        result = NotImplemented if lazy is None else lazy(*args, **kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map_only(cls, lambda tensor: tensor._content.multiply_out(), (args, kwargs))
        return tree_map_only(torch.Tensor, _wrap, func(*args, **kwargs))


def row_sparse_gradient(rows: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The gradient of `table` (num_experts, d) with `values` (u, d) in `rows` (u,), ascending, and zeros elsewhere.

    On CPU it is wrapped in a `LazyRowGradient`, which has a norm, so that gradient clipping works without support for
    sparse tensors. A gradient that is differentiated again is a sparse COO tensor.
    """
    gradient = torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, table.shape, device=values.device, is_coalesced=True, check_invariants=False
    )
    return LazyRowGradient(_Content.of(gradient)) if values.is_cpu and not values.requires_grad else gradient


def _wrap(result: torch.Tensor) -> torch.Tensor:
    """Wrap a row-sparse result too: autograd accepts nothing else from a hook of a wrapped gradient."""
    is_row_sparse = result.is_sparse and result.dim() == 2 and result.sparse_dim() == 1
    return LazyRowGradient(_Content.of(result)) if is_row_sparse and type(result) is torch.Tensor else result


def _as_coo_tensor(name: str):
    # These methods check the layout before dispatch.
    def method(self, *args, **kwargs):
        result = getattr(self._content.multiply_out(), name)(*args, **kwargs)
        return _wrap(result) if isinstance(result, torch.Tensor) else result

    method.__name__ = name
    return method


for _name in (
    *("coalesce", "is_coalesced", "sparse_dim", "dense_dim", "to_dense", "to_sparse", "indices", "values"),
    "new",  # used by torch.optim.SparseAdam
):
    setattr(LazyRowGradient, _name, _as_coo_tensor(_name))


class _Content:
    """Sums of outer products or, once their rows were computed, a sparse tensor."""

    def __init__(self, parts: list[OuterProducts] | None, shape: torch.Size, dtype: torch.dtype, rows=None):
        self.parts, self.shape, self.dtype, self.rows = parts, shape, dtype, rows

    @classmethod
    def of(cls, rows: torch.Tensor) -> "_Content":
        if not rows.is_sparse:
            raise TypeError(f"A row-sparse gradient can't become a {rows.layout} tensor of {tuple(rows.shape)}.")
        return cls(None, rows.shape, rows.dtype, rows)

    def replace(self, other: "_Content") -> None:
        if (other.shape, other.dtype) != (self.shape, self.dtype):
            raise TypeError(
                f"A gradient {tuple(self.shape)} of {self.dtype} can't become {tuple(other.shape)} of {other.dtype}."
            )
        self.parts, self.rows = other.parts and [*other.parts], other.rows

    def join(self) -> OuterProducts | None:
        if self.parts is None:
            return None
        self.parts = [OuterProducts.join(self.parts)]
        return self.parts[0]

    def multiply_out(self) -> torch.Tensor:
        products = self.join()
        if products is not None:
            self.rows = torch.sparse_coo_tensor(
                products.rows.unsqueeze(0),
                products.values(self.dtype),
                self.shape,
                device=products.tokens.device,
                is_coalesced=True,
                check_invariants=False,
            )
            self.parts = None
        return self.rows

    def clone(self) -> "_Content":
        # The parts' tensors are never modified, only replaced.
        if self.parts is None:
            return _Content(None, self.shape, self.dtype, self.rows.clone())
        return _Content([*self.parts], self.shape, self.dtype)

    def describe(self) -> str:
        if self.parts is None:
            return f"{self.rows._nnz()} rows"
        return f"{sum(len(part.weights) for part in self.parts)} assignments, not multiplied out"


def _detach(gradient):
    return LazyRowGradient(gradient._content)


def _clone(gradient, memory_format=None):
    return LazyRowGradient(gradient._content.clone())


def _new_empty(gradient, size, stride, **_):
    # Autograd copies a gradient that is referenced elsewhere with this operation, followed by `copy_`.
    if tuple(size) != tuple(gradient.shape):
        return NotImplemented
    device = gradient.device
    rows, values = (
        torch.empty(1, 0, dtype=torch.int64, device=device),
        torch.empty(0, size[1], dtype=gradient.dtype, device=device),
    )
    return LazyRowGradient(
        _Content.of(torch.sparse_coo_tensor(rows, values, size, device=device, check_invariants=False))
    )


def _copy_(gradient, other, non_blocking=False):
    if type(gradient) is not type(other) or gradient.dtype != other.dtype:
        return NotImplemented
    gradient._content.replace(other._content.clone())
    return gradient


def _add_(gradient, other, alpha=1):
    if _is_dense(other) and other.shape == gradient.shape:
        gradient._content.multiply_out().add_(other.to_sparse(1), alpha=alpha)
        return gradient
    if not _all_lazy(gradient, other) or alpha != 1:
        return NotImplemented
    parts = gradient._content.parts + other._content.parts
    if sum(part.nbytes for part in parts) > gradient.numel() * gradient.itemsize:
        return NotImplemented
    gradient._content.parts[:] = parts
    return gradient


def _add(gradient, other, alpha=1):
    if _is_dense(other) and not _is_dense(gradient):
        return alpha * other + gradient._content.multiply_out()  # PyTorch adds sparse to dense, not the reverse
    return _add_(_clone(gradient), other) if _all_lazy(gradient, other) and alpha == 1 else NotImplemented


def _mul_(gradient, factor):
    is_tensor = isinstance(factor, torch.Tensor)
    is_real_number = not (factor.dim() or factor.is_complex()) if is_tensor else isinstance(factor, (int, float))
    if not _all_lazy(gradient) or not is_real_number:
        return NotImplemented
    parts = gradient._content.parts
    parts[:] = [part._replace(weights=part.weights * factor) for part in parts]
    return gradient


def _foreach_mul_(gradients, factor):
    for gradient in gradients:
        gradient.mul_(factor)


def _norm(gradient, order=2, dim=None, keepdim=False, dtype=None):
    if dim is not None or keepdim or order < 0:
        return NotImplemented
    if _all_lazy(gradient) and order == 2:
        norm = gradient.products().norm()
    else:  # missing rows are zeros, which do not change such a norm; PyTorch has no norm of sparse tensors
        norm = torch.linalg.vector_norm(gradient._content.multiply_out().coalesce()._values(), order)
    return norm.to(gradient.dtype if dtype is None else dtype)


def _foreach_norm(gradients, order=2, dtype=None):
    return [torch.linalg.vector_norm(gradient, order, dtype=dtype) for gradient in gradients]


def _is_dense(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided


def _all_lazy(*gradients) -> bool:
    """Whether none has computed its rows yet, and all belong to tables of one shape and dtype."""
    if not all(type(one) is LazyRowGradient and one._content.parts is not None for one in gradients):
        return False
    return len({(one.shape, one.dtype) for one in gradients}) == 1


_LAZY_OPERATIONS = {
    torch.ops.aten.detach.default: _detach,
    torch.ops.aten.clone.default: _clone,
    torch.ops.aten.new_empty_strided.default: _new_empty,
    torch.ops.aten.copy_.default: _copy_,
    torch.ops.aten.add_.Tensor: _add_,
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.mul_.Tensor: _mul_,
    torch.ops.aten._foreach_mul_.Tensor: _foreach_mul_,
    torch.ops.aten.linalg_vector_norm.default: _norm,
    torch.ops.aten._foreach_norm.Scalar: _foreach_norm,
}

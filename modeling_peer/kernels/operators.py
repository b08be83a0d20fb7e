# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Retrieval and expert mixture as operators of PyTorch: seen by `torch.compile`, `torch.export` and checkpointing.

    modeling_peer::product_key_top_k       scores and ids of the best product keys
    modeling_peer::read_experts            pre[t, a] = tokens[t] · table[id]
    modeling_peer::write_experts           out[t]    = Σ_a weights[t, a] · table[id]

What happens between reading and writing, activation and gates, is one number per retrieved expert and stays plain
PyTorch: any activation works, a trained one too. A backward is made of operators again, so it can be compiled. The
last argument of each names the implementation: a pair of modules of this folder, `<name>_retrieval` and
`<name>_experts`, with the same functions, imported when they first run.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F

from .lazy_gradients import LazyRowGradient, OuterProducts
from .observers import somebody_looks

_library = torch.library.Library("modeling_peer", "DEF")


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: define the operator whose implementation the function is, for every device. What takes its name calls
    the operator where somebody looks, and else the function itself, which saves about 0.02 ms."""

    def define(function):
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"modeling_peer::{name}", fake, lib=_library)
        operator = getattr(torch.ops.modeling_peer, name).default

        def call(*args):
            return operator(*args) if somebody_looks(args) else function(*args)

        return call

    return define


@cache
def _retrieval(implementation: str):
    return import_module(f"{__package__}.{implementation}_retrieval")


@cache
def _experts(implementation: str):
    return import_module(f"{__package__}.{implementation}_experts")


@_operator(
    "product_key_top_k(Tensor query, Tensor sub_keys, int top_k, str implementation) -> (Tensor, Tensor)",
    lambda query, sub_keys, top_k, implementation: (
        query.new_empty(*query.shape[:2], top_k),
        query.new_empty(*query.shape[:2], top_k, dtype=torch.int64),
    ),
)
def _top_k(query, sub_keys, top_k, implementation):
    return _retrieval(implementation).product_key_top_k(query.contiguous(), sub_keys.contiguous(), top_k)


@_operator(
    "product_key_top_k_backward(Tensor grad_scores, Tensor expert_ids, Tensor query, Tensor sub_keys,"
    " str implementation) -> (Tensor, Tensor)",
    lambda grad_scores, expert_ids, query, sub_keys, implementation: (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        sub_keys.new_empty(sub_keys.shape, dtype=torch.float32),
    ),
)
def _top_k_backward(grad_scores, expert_ids, query, sub_keys, implementation):
    return _retrieval(implementation).product_key_top_k_backward(
        grad_scores.contiguous(), expert_ids.contiguous(), query.contiguous(), sub_keys.contiguous()
    )


@_operator(
    "group_by_expert(Tensor expert_ids, str implementation) -> Tensor",
    lambda expert_ids, implementation: expert_ids.new_empty(expert_ids.numel()),
)
def _group(expert_ids, implementation):
    return _experts(implementation).group_by_expert(expert_ids.contiguous())


@_operator(
    "read_experts(Tensor tokens, Tensor expert_ids, Tensor table, Tensor? order, bool row_sparse, str implementation)"
    " -> Tensor",
    lambda tokens, expert_ids, *_: tokens.new_empty(expert_ids.shape, dtype=torch.float32),
)
def _read(tokens, expert_ids, table, order, row_sparse, implementation):
    return _experts(implementation).read_experts(tokens.contiguous(), expert_ids.contiguous(), table.contiguous())


@_operator(
    "write_experts(Tensor weights, Tensor expert_ids, Tensor table, Tensor? order, bool row_sparse,"
    " str implementation) -> Tensor",
    lambda weights, expert_ids, table, *_: weights.new_empty(expert_ids.shape[0], table.shape[1], dtype=torch.float32),
)
def _write(weights, expert_ids, table, order, row_sparse, implementation):
    return _experts(implementation).write_experts(weights.contiguous(), expert_ids.contiguous(), table.contiguous())


def _fake_gradient(like, num_experts, width, dtype, row_sparse):
    num_rows = torch.library.get_ctx().new_dynamic_size() if row_sparse else 0
    rows = like.new_empty(num_rows, dtype=torch.int64)
    return rows, like.new_empty(num_rows if row_sparse else num_experts, width, dtype=dtype)


@_operator(
    "row_gradients(Tensor weights, Tensor tokens, Tensor expert_ids, Tensor order, SymInt num_experts,"
    " ScalarType dtype, bool row_sparse, str implementation) -> (Tensor, Tensor)",
    lambda weights, tokens, expert_ids, order, num_experts, dtype, row_sparse, implementation: _fake_gradient(
        tokens, num_experts, tokens.shape[1], dtype, row_sparse
    ),
)
def _row_gradients(weights, tokens, expert_ids, order, num_experts, dtype, row_sparse, implementation):
    return _experts(implementation).row_gradients(
        weights.contiguous(), tokens.contiguous(), expert_ids.contiguous(), order, num_experts, dtype, row_sparse
    )


@_operator(
    "write_experts_gradients(Tensor grad_outputs, Tensor weights, Tensor expert_ids, Tensor order, Tensor table,"
    " bool row_sparse, str implementation) -> (Tensor, Tensor, Tensor)",
    lambda grad_outputs, weights, expert_ids, order, table, row_sparse, implementation: (
        weights.new_empty(weights.shape, dtype=torch.float32),
        *_fake_gradient(grad_outputs, *table.shape, table.dtype, row_sparse),
    ),
)
def _write_gradients(grad_outputs, weights, expert_ids, order, table, row_sparse, implementation):
    return _experts(implementation).write_experts_gradients(
        grad_outputs.contiguous(),
        weights.contiguous(),
        expert_ids.contiguous(),
        order,
        table.contiguous(),
        row_sparse,
    )


def _save_top_k(ctx, inputs, output):
    query, sub_keys, _, ctx.implementation = inputs
    _, expert_ids = output
    ctx.save_for_backward(expert_ids, query, sub_keys)


def _top_k_autograd(ctx, grad_scores, _):
    expert_ids, query, sub_keys = ctx.saved_tensors
    grad_query, grad_sub_keys = _top_k_backward(grad_scores, expert_ids, query, sub_keys, ctx.implementation)
    return grad_query, grad_sub_keys.to(sub_keys.dtype), None, None


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.row_sparse, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _read_autograd(ctx, grad_products):
    tokens, expert_ids, table, order = ctx.saved_tensors
    grad_tokens = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_tokens = _write(grad_products, expert_ids, table, None, False, ctx.implementation).to(tokens.dtype)
    if ctx.needs_input_grad[2]:
        order = _group(expert_ids, ctx.implementation) if order is None else order
        if _may_be_lazy(ctx, expert_ids, table, grad_products, tokens):
            grad_table = LazyRowGradient.of([OuterProducts.group(expert_ids, order, grad_products, tokens)], table)
        else:
            assignments = (grad_products, tokens, expert_ids, order)
            rows, values = _row_gradients(
                *assignments, table.shape[0], table.dtype, ctx.row_sparse, ctx.implementation
            )
            grad_table = _table_gradient(rows, values, table, ctx.row_sparse)
    return grad_tokens, None, grad_table, None, None, None


def _write_autograd(ctx, grad_outputs):
    weights, expert_ids, table, order = ctx.saved_tensors
    grad_weights = grad_table = None
    if ctx.needs_input_grad[2]:
        order = _group(expert_ids, ctx.implementation) if order is None else order
        if _may_be_lazy(ctx, expert_ids, table, grad_outputs, weights):
            products = OuterProducts.group(expert_ids, order, weights, grad_outputs)
            grad_table = LazyRowGradient.of([products], table)
            read = _experts(ctx.implementation).read_experts_in_order
            grad_weights = read(products, order, table.contiguous()).view(weights.shape)
        else:
            grad_weights, rows, values = _write_gradients(
                grad_outputs, weights, expert_ids, order, table, ctx.row_sparse, ctx.implementation
            )
            grad_table = _table_gradient(rows, values, table, ctx.row_sparse)
    elif ctx.needs_input_grad[0]:
        grad_weights = _read(grad_outputs, expert_ids, table, None, False, ctx.implementation)
    if grad_weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return grad_weights, None, grad_table, None, None, None


def _may_be_lazy(ctx, expert_ids, table, *tensors):
    if not ctx.row_sparse or ctx.implementation != "cpu" or somebody_looks((expert_ids, table, *tensors)):
        return False
    return LazyRowGradient.pays(expert_ids, table)


def _table_gradient(rows, values, table, row_sparse):
    if not row_sparse:
        return values
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, table.shape, device=values.device, is_coalesced=True, check_invariants=False
    )


for _name, _autograd, _save in (
    ("product_key_top_k", _top_k_autograd, _save_top_k),
    ("read_experts", _read_autograd, _save_inputs),
    ("write_experts", _write_autograd, _save_inputs),
):
    torch.library.register_autograd(f"modeling_peer::{_name}", _autograd, setup_context=_save, lib=_library)


def adamw_rows_(*args, implementation: str, **kwargs) -> None:
    """`training.row_sparse_adamw.adamw_rows_`, the same arguments and effect. No operator: nothing traces it."""
    import_module(f"{__package__}.{implementation}_optimizer").adamw_rows_(*args, **kwargs)


def product_key_top_k(
    query: torch.Tensor, sub_keys: torch.Tensor, top_k: int, *, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`product_keys_peer.product_key_top_k`, the same arguments and results, computed by `implementation`."""
    num_sub_keys, half = sub_keys.shape[-2:]
    if query.shape[-1] != 2 * half:
        raise ValueError(f"query has {query.shape[-1]} features, sub_keys two halves of {half}: they must agree.")
    if sub_keys.dim() == 4 and sub_keys.shape[0] != query.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, sub_keys {sub_keys.shape[0]}: they must agree.")
    if top_k > num_sub_keys:
        raise ValueError(f"top_k ({top_k}) exceeds the {num_sub_keys} sub-keys of a codebook.")
    return _top_k(query.to(torch.float32), sub_keys, top_k, implementation)


def expert_mixture(
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    down_embed: torch.Tensor | None,
    up_embed: torch.Tensor,
    gate_embed: torch.Tensor | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
    row_sparse_gradients: bool = False,
    *,
    implementation: str,
) -> torch.Tensor:
    """`experts_peer.expert_mixture`, the same arguments and results, computed by `implementation`."""
    tables = [table for table in (down_embed, up_embed, gate_embed) if table is not None]
    for table in tables:
        if table.shape != up_embed.shape or table.shape[1] != hidden_states.shape[1]:
            shapes = ", ".join(str(tuple(table.shape)) for table in tables)
            raise ValueError(f"hidden_states {tuple(hidden_states.shape)} and tables {shapes} do not fit together.")
    # `shape[0]`, not `len`: that would fix the number of tokens of a graph.
    if hidden_states.shape[0] != expert_ids.shape[0] or expert_ids.shape != gates.shape:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)}, expert_ids {tuple(expert_ids.shape)} and gates "
            f"{tuple(gates.shape)} must have one row per token, the latter two the same shape."
        )
    # Sorted once, for the backward of every table.
    order = None
    if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
        order = _group(expert_ids, implementation)
    weights = gates.to(torch.float32)
    if down_embed is not None:
        neurons = _read(hidden_states, expert_ids, down_embed, order, row_sparse_gradients, implementation)
        if gate_embed is None:
            neurons = activation(neurons)
        else:
            gate = _read(hidden_states, expert_ids, gate_embed, order, row_sparse_gradients, implementation)
            neurons = activation(gate) * neurons
        weights = weights * neurons
    output = _write(weights, expert_ids, up_embed, order, row_sparse_gradients, implementation)
    return output.to(hidden_states.dtype)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Retrieval and expert mixture as PyTorch operators, visible to `torch.compile`, `torch.export` and checkpointing.

    modeling_peer::product_key_top_k       scores and ids of the best product keys
    modeling_peer::read_experts            pre[t, a] = tokens[t] · table[id]
    modeling_peer::write_experts           out[t]    = Σ_a weights[t, a] · table[id]

Rows of quantised tables (`row_formats_peer`) count as their numbers, without scales. `expert_mixture` multiplies what
was read, and the weights of what is written, by the scales of the rows.

The steps between reading and writing, activation and gates, are one number per retrieved expert and stay plain
PyTorch. So any activation works, also a trained one. A backward consists of operators again, so it can be compiled.
The last argument of each operator names the implementation: a folder here, with the modules
`retrieval` and `experts`. They have the same functions in each, and are imported when they first run.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..row_formats_peer import row_width, scaled
from . import flops, record_compiler_failure
from .checks import (
    check_assigned,
    check_assignments,
    check_name,
    check_retrieval,
    check_retrieved,
    check_scales,
    check_top_k,
)
from .dispatch import needs_dispatch
from .lazy_gradients import LazyRowGradient, OuterProducts, row_sparse_gradient
from .sub_key_ids import sub_key_ids_of

# The functions of each operator, by name and part: "run" it, "fake" its results and, if it has gradients, "save" the
# tensors for its "backward".
_PARTS: dict[str, dict[str, Callable]] = {}


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: define an operator with the function as its implementation, for every device.

    The result calls the operator if the call needs dispatch, and otherwise the function, which saves about 0.02 ms.
    """

    def define(function):
        name = schema.partition("(")[0]
        _PARTS[name] = {"run": function, "fake": fake}
        _define_once(name, schema)
        operator = getattr(torch.ops.modeling_peer, name).default

        def call(*args):
            return operator(*args) if needs_dispatch(args) else function(*args)

        return call

    return define


def _define_once(name: str, schema: str) -> None:
    """Define an operator in PyTorch, which allows that once per process.

    Notebooks and test runners may import this module again. So the functions that PyTorch keeps look up the module
    that was imported last (`_part`), and stay valid for every caller that holds them.
    """
    namespace = torch.ops.modeling_peer
    state = vars(namespace).get("modeling_peer_definitions")
    if state is None:
        state = torch.library.Library("modeling_peer", "DEF"), {}
        namespace.modeling_peer_definitions = state
    library, schemas = state
    if schemas.setdefault(name, schema) != schema:
        raise RuntimeError(
            f"modeling_peer::{name} was defined by another version of modeling_peer in this process. Restart Python."
        )
    if not torch._C._dispatch_has_kernel(f"modeling_peer::{name}"):
        library.define(schema)
        library.impl(name, _part(name, "run"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"modeling_peer::{name}", _part(name, "fake"), lib=library)
        if name in _DIFFERENTIABLE:
            torch.library.register_autograd(
                f"modeling_peer::{name}", _backward_of(name), setup_context=_part(name, "save"), lib=library
            )
        if hasattr(flops, name):
            register_flop_formula(getattr(torch.ops.modeling_peer, name))(_part(name, "flops"))


def _part(name: str, part: str) -> Callable:
    module_name = __name__  # not the module, which would then live as long as the process

    def call(*args, **kwargs):
        module = import_module(module_name)
        function = getattr(module.flops, name) if part == "flops" else module._PARTS[name][part]
        return function(*args, **kwargs)

    return call


def _backward_of(name: str) -> Callable:
    """The backward of an operator, with an error that names the compiler if it fails.

    The forward has already run then, so eager cannot replace it.
    """
    backward = _part(name, "backward")

    def call(ctx, *gradients):
        try:
            return backward(ctx, *gradients)
        except Exception as error:  # compilers raise many kinds; other errors are raised again
            cause = record_compiler_failure(error, ctx.implementation)
            if cause is None:
                raise
            raise RuntimeError(
                f'The backward of experts_implementation="{ctx.implementation}" {cause}. The next forward runs '
                '"eager" if experts_implementation is unset. If you set it, use "eager", or leave it unset.'
            ) from error

    return call


_DIFFERENTIABLE = (
    "product_key_top_k",
    "product_key_top_k_backward",
    "read_experts",
    "write_experts",
    "row_gradients",
    "write_experts_gradients",
)


@cache
def _retrieval(implementation: str):
    check_name(implementation)
    return import_module(f"{__package__}.{implementation}.retrieval")


@cache
def _experts(implementation: str):
    check_name(implementation)
    return import_module(f"{__package__}.{implementation}.experts")


@_operator(
    "product_key_top_k(Tensor query, Tensor sub_keys, int top_k, str implementation) -> (Tensor, Tensor)",
    lambda query, sub_keys, top_k, implementation: (
        query.new_empty(*query.shape[:2], top_k),
        query.new_empty(*query.shape[:2], top_k, dtype=torch.int64),
    ),
)
def _top_k(query, sub_keys, top_k, implementation):
    check_retrieval(query, sub_keys, implementation)
    check_top_k(top_k, sub_keys)
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
    check_retrieved(grad_scores, expert_ids, query, sub_keys, implementation)
    return _retrieval(implementation).product_key_top_k_backward(
        _float32(grad_scores), expert_ids.contiguous(), query.contiguous(), sub_keys.contiguous()
    )


@_operator(
    "group_by_expert(Tensor expert_ids, str implementation) -> Tensor",
    lambda expert_ids, implementation: expert_ids.new_empty(expert_ids.numel()),
)
def _group(expert_ids, implementation):
    check_assigned(expert_ids, implementation)
    return _experts(implementation).group_by_expert(expert_ids.contiguous())


@_operator(
    "read_experts(Tensor tokens, Tensor expert_ids, Tensor table, Tensor? order, bool row_sparse, str implementation)"
    " -> Tensor",
    lambda tokens, expert_ids, *_: tokens.new_empty(expert_ids.shape, dtype=torch.float32),
)
def _read(tokens, expert_ids, table, order, row_sparse, implementation):
    check_assignments(expert_ids, *_of(table), implementation, tokens=tokens, table=table)
    return _experts(implementation).read_experts(tokens.contiguous(), expert_ids.contiguous(), table.contiguous())


@_operator(
    "write_experts(Tensor weights, Tensor expert_ids, Tensor table, Tensor? order, bool row_sparse,"
    " str implementation) -> Tensor",
    lambda weights, expert_ids, table, *_: weights.new_empty(
        expert_ids.shape[0], row_width(table), dtype=torch.float32
    ),
)
def _write(weights, expert_ids, table, order, row_sparse, implementation):
    check_assignments(expert_ids, *_of(table), implementation, weights=weights, table=table)
    return _experts(implementation).write_experts(_float32(weights), expert_ids.contiguous(), table.contiguous())


def _of(table):
    return table.shape[0] if table.dim() else 0, table.dtype


def _float32(values):
    return values.to(torch.float32).contiguous()


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
    check_assignments(expert_ids, num_experts, dtype, implementation, weights=weights, tokens=tokens, order=order)
    assignments = (_float32(weights), tokens.contiguous(), expert_ids.contiguous(), order.contiguous())
    return _experts(implementation).row_gradients(*assignments, num_experts, dtype, row_sparse)


@_operator(
    "write_experts_gradients(Tensor grad_outputs, Tensor weights, Tensor expert_ids, Tensor order, Tensor table,"
    " bool row_sparse, str implementation) -> (Tensor, Tensor, Tensor)",
    lambda grad_outputs, weights, expert_ids, order, table, row_sparse, implementation: (
        weights.new_empty(weights.shape, dtype=torch.float32),
        *_fake_gradient(grad_outputs, *table.shape, table.dtype, row_sparse),
    ),
)
def _write_gradients(grad_outputs, weights, expert_ids, order, table, row_sparse, implementation):
    check_assignments(
        expert_ids,
        *_of(table),
        implementation,
        tokens=grad_outputs,
        weights=weights,
        table=table,
        order=order,
    )
    return _experts(implementation).write_experts_gradients(
        grad_outputs.contiguous(),
        _float32(weights),
        expert_ids.contiguous(),
        order.contiguous(),
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
            products = OuterProducts.group(expert_ids, order, grad_products, tokens, table.shape[0])
            grad_table = LazyRowGradient.of([products], table)
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
            products = OuterProducts.group(expert_ids, order, weights, grad_outputs, table.shape[0])
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
    if not ctx.row_sparse or ctx.implementation != "cpu" or needs_dispatch((expert_ids, table, *tensors)):
        return False
    return LazyRowGradient.saves_memory(expert_ids, table)


def _table_gradient(rows, values, table, row_sparse):
    return row_sparse_gradient(rows, values, table) if row_sparse else values


# A gradient of a gradient: the result of a backward is linear in each of its arguments. So its gradient consists of
# the same operators, for any number of differentiations.


def _save_top_k_backward(ctx, inputs, output):
    *tensors, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _top_k_backward_autograd(ctx, of_query, of_sub_keys):
    """Backward of the backward. Its gradients `of_query` and `of_sub_keys` replace query and sub-keys in turn."""
    grad_scores, expert_ids, query, sub_keys = ctx.saved_tensors
    grad_query, _ = _top_k_backward(grad_scores, expert_ids, query, of_sub_keys, ctx.implementation)
    _, grad_sub_keys = _top_k_backward(
        grad_scores, expert_ids, of_query.to(torch.float32), sub_keys, ctx.implementation
    )
    half, ids = sub_keys.shape[-1], sub_key_ids_of(expert_ids, sub_keys)
    scores = sum(
        _read(queries.reshape(-1, half), ids, keys.reshape(-1, half), None, False, ctx.implementation)
        for queries, keys in ((of_query, sub_keys), (query, of_sub_keys))
    )
    scores = scores.view(*expert_ids.shape[:2], 2, -1).sum(2)
    return scores.to(grad_scores.dtype), None, grad_query, grad_sub_keys.to(sub_keys.dtype), None


def _save_row_gradients(ctx, inputs, output):
    weights, tokens, expert_ids, _, _, _, ctx.row_sparse, ctx.implementation = inputs
    ctx.save_for_backward(weights, tokens, expert_ids, output[0])


def _save_write_gradients(ctx, inputs, output):
    *tensors, ctx.row_sparse, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, output[1])


def _places(ctx, expert_ids, rows):
    """Positions of experts among the rows of a gradient."""
    return torch.searchsorted(rows, expert_ids) if ctx.row_sparse else expert_ids


def _row_gradients_autograd(ctx, _, of_values):
    weights, tokens, expert_ids, rows = ctx.saved_tensors
    places = _places(ctx, expert_ids, rows)
    grad_weights = _read(tokens, places, of_values, None, False, ctx.implementation)
    grad_tokens = _write(weights, places, of_values, None, False, ctx.implementation)
    return grad_weights.to(weights.dtype), grad_tokens.to(tokens.dtype), *[None] * 6


def _write_gradients_autograd(ctx, of_weights, _, of_values):
    grad_outputs, weights, expert_ids, order, table, rows = ctx.saved_tensors
    places = _places(ctx, expert_ids, rows)
    tail = (None, False, ctx.implementation)
    grad_grad_outputs = _write(of_weights, expert_ids, table, *tail) + _write(weights, places, of_values, *tail)
    grad_weights = _read(grad_outputs, places, of_values, *tail)
    _, grad_table = _row_gradients(
        of_weights, grad_outputs, expert_ids, order, table.shape[0], table.dtype, False, ctx.implementation
    )
    return (
        grad_grad_outputs.to(grad_outputs.dtype),
        grad_weights.to(weights.dtype),
        None,
        None,
        grad_table,
        None,
        None,
    )


for _name, _backward, _save in (
    ("product_key_top_k", _top_k_autograd, _save_top_k),
    ("product_key_top_k_backward", _top_k_backward_autograd, _save_top_k_backward),
    ("read_experts", _read_autograd, _save_inputs),
    ("write_experts", _write_autograd, _save_inputs),
    ("row_gradients", _row_gradients_autograd, _save_row_gradients),
    ("write_experts_gradients", _write_gradients_autograd, _save_write_gradients),
):
    _PARTS[_name].update(backward=_backward, save=_save)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is active. They need formulas in plain PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _refuse_transforms(implementation: str) -> None:
    if is_transformed():
        raise NotImplementedError(
            f'experts_implementation="{implementation}" does not support torch.func or forward-mode '
            'differentiation. Use "eager".'
        )


def adamw_rows_(*args, implementation: str, **kwargs) -> None:
    """`optim.row_sparse_adamw.adamw_rows_`, with the same arguments and effect. Not an operator: nothing traces it."""
    import_module(f"{__package__}.{implementation}.optimizer").adamw_rows_(*args, **kwargs)


def product_key_top_k(
    query: torch.Tensor, sub_keys: torch.Tensor, top_k: int, *, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`product_keys_peer.product_key_top_k` computed by `implementation`, with the same arguments and results."""
    _refuse_transforms(implementation)
    half = sub_keys.shape[-1]
    if query.shape[-1] != 2 * half:
        raise ValueError(
            f"query has {query.shape[-1]} features; sub_keys have two halves of {half}, so it needs {2 * half}."
        )
    if sub_keys.dim() == 4 and sub_keys.shape[0] != query.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, sub_keys {sub_keys.shape[0]}: the numbers must be equal.")
    check_top_k(top_k, sub_keys)
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
    down_scale: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    gate_scale: torch.Tensor | None = None,
    *,
    implementation: str,
) -> torch.Tensor:
    """`experts_peer.expert_mixture` computed by `implementation`, with the same arguments and results."""
    _refuse_transforms(implementation)
    tables = [table for table in (down_embed, up_embed, gate_embed) if table is not None]
    for table in tables:
        if table.shape != up_embed.shape or row_width(table) != hidden_states.shape[1]:
            shapes = ", ".join(str(tuple(table.shape)) for table in tables)
            raise ValueError(
                f"hidden_states {tuple(hidden_states.shape)} and tables {shapes} must have one width, and all tables "
                "one shape."
            )
    # `shape[0]`, because `len` would fix the number of tokens of a graph.
    if hidden_states.shape[0] != expert_ids.shape[0] or expert_ids.shape != gates.shape:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)}, expert_ids {tuple(expert_ids.shape)} and gates "
            f"{tuple(gates.shape)} must have one row per token, and the last two must have the same shape."
        )
    check_scales(
        up_embed.shape[0],
        up_embed.device,
        down_embed=(down_embed, down_scale),
        up_embed=(up_embed, up_scale),
        gate_embed=(gate_embed, gate_scale),
    )
    expert_ids = expert_ids.to(torch.int64)
    # Sorted once, for the backward of every table. `torch.jit.trace` would keep it for calls that do not need it.
    order = None
    if torch.is_grad_enabled() and not torch.jit.is_tracing() and any(table.requires_grad for table in tables):
        order = _group(expert_ids, implementation)
    weights = gates.to(torch.float32)
    if down_embed is not None:
        neurons = _read(hidden_states, expert_ids, down_embed, order, row_sparse_gradients, implementation)
        neurons = scaled(neurons, down_scale, expert_ids)
        if gate_embed is None:
            neurons = activation(neurons)
        else:
            gate = _read(hidden_states, expert_ids, gate_embed, order, row_sparse_gradients, implementation)
            neurons = activation(scaled(gate, gate_scale, expert_ids)) * neurons
        weights = weights * neurons
    weights = scaled(weights, up_scale, expert_ids)
    output = _write(weights, expert_ids, up_embed, order, row_sparse_gradients, implementation)
    return output.to(hidden_states.dtype)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Row-sparse gradients that are not multiplied out: the same numbers in less memory, sparse tensors for strangers."""

import copy
import pickle

import pytest
import torch
from kernel_helpers import assert_close_in_scale, assert_sums_close
from torch import nn

from modeling_peer import PeerForCausalLM
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS
from modeling_peer.experts_peer import expert_mixture
from modeling_peer.kernels.lazy_gradients import LazyRowGradient
from modeling_peer.training import RowSparseAdamW, clip_gradients

pytest.importorskip("numba")
NUM_EXPERTS, WIDTH, NUM_ACTIVE = 5000, 24, 6


@pytest.fixture
def table():
    return nn.Parameter(0.1 * torch.randn(NUM_EXPERTS, WIDTH))


@pytest.fixture
def other():
    return 0.1 * torch.randn(NUM_EXPERTS, WIDTH)


def batch(num_tokens=20, num_experts=NUM_EXPERTS):
    """Tokens, expert ids of few experts, so that some repeat, and gates."""
    expert_ids = torch.randint(num_experts // 10, (num_tokens, NUM_ACTIVE)) * 10
    return torch.randn(num_tokens, WIDTH), expert_ids, torch.rand(num_tokens, NUM_ACTIVE)


def mix(table, other, tokens, expert_ids, gates, mixture="cpu"):
    """A loss with two gradients of `table`, one as a reader and one as a writer, as where layers share tables."""
    function = expert_mixture if mixture == "eager" else EXPERT_MIXTURE_FUNCTIONS[mixture]
    output = function(tokens, expert_ids, gates, table, other, row_sparse_gradients=True)
    output = output + function(tokens, expert_ids, gates, other, table, row_sparse_gradients=True)
    return output.square().sum()


def backward(*inputs, **options):
    mix(*inputs, **options).backward()


@pytest.fixture
def lazy(table, other):
    """A table with a lazy gradient of three backwards, and the same table with that of the eager formula."""
    twin = nn.Parameter(table.detach().clone())
    for num_tokens in (20, 1, 7):
        inputs = batch(num_tokens)
        backward(table, other, *inputs)
        backward(twin, other, *inputs, mixture="eager")
    assert table.grad.products() is not None
    return table, twin


def assert_same(gradient, expected):
    assert_close_in_scale(gradient.to_dense(), expected.to_dense())


def test_gradients_add_up_over_layers_and_backwards_without_being_multiplied_out(lazy):
    table, twin = lazy
    assert len(table.grad.products().tokens) == 2 * 28
    assert "not multiplied out" in repr(table.grad)
    assert_same(table.grad, twin.grad)
    assert table.grad.products() is None, "somebody looked"
    assert "rows" in repr(table.grad)


def test_they_are_scaled_and_measured_without_being_multiplied_out(lazy):
    table, twin = lazy
    dense = nn.Parameter(twin.detach())
    dense.grad = twin.grad.to_dense()
    norms = [torch.nn.utils.clip_grad_norm_([parameter], 0.5) for parameter in (table, dense)]
    torch.testing.assert_close(*norms)
    table.grad.mul_(2)
    torch._foreach_mul_([table.grad], torch.tensor(0.5))
    assert table.grad.products() is not None
    rows = torch.linalg.vector_norm(table.grad.clone().to_dense(), 2, dim=1)
    torch.testing.assert_close(rows.norm(), table.grad.products().norm())
    assert_same(table.grad, dense.grad)


def test_what_a_layer_was_given_may_be_overwritten_before_the_step(table, other):
    twin = nn.Parameter(table.detach().clone())
    inputs = batch()
    backward(twin, other, *(value.clone() for value in inputs))
    gates = inputs[2].clone().requires_grad_()
    backward(table, other, inputs[0], inputs[1], gates)
    for value in inputs:
        value.zero_()
    gates.data.zero_()
    assert table.grad.products() is not None
    assert_same(table.grad, twin.grad)


def test_the_gradient_of_many_tokens_is_smaller_than_its_rows():
    table = nn.Parameter(torch.randn(2**16, 256))
    expert_ids = torch.randint(len(table), (512, 32))
    mixture = EXPERT_MIXTURE_FUNCTIONS["cpu"]
    tokens, gates = torch.randn(512, 256), torch.rand(512, 32)
    mixture(tokens, expert_ids, gates, None, table, row_sparse_gradients=True).sum().backward()
    num_rows = len(expert_ids.unique())
    assert table.grad.products().nbytes < num_rows * 256 * 4 / 10
    assert len(table.grad._indices()[0]) == num_rows


def test_gradients_that_would_outgrow_the_table_are_multiplied_out():
    table, other = nn.Parameter(torch.randn(100, WIDTH)), torch.randn(100, WIDTH)
    backward(table, other, *batch(200, num_experts=100))
    assert table.grad.products() is None, "of one batch"
    few, twin = (nn.Parameter(table.detach().clone()) for _ in range(2))
    was_lazy, batches = [], [batch(4, num_experts=100) for _ in range(20)]
    for inputs in batches:
        backward(few, other, *inputs)
        backward(twin, other, *inputs, mixture="eager")
        was_lazy.append(few.grad.products() is not None)
    assert was_lazy[0]
    assert not was_lazy[-1]
    exact, positive = (nn.Parameter(one.detach().double()) for one in (table, table.abs()))
    for tokens, expert_ids, gates in batches:
        tokens, gates = tokens.double(), gates.double()
        backward(exact, other.double(), tokens, expert_ids, gates, mixture="eager")
        backward(positive, other.double().abs(), tokens.abs(), expert_ids, gates, mixture="eager")
    for gradient in (few.grad, twin.grad):
        assert_sums_close(gradient.to_dense(), exact.grad.to_dense(), positive.grad.to_dense())


def other_gradient(kind):
    rows = torch.sparse_coo_tensor([[3, 10]], torch.ones(2, WIDTH), (NUM_EXPERTS, WIDTH), check_invariants=True)
    return rows.to_dense() if kind == "dense" else rows


@pytest.mark.parametrize("kind", ["row-sparse", "dense"])
def test_they_are_added_to_other_gradients_and_others_to_them(lazy, kind):
    table, twin = lazy
    before, gradient = other_gradient(kind), table.grad
    expected = before.to_dense() + twin.grad.to_dense()
    assert_same(before + gradient.clone(), expected)
    assert_same(gradient.clone() + before, expected)
    assert_same(before.clone().add_(gradient), expected)
    assert_same(gradient.add_(before), expected)


@pytest.mark.parametrize("dense_comes_first", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_table_that_has_a_dense_gradient_too(table, other, dense_comes_first, at_once):
    inputs = batch()
    losses = [lambda: 0.1 * table.square().sum(), lambda: mix(table, other, *inputs)]
    losses = losses if dense_comes_first else losses[::-1]
    if at_once:
        sum(loss() for loss in losses).backward()
    else:
        for loss in losses:
            loss().backward()
    twin = nn.Parameter(table.detach().clone())
    mix(twin, other, *inputs, mixture="eager").backward()
    assert_close_in_scale(table.grad.to_dense(), twin.grad.to_dense() + 0.2 * twin)


def test_gradients_of_other_sizes_are_refused(lazy):
    few, other = nn.Parameter(torch.randn(600, WIDTH)), torch.randn(600, WIDTH)
    backward(few, other, *batch(num_experts=600))
    assert few.grad.products() is not None
    with pytest.raises(RuntimeError, match="600"):
        few.grad + lazy[0].grad
    with pytest.raises(RuntimeError, match="600"):
        lazy[0].grad.add_(few.grad)


@pytest.mark.parametrize(
    "optimizer_class",
    [RowSparseAdamW, torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad],
)
def test_every_optimizer_of_row_sparse_gradients_takes_them(lazy, optimizer_class):
    optimizers = [optimizer_class([parameter], lr=0.1) for parameter in lazy]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert_close_in_scale(*lazy)


def test_an_optimizer_that_takes_no_sparse_gradients_says_so(lazy):
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        torch.optim.Adam([lazy[0]]).step()


def test_the_rows_that_were_asked_for_are_those_of_the_gradient(lazy):
    table, twin = lazy
    assert table.grad.is_sparse
    assert table.grad.is_coalesced()
    assert table.grad.sparse_dim() == table.grad.dense_dim() == 1
    table.grad._values().mul_(3.0)
    table.grad.mul_(0.5)
    assert_same(table.grad, 1.5 * twin.grad)
    table.grad.zero_()
    assert not table.grad.to_dense().any()


def test_detached_it_shares_what_it_is_and_cloned_it_does_not(lazy):
    gradient, expected = lazy[0].grad, lazy[1].grad
    clone, shared = gradient.clone(), gradient.detach()
    gradient.mul_(2.0)
    assert_same(shared, 2.0 * expected)
    assert_same(clone, expected)
    assert_same(copy.deepcopy(clone), expected)


def test_pickled_it_is_a_sparse_tensor(lazy):
    table, twin = lazy
    assert_same(pickle.loads(pickle.dumps(table.grad)), twin.grad)


def test_hooks_see_the_gradient(table, other):
    seen = []
    table.register_hook(lambda gradient: seen.append(gradient.to_dense()))
    table.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.to_dense()))
    backward(table, other, *batch())
    assert len(seen) == 2
    assert seen[0].any()
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("hook", "factor"),
    [(lambda g: g * 2, 2), (lambda g: g.mul_(3), 3), (lambda g: g.coalesce(), 1), (lambda g: g.clone(), 1)],
    ids=["new", "in place", "coalesced", "cloned"],
)
def test_what_a_hook_returns_is_the_gradient(table, other, hook, factor):
    twin, inputs = nn.Parameter(table.detach().clone()), batch()
    table.register_hook(hook)
    for _ in range(2):
        backward(table, other, *inputs)
        backward(twin, other, *inputs, mixture="eager")
    assert_same(table.grad, factor * twin.grad)


def test_a_gradient_that_somebody_keeps_is_copied(table, other):
    twin, inputs, kept = nn.Parameter(table.detach().clone()), batch(), []
    table.register_hook(kept.append)
    table.retain_grad()
    for _ in range(2):
        backward(table, other, *inputs)
        backward(twin, other, *inputs, mixture="eager")
    assert_same(table.grad, twin.grad)
    for gradient in kept:
        assert_same(gradient, 0.5 * twin.grad)


def test_a_gradient_of_what_was_computed_from_a_table(table, other):
    changed = table + torch.zeros_like(table)
    changed.retain_grad()
    backward(changed, other, *batch())
    assert_same(changed.grad, table.grad)
    assert table.grad.to_dense().any()


def test_its_data_can_be_replaced(lazy):
    table, twin = lazy
    table.grad.data = table.grad.data.clone().mul_(3)
    assert_same(table.grad, 3 * twin.grad)
    table.grad.data = twin.grad
    assert_same(table.grad, twin.grad)
    with pytest.raises(TypeError, match="can't become a torch"):
        table.grad.data = twin.grad.to_dense()


def test_a_gradient_of_no_tokens(table, other):
    backward(table, other, *batch(0))
    assert len(table.grad.products().rows) == 0
    optimizer = RowSparseAdamW([table])
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, before)
    assert table.grad.products().norm() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_multiplies_out_row_by_row_what_it_would_be_given(lazy, dtype):
    parameters = [nn.Parameter(lazy[0].detach().to(dtype)) for _ in range(2)]
    products = lazy[0].grad.products()
    parameters[0].grad = LazyRowGradient.of([products], parameters[0])
    values = products.values(torch.float32)
    parameters[1].grad = torch.sparse_coo_tensor(products.rows.unsqueeze(0), values.to(dtype), lazy[0].shape)
    for parameter in parameters:
        RowSparseAdamW([parameter], lr=0.01).step()
    torch.testing.assert_close(*parameters)


def test_the_default_device_of_new_tensors_does_not_matter(tiny_config):
    """Another than the model's, as a training script on a GPU sets it; meta stands for it here."""
    model = PeerForCausalLM(tiny_config(num_sub_keys=32, row_sparse_gradients=True)).train()
    optimizer = RowSparseAdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(1, 99, (2, 50))
    table = model.model.layers[1].mlp.experts.up_embed
    before = table.detach().clone()
    with torch.device("meta"):
        for _ in range(2):  # the second is added to the first
            model(tokens, labels=tokens).loss.backward()
        assert type(table.grad) is LazyRowGradient
        assert table.grad.clone().to_dense().device.type == "cpu"
        clip_gradients(model, 1.0)
        optimizer.step()
    assert (table != before).any()

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Derivatives beyond the first, transforms, counters and a second import: the numbers of eager."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import mixture_inputs
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, RETRIEVAL_FUNCTIONS, choose
from modeling_peer.experts_peer import _read, _write
from modeling_peer.experts_peer import expert_mixture as eager_mixture
from modeling_peer.kernels import operators
from modeling_peer.product_keys_peer import product_key_top_k as eager_top_k

pytest.importorskip("numba")
pytest.importorskip("triton")


def plain_mixture(hidden_states, expert_ids, gates, down_embed, up_embed, gate_embed=None, activation=F.gelu):
    neurons = activation(_read(hidden_states, gate_embed, expert_ids)) * _read(hidden_states, down_embed, expert_ids)
    return _write(gates * neurons, up_embed, expert_ids)


@pytest.fixture(params=["eager", "cpu", "triton"])
def functions(request):
    if request.param == "eager":
        return eager_top_k, eager_mixture
    return (
        choose(RETRIEVAL_FUNCTIONS, request.param, eager_top_k, torch.empty(0)),
        choose(EXPERT_MIXTURE_FUNCTIONS, request.param, eager_mixture, torch.empty(0)),
    )


def derivatives(function, leaves, order):
    """Of a sum of squares, and of the sum of squares of its gradients, and so on."""
    value, results = function(), []
    for i in range(order):
        found = torch.autograd.grad(value.square().sum(), leaves, create_graph=i + 1 < order)
        found = [one.to_dense() if one.is_sparse else one for one in found]
        value = torch.cat([one.flatten() for one in found])
        results += found
    return results


@pytest.mark.parametrize(("row_sparse", "order"), [(False, 3), (True, 2)])
def test_gradients_of_gradients_of_the_mixture(functions, row_sparse, order):
    inputs = mixture_inputs("cpu", gated=True)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    expected = derivatives(lambda: plain_mixture(**inputs), leaves, order)
    actual = derivatives(lambda: functions[1](**inputs, row_sparse_gradients=row_sparse), leaves, order)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.slow_but_first
@pytest.mark.parametrize("share_sub_keys", [True, False])
def test_gradients_of_gradients_of_retrieval(functions, share_sub_keys):
    query = torch.randn(5, 2, 8, requires_grad=True)
    sub_keys = torch.randn(*(() if share_sub_keys else (2,)), 2, 9, 4, requires_grad=True)
    leaves = [query, sub_keys]
    expected = derivatives(lambda: eager_top_k(*leaves, 3)[0], leaves, 3)
    for one, other in zip(derivatives(lambda: functions[0](*leaves, 3)[0], leaves, 3), expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def layer(retrieve, mixture):
    def run(query, sub_keys, hidden_states, *tables):
        scores, expert_ids = retrieve(query, sub_keys, 3)
        return mixture(hidden_states, expert_ids.flatten(1), scores.softmax(-1).flatten(1), *tables)

    return run


def layer_inputs(*batch):
    sizes = (5, 2, 8), (2, 3, 4), (5, 7), (9, 7), (9, 7), (9, 7)
    return tuple(torch.randn(*batch, *size) for size in sizes)


def total(function):
    return lambda *inputs: function(*inputs).square().sum()


def forward_mode(function, inputs, tangents):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        return torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(total(f), argnums=(0, 1, 3))(*layer_inputs()),
        lambda f: vmap(f)(*layer_inputs(4)),
        lambda f: jvp(f, layer_inputs(), layer_inputs()),
        lambda f: jacfwd(f, argnums=3)(*layer_inputs()),
        lambda f: hessian(total(f), argnums=2)(*layer_inputs()),
        lambda f: forward_mode(f, layer_inputs(), layer_inputs()),
    ],
    ids=["grad", "vmap", "jvp", "jacfwd", "hessian", "forward_ad"],
)
def test_transforms_give_the_numbers_of_the_plain_formula(functions, transform):
    results = []
    for function in (layer(eager_top_k, plain_mixture), layer(*functions)):
        torch.manual_seed(1)
        results.append(transform(function))
    torch.testing.assert_close(results[1], results[0])


def test_a_trace_runs_another_number_of_tokens(functions):
    inputs = layer_inputs()
    traced = torch.jit.trace(layer(*functions), inputs)
    more = [torch.cat([tensor] * 3) if i in (0, 2) else tensor for i, tensor in enumerate(inputs)]
    torch.testing.assert_close(traced(*more), layer(*functions)(*more))


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_operators_refuse_transforms_by_name(implementation):
    query, sub_keys = torch.randn(5, 2, 8), torch.randn(2, 9, 4)
    with pytest.raises(NotImplementedError, match=f'"{implementation}" does not support torch.func .*"eager"'):
        vmap(lambda query: operators.product_key_top_k(query, sub_keys, 3, implementation=implementation))(query[None])


def test_products_are_counted_forward_and_backward():
    query, sub_keys = torch.randn(5, 2, 8, requires_grad=True), torch.randn(2, 9, 4, requires_grad=True)
    counts = []
    for retrieve in (eager_top_k, partial(operators.product_key_top_k, implementation="cpu")):
        with FlopCounterMode(display=False) as counter:
            retrieve(query, sub_keys, 3)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 5 * 2 * 8 * 9

    with FlopCounterMode(display=False) as counter:
        output = operators.expert_mixture(**mixture_inputs("cpu", gated=True), implementation="cpu")
        pass_over_rows = 2 * 5 * 6 * 7
        assert counter.get_total_flops() == 3 * pass_over_rows
        output.sum().backward()
    assert counter.get_total_flops() == 9 * pass_over_rows


@pytest.mark.slow
def test_the_package_may_be_imported_again_in_a_process():
    script = """
import sys, torch, modeling_peer
def layer():
    config = modeling_peer.PeerConfig(hidden_size=32, num_attention_heads=4, num_sub_keys=8, num_experts_per_head=4)
    return modeling_peer.PeerLayer(config)
layers = [layer()]
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "modeling_peer"]:
        del sys.modules[name]
    import modeling_peer
    layers.append(layer())
for one in layers:
    one(torch.randn(3, 32)).sum().backward()
"""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the operators are given is checked: compiled and loaded graphs call them without the public functions."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modeling_peer.kernels import operators
from modeling_peer.kernels.cpu.optimizer import adamw_rows_
from modeling_peer.kernels.lazy_gradients import OuterProducts

pytest.importorskip("numba")
pytest.importorskip("triton")

# Run in a process of its own: reading beyond memory ends it.
FUZZ = """
import json, random, sys
import torch
import modeling_peer.kernels.operators

implementation, *names = sys.argv[1:]
T, H, K, N, HALF, D, A = 7, 2, 3, 5, 4, 6, 8
ids = torch.randint(N * N, (T, A))
order = ids.flatten().argsort(stable=True)
tokens, weights, table = torch.randn(T, D), torch.rand(T, A), torch.randn(N * N, D)
query, sub_keys = torch.randn(T, H, 2 * HALF), torch.randn(2, N, HALF)
scores, retrieved = torch.rand(T, H, K), torch.randint(N * N, (T, H, K))
retrieved[0, 0, 0] = N * N - 1
ARGUMENTS = {
    "product_key_top_k": [query, sub_keys, K],
    "product_key_top_k_backward": [scores, retrieved, query, sub_keys],
    "group_by_expert": [ids],
    "read_experts": [tokens, ids, table, None, False],
    "write_experts": [weights, ids, table, None, False],
    "row_gradients": [weights, tokens, ids, order, N * N, torch.float32, False],
    "write_experts_gradients": [tokens, weights, ids, order, table, False],
}


def misfits(name, tensor):
    for dim in range(tensor.dim()):
        if name != "group_by_expert":
            yield f"fewer in {dim}", tensor.narrow(dim, 0, tensor.shape[dim] - 1)
            yield f"more in {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    yield "complex", tensor.to(torch.complex64)
    yield "sparse", tensor.to_sparse()
    if name != "group_by_expert":
        yield "another rank", tensor[None]
    if tensor.dtype == torch.int64:
        yield "int32", tensor.int()
        for value in (-1, -(2**62), 2**40) if name != "group_by_expert" else (-1, -(2**62)):
            one, all_of_them = tensor.clone(), torch.full_like(tensor, value)
            one.view(-1)[random.randrange(one.numel())] = value
            yield f"one {value}", one
            yield f"all {value}", all_of_them
    if tensor is order:
        yield "backwards", tensor.flip(0)
        yield "twice the same", torch.cat([tensor[:1], tensor[:-1]])
        yield "unsorted", torch.arange(len(tensor))


passed = []
for name in names:
    print(name, file=sys.stderr, flush=True)  # the last one said is the one that ended the process
    arguments, operator = ARGUMENTS[name], getattr(torch.ops.modeling_peer, name)
    operator(*arguments, implementation)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            candidates = misfits(name, argument)
            # Without gradients of tables nothing says how many sub-keys, tokens or experts there should be.
            free = {
                "product_key_top_k": {
                    0: ("fewer in 0", "more in 0", "fewer in 1", "more in 1"),
                    1: ("fewer in 1", "more in 1"),
                },
                "product_key_top_k_backward": {3: ("more in 1",)},
                "read_experts": {1: ("fewer in 1", "more in 1"), 2: ("more in 0",)},
                "write_experts": {2: ("more in 0", "fewer in 1", "more in 1")},
                "row_gradients": {1: ("fewer in 1", "more in 1")},
                "write_experts_gradients": {4: ("more in 0",)},
            }.get(name, {}).get(i, ())
            candidates = [(what, value) for what, value in candidates if what not in free]
        elif isinstance(argument, bool) or argument is None:
            candidates = []
        elif isinstance(argument, int):
            candidates = [(str(value), value) for value in (-1, 0, 2**33 if name == "product_key_top_k" else 1)]
        else:
            candidates = [("int64", torch.int64), ("float64", torch.float64)]
        for what, value in candidates:
            try:
                operator(*arguments[:i], value, *arguments[i + 1 :], implementation)
            except (ValueError, IndexError, RuntimeError, NotImplementedError):
                continue
            passed.append(f"{name}, argument {i}, {what}")
    try:
        operator(*arguments, "nobody")
        passed.append(f"{name}, an implementation that does not exist")
    except ValueError:
        pass
print(json.dumps(passed))
"""


OPERATORS = [
    "product_key_top_k",
    "product_key_top_k_backward",
    "group_by_expert",
    "read_experts",
    "write_experts",
    "row_gradients",
    "write_experts_gradients",
]


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_an_operator_refuses_whatever_does_not_fit(implementation):
    # The last expert is among the ids, so that a table of one row less misfits.
    script = FUZZ.replace("order = ids", "ids[0, 0] = N * N - 1\norder = ids", 1)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, implementation, *OPERATORS]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == []


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("bad_id", [-1, -(2**62), 9, 2**40])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_ids_that_do_not_exist_are_an_index_error(implementation, bad_id, trained, everywhere):
    ids = torch.full((3, 4), bad_id) if everywhere else torch.randint(9, (3, 4))
    ids[1, 2] = bad_id
    table = torch.randn(9, 8, requires_grad=trained)
    with pytest.raises(IndexError, match=str(bad_id)):
        operators.expert_mixture(torch.randn(3, 8), ids, torch.rand(3, 4), table, table, implementation=implementation)


def adamw_arguments():
    table = torch.randn(20, 6)
    rows = torch.tensor([1, 4, 19])
    return {
        "table": table,
        "exp_avg": torch.zeros_like(table),
        "exp_avg_sq": torch.zeros_like(table),
        "rows": rows,
        "gradients": torch.randn(3, 6),
        "catch_up": torch.ones(3, 4),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.zeros(20, 1)),  # the state of a narrower table
        ("exp_avg", torch.zeros(19, 6)),
        ("exp_avg_sq", torch.zeros(20, 3)),
        ("exp_avg_sq", torch.zeros(1, 1)),
        ("rows", torch.tensor([1, 4, 20])),
        ("rows", torch.tensor([-1, 4, 5])),
        ("rows", torch.tensor([4, 4, 5])),
        ("rows", torch.tensor([1, 4])),
        ("gradients", torch.randn(3, 5)),
        ("gradients", torch.randn(2, 6)),
        ("gradients", torch.randn(3, 6).double()),
        ("catch_up", torch.ones(3, 3)),
        ("catch_up", torch.ones(2, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_a_step_refuses_state_and_gradients_of_other_sizes(name, value):
    settings = {"step": 1, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    adamw_rows_(**adamw_arguments(), **settings)
    with pytest.raises((ValueError, IndexError)):
        adamw_rows_(**{**adamw_arguments(), name: value}, **settings)


def test_a_step_refuses_products_of_tokens_that_do_not_exist():
    arguments = adamw_arguments()
    products = [torch.tensor([1, 4, 19]), torch.arange(4), torch.rand(3), torch.tensor([0, 1, 2]), torch.randn(2, 6)]
    settings = {"step": 1, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="token_ids must be from 0 to 1; got 0 to 2"):
        adamw_rows_(**{**arguments, "gradients": OuterProducts(*products)}, **settings)
    products[1] = torch.tensor([0, 1, 2, 4])
    with pytest.raises(ValueError, match="from 0 to 3"):
        adamw_rows_(**{**arguments, "gradients": OuterProducts(*products)}, **settings)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)], ids=str)
def test_gradients_of_retrieval_with_axes_of_one_element_equal_eager(sizes):
    from modeling_peer.product_keys_peer import product_key_top_k

    num_tokens, num_heads, top_k = sizes
    query, sub_keys = torch.randn(num_tokens, num_heads, 8), torch.randn(2, 3, 4)
    results = []
    for implementation in (None, "cpu", "triton"):
        leaves = query.clone().requires_grad_(), sub_keys.clone().requires_grad_()
        options = {} if implementation is None else {"implementation": implementation}
        function = product_key_top_k if implementation is None else operators.product_key_top_k
        scores, _ = function(*leaves, top_k, **options)
        # Not a sum: its gradient would be a view of one number.
        results.append(torch.autograd.grad((scores * torch.arange(1.0, 1 + top_k)).sum(), leaves))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])

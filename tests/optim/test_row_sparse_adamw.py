# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW of touched rows: AdamW's own steps where rows are touched, nothing where they are not."""

import copy
import math

import pytest
import reference
import torch
from torch import nn

from modeling_peer import PeerLayer, backends_peer
from modeling_peer.kernels.lazy_gradients import LazyRowGradient, OuterProducts
from modeling_peer.training import RowSparseAdamW

SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def row_sparse(gradient, rows):
    return torch.sparse_coo_tensor(rows.unsqueeze(0), gradient[rows], gradient.shape)


@pytest.fixture(params=["eager", "cpu"])
def implementation(request, monkeypatch):
    """The update itself is chosen by device: here by hand."""
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setattr(backends_peer, "_best_implementation", lambda device_type, dtype: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("row_state", "tolerance"),
    [
        # five steps of float32
        ("float32", {"atol": 1e-6, "rtol": 1e-5}),
        # both moments rounded to 8 bits: steps of about lr = 0.01 off by some 2**-8 of that; at most 1.5e-4, 20 seeds
        ("bfloat16", {"atol": 3e-4, "rtol": 0}),
        # where the gradients of a row are equally large, so that their mean square is that of each; at most 1.1e-4
        ("factored", {"atol": 3e-4, "rtol": 0}),
    ],
)
def test_steps_that_touch_every_row_are_those_of_adamw(implementation, dtype, row_state, tolerance):
    table = nn.Parameter(torch.randn(30, 7).to(dtype))
    # AdamW's moments of a bfloat16 table are bfloat16, ours as asked: compare with AdamW in float32.
    expected = nn.Parameter(table.detach().float())
    ours = RowSparseAdamW([table], **SETTINGS, row_state=row_state)
    theirs = torch.optim.AdamW([expected], **SETTINGS)
    for _ in range(5):
        gradient = torch.randn(30, 7).to(dtype)
        if row_state == "factored":
            gradient = gradient.sign() * torch.rand(30, 1).to(dtype)
        table.grad, expected.grad = row_sparse(gradient, torch.arange(30)), gradient.float()
        ours.step()
        theirs.step()
    if dtype == torch.bfloat16:
        tolerance = {"atol": 1e-2, "rtol": 5 * 2**-8}  # five steps, each rounded to bfloat16 once
    torch.testing.assert_close(table.float(), expected, **tolerance)
    relative = {"float32": 1e-5, "bfloat16": 5 * 2**-7, "factored": 1e-5}[row_state]  # rounded down or up, five times
    squares = ours.state[table]["exp_avg_sq"].float().expand(30, 7)
    torch.testing.assert_close(squares, theirs.state[expected]["exp_avg_sq"], rtol=relative, atol=1e-7)


def test_a_factored_second_moment_is_that_of_the_rows_mean_square(implementation):
    table = nn.Parameter(torch.zeros(4, 3))
    optimizer = RowSparseAdamW([table], lr=1.0, betas=(0.0, 0.5), eps=1e-12, weight_decay=0.0, row_state="factored")
    table.grad = row_sparse(torch.tensor([[3.0, 4.0, 0.0]]).expand(4, 3), torch.tensor([2]))
    optimizer.step()
    root = math.sqrt(25 / 3)  # bias correction takes the factor 1 - beta2 away again
    torch.testing.assert_close(table.detach()[2], -torch.tensor([3.0, 4.0, 0.0]) / root)
    assert optimizer.state[table]["exp_avg_sq"].shape == (4, 1)
    assert not table.detach()[[0, 1, 3]].any()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.5)])  # the second pair would be refused with a first moment
@pytest.mark.parametrize("as_products", [False, True])
def test_one_scalar_per_row_is_sgd_normalised_by_the_rows_root_mean_square(implementation, betas, as_products):
    table = nn.Parameter(torch.randn(7, 5))
    # row 0 in every step, row 1 in the first alone, row 2 after five steps, row 3 with gaps, row 4 never, 5 with zeros
    touched = [[0, 1], [0, 3], [0], [0, 5], [0], [0, 2], [0, 3, 5], [0, 2, 3]]
    steps = [{row: torch.randn(5) * (row != 5) for row in rows} for rows in touched]
    settings = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
    expected, squares = reference.rms_normalised_sgd(table.detach(), steps, beta2=betas[1], **settings)
    optimizer = RowSparseAdamW([table], betas=betas, row_state="row", **settings)
    for gradients in steps:
        rows, values = torch.tensor(list(gradients)), torch.stack(list(gradients.values()))
        if as_products:  # each row is half of a token plus half of the same
            starts, weights = 2 * torch.arange(len(rows) + 1), torch.full((2 * len(rows),), 0.5)
            token_ids = torch.arange(len(rows)).repeat_interleave(2)
            table.grad = LazyRowGradient.of([OuterProducts(rows, starts, weights, token_ids, values)], table)
        else:
            table.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, table.shape)
        optimizer.step()
    # float32 has 1 - 0.999 with an error of 1.3e-5 of it, which the compiled update meets: measured 3.6e-6
    torch.testing.assert_close(table.detach(), expected, rtol=1e-5, atol=1e-5)
    state = optimizer.state[table]
    torch.testing.assert_close(state["exp_avg_sq"], squares.unsqueeze(1), rtol=5e-5, atol=1e-8)
    assert state.keys() == {"step", "last_step", "exp_avg_sq"}
    assert state["last_step"].nbytes + state["exp_avg_sq"].nbytes == 8 * len(table)


@pytest.mark.parametrize("row_state", ["bfloat16", "factored", "row"])
def test_float64_tables_train_with_a_state_of_fewer_bits(row_state):
    table = nn.Parameter(torch.ones(6, 2, dtype=torch.float64))
    table.grad = row_sparse(torch.ones(6, 2, dtype=torch.float64), torch.tensor([1, 4]))
    RowSparseAdamW([table], lr=0.1, weight_decay=0.0, row_state=row_state).step()
    expected = torch.ones(6, 2, dtype=torch.float64).index_fill(0, torch.tensor([1, 4]), 0.9)
    torch.testing.assert_close(table.detach(), expected, atol=5e-4, rtol=0)  # bfloat16's moments have 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scalar_per_row_is_adamw_with_beta1_0_where_the_weights_of_a_row_have_equal_gradients(
    implementation, dtype
):
    table = nn.Parameter(torch.randn(30, 7).to(dtype))
    expected = nn.Parameter(table.detach().float())
    ours = RowSparseAdamW([table], **SETTINGS, row_state="row")
    theirs = torch.optim.AdamW([expected], **SETTINGS | {"betas": (0.0, 0.95)})
    for _ in range(5):
        gradient = (torch.randn(30, 7).sign() * torch.rand(30, 1)).to(dtype)
        table.grad, expected.grad = row_sparse(gradient, torch.arange(30)), gradient.float()
        ours.step()
        theirs.step()
    rounding = {"atol": 1e-2, "rtol": 5 * 2**-8} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(table.float(), expected, **rounding)


def test_betas_0_of_one_scalar_per_row_is_for_dense_gradients():
    tables, weights = ([nn.Parameter(torch.ones(6, 4)) for _ in range(2)] for _ in range(2))
    for table, weight, beta1 in zip(tables, weights, (0.0, 0.9), strict=True):
        optimizer = RowSparseAdamW([table, weight], betas=(beta1, 0.95), row_state="row")
        for _ in range(2):
            table.grad = row_sparse(torch.arange(24.0).view(6, 4), torch.tensor([1, 2]))
            weight.grad = torch.randn(6, 4)
            optimizer.step()
    assert torch.equal(*tables)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_row_that_wakes_up_is_where_adamw_would_have_taken_it(implementation, betas, weight_decay):
    settings = {"lr": 0.01, "betas": betas, "eps": 1e-12, "weight_decay": weight_decay}
    table = nn.Parameter(torch.randn(6, 5))
    expected = nn.Parameter(table.detach().clone())
    ours, theirs = RowSparseAdamW([table], **settings), torch.optim.AdamW([expected], **settings)
    everywhere, before = torch.arange(6), table.detach().clone()
    awake = [everywhere] * 200 + [everywhere[:3]] * 25 + [everywhere]  # late, when bias corrections hardly change
    for rows in awake:
        gradient = torch.randn(6, 5)
        table.grad = row_sparse(gradient, rows)
        expected.grad = table.grad.to_dense()
        ours.step()
        theirs.step()
    # Bias corrections are frozen while a row is not used, and decay follows the moments' steps at once: at most
    # 2.5e-3 of the way, 10 seeds. A row that is not brought up to date is 0.1 of it away.
    moved = (expected - before).abs().max().item()
    torch.testing.assert_close(table, expected, atol=5e-3 * moved, rtol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[table][name], theirs.state[expected][name], rtol=1e-4, atol=1e-8)


def test_rows_that_are_not_touched_stay_as_they_are(implementation):
    table = nn.Parameter(torch.randn(30, 7))
    optimizer = RowSparseAdamW([table], **SETTINGS)
    before, rows = table.detach().clone(), torch.tensor([3, 7, 29])
    for _ in range(3):
        table.grad = row_sparse(torch.randn(30, 7), rows)
        optimizer.step()
    others = torch.ones(30, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(table[others], before[others])
    assert not optimizer.state[table]["exp_avg"][others].any()
    assert (table[rows] != before[rows]).all()


def test_a_table_that_no_token_touched_has_no_state():
    table = nn.Parameter(torch.randn(6, 2))
    table.grad = row_sparse(torch.randn(6, 2), torch.tensor([], dtype=torch.int64))
    optimizer = RowSparseAdamW([table], **SETTINGS)
    optimizer.step()
    assert not optimizer.state[table]


def test_the_second_moment_in_bfloat16_follows_gradients_that_shrink(implementation):
    # From 1 down to 0.01 with beta2 = 0.999: every step is a thousandth, a quarter of bfloat16's spacing. Rounded to
    # the nearest it would stay at 1.
    table = nn.Parameter(torch.zeros(64, 16))
    optimizer = RowSparseAdamW([table], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, row_state="bfloat16")
    rows = torch.arange(64)
    table.grad = row_sparse(torch.ones(64, 16), rows)
    optimizer.step()
    optimizer.state[table]["exp_avg_sq"].fill_(1.0)
    for _ in range(1000):
        table.grad = row_sparse(torch.full((64, 16), 0.1), rows)
        optimizer.step()
    expected = 0.01 + 0.99 * 0.999**1000
    squares = optimizer.state[table]["exp_avg_sq"].float()
    assert squares.mean().item() == pytest.approx(expected, rel=0.01)  # of 1,024; measured 0.1 %
    assert squares.std().item() < 0.1 * expected


@pytest.mark.parametrize("row_state", ["bfloat16", "factored", "row"])
def test_every_implementation_keeps_the_same_state(monkeypatch, row_state):
    pytest.importorskip("numba")
    tables = {name: nn.Parameter(torch.ones(40, 37)) for name in ("eager", "cpu")}
    optimizers = {name: RowSparseAdamW([table], **SETTINGS, row_state=row_state) for name, table in tables.items()}
    for _ in range(10):
        gradient, rows = torch.randn(40, 37), torch.randperm(40)[:20].sort().values
        for name, table in tables.items():
            monkeypatch.setattr(backends_peer, "_best_implementation", lambda device_type, dtype, name=name: name)
            table.grad = row_sparse(gradient, rows)
            optimizers[name].step()
    states = [optimizers[name].state[table] for name, table in tables.items()]
    for name in states[0].keys() & {"exp_avg", "exp_avg_sq"}:
        eager, cpu = (state[name].float() for state in states)
        # The same chance rounds both, but sums that differ in the last bit may lie on two sides of it, rarely.
        assert ((eager - cpu).abs() <= 1e-6 * eager.abs()).float().mean() > 0.99
    torch.testing.assert_close(tables["cpu"], tables["eager"], atol=2e-4, rtol=0)


def test_many_rows_on_several_threads_equal_the_readable_update(monkeypatch):
    pytest.importorskip("numba")
    tables = {name: nn.Parameter(torch.ones(5000, 5)) for name in ("eager", "cpu")}
    gradient, rows = torch.randn(5000, 5), torch.randperm(5000)[:3000].sort().values
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    for name, table in tables.items():
        monkeypatch.setattr(backends_peer, "_best_implementation", lambda device_type, dtype, name=name: name)
        table.grad = row_sparse(gradient, rows)
        RowSparseAdamW([table], **SETTINGS).step()
    torch.set_num_threads(threads)
    torch.testing.assert_close(tables["cpu"], tables["eager"])


def test_a_gradient_with_repeated_rows_in_any_order_is_added_up(implementation):
    table = nn.Parameter(torch.randn(6, 2))
    other = nn.Parameter(table.detach().clone())
    values = torch.randn(3, 2)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), values, (6, 2))
    other.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4]]), torch.stack([values[1], values[0] + values[2]]), (6, 2)
    )
    for parameter in (table, other):
        RowSparseAdamW([parameter], **SETTINGS).step()
    torch.testing.assert_close(table, other)


def test_dense_parameters_of_the_same_group_get_adamw():
    table, weight = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(3))
    expected = nn.Parameter(weight.detach().clone())
    table.grad = row_sparse(torch.randn(6, 2), torch.tensor([1]))
    weight.grad = expected.grad = torch.randn(3)
    optimizer = RowSparseAdamW([table, weight], **SETTINGS)
    optimizer.step()
    torch.optim.AdamW([expected], **SETTINGS).step()
    assert torch.equal(weight, expected)
    assert table.grad.is_sparse, "gradients stay for whoever looks at them"


def test_hooks_of_a_step_run_once():
    weight, calls = nn.Parameter(torch.ones(3)), []
    torch.optim.AdamW([weight])  # from now on torch runs hooks around AdamW's own step too
    optimizer = RowSparseAdamW([weight])
    optimizer.register_step_post_hook(lambda *_: calls.append(weight.tolist()))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert calls == [weight.tolist()]


@pytest.mark.parametrize("row_state", ["float32", "bfloat16", "factored", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_trains_alike_after_its_optimizer_was_saved_and_loaded(tiny_config, row_state, dtype):
    layer = PeerLayer(tiny_config(row_sparse_gradients=True, query_norm="rms_norm")).to(dtype)
    optimizer = RowSparseAdamW(layer.parameters(), **SETTINGS, row_state=row_state)
    batches = torch.randn(4, 5, 32, dtype=dtype)

    def train(layer, optimizer, batches):
        for batch in batches:
            layer(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(layer, optimizer, batches[:2])
    again = copy.deepcopy(layer)
    other_optimizer = RowSparseAdamW(again.parameters(), **SETTINGS, row_state=row_state)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(layer, optimizer, batches[2:])
    train(again, other_optimizer, batches[2:])
    for expected, actual in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected)
    for expected, actual in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert {name: value.dtype for name, value in actual.items()} == {
            name: value.dtype for name, value in expected.items()
        }


def test_what_the_optimizer_cannot_do_is_refused_with_the_reason():
    table = nn.Parameter(torch.randn(6, 2))
    with pytest.raises(ValueError, match="row_state must be one of float32, bfloat16, factored, row; got 'int8'"):
        RowSparseAdamW([table], row_state="int8")
    with pytest.raises(ValueError, match=r"betas\[0\] \(0.9\) must be less than .* root of betas\[1\] \(0.8944\)"):
        RowSparseAdamW([table], betas=(0.9, 0.8))
    optimizer = RowSparseAdamW([table])
    table.grad = row_sparse(torch.randn(6, 2), torch.tensor([1]))
    optimizer.step()
    table.grad = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"shape \(6, 2\) has a dense gradient, and moments of row-sparse ones"):
        optimizer.step()


def test_a_gradient_that_is_sparse_in_columns_too_is_refused_with_the_numbers():
    table = nn.Parameter(torch.randn(6, 2))
    table.grad = torch.randn(6, 2).to_sparse()
    with pytest.raises(ValueError, match=r"\(6, 2\) is sparse in 2 dimensions"):
        RowSparseAdamW([table]).step()

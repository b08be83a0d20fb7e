"""AdamW of touched rows: AdamW's own steps where rows are touched, nothing where they are not."""

import copy

import pytest
import torch
from torch import nn

from modeling_peer import PeerLayer, backends_peer
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
def test_steps_that_touch_every_row_are_those_of_adamw(implementation, dtype):
    table = nn.Parameter(torch.randn(30, 7).to(dtype))
    # AdamW's moments of a bfloat16 table are bfloat16, ours float32: compare with AdamW in float32.
    expected = nn.Parameter(table.detach().float())
    ours, theirs = RowSparseAdamW([table], **SETTINGS), torch.optim.AdamW([expected], **SETTINGS)
    for _ in range(5):
        gradient = torch.randn(30, 7).to(dtype)
        table.grad, expected.grad = row_sparse(gradient, torch.arange(30)), gradient.float()
        ours.step()
        theirs.step()
        if dtype == torch.float32:
            torch.testing.assert_close(table, expected, atol=1e-6, rtol=1e-5)
    # five steps, each rounded to bfloat16 once
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 5 * 2**-8}
    torch.testing.assert_close(table.float(), expected, **tolerance)
    torch.testing.assert_close(ours.state[table]["exp_avg_sq"], theirs.state[expected]["exp_avg_sq"])


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


def test_a_layer_trains_alike_after_its_optimizer_was_saved_and_loaded(tiny_config):
    layer = PeerLayer(tiny_config(row_sparse_gradients=True))
    optimizer = RowSparseAdamW(layer.parameters(), **SETTINGS)
    batches = torch.randn(4, 5, 32)

    def train(layer, optimizer, batches):
        for batch in batches:
            layer(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(layer, optimizer, batches[:2])
    again = copy.deepcopy(layer)
    other_optimizer = RowSparseAdamW(again.parameters(), **SETTINGS)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(layer, optimizer, batches[2:])
    train(again, other_optimizer, batches[2:])
    for expected, actual in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_gradient_that_is_sparse_in_columns_too_is_refused_with_the_numbers():
    table = nn.Parameter(torch.randn(6, 2))
    table.grad = torch.randn(6, 2).to_sparse()
    with pytest.raises(ValueError, match=r"\(6, 2\) is sparse in 2 dimensions"):
        RowSparseAdamW([table]).step()

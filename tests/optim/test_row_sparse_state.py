# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""State of the row-sparse optimizer: exact for any number of steps, resumable from any save, checked on load."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from modeling_peer import PeerForCausalLM, backends_peer
from modeling_peer.kernels.lazy_gradients import OuterProducts
from modeling_peer.kernels.optimizer_arguments import check_adamw_rows
from modeling_peer.optim import parameter_groups
from modeling_peer.optim.row_sparse_adamw import adamw_rows_
from modeling_peer.training import RowSparseAdamW

TOKENS = torch.arange(40).view(2, 20)
ROWS = torch.tensor([1, 3])


def touch(table, rows=ROWS):
    values = torch.ones(len(rows), table.shape[1], dtype=table.dtype)
    table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)


def stepped(shape=(6, 4), num_steps=3, **settings):
    table = nn.Parameter(torch.ones(shape))
    optimizer = RowSparseAdamW([table], lr=0.1, **settings)
    for _ in range(num_steps):
        touch(table)
        optimizer.step()
    return table, optimizer


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow_but_first
def test_steps_are_counted_exactly_whatever_the_default_dtype_is(default_dtype):
    table = nn.Parameter(torch.ones(4, 8, dtype=torch.float32))
    expected = nn.Parameter(torch.ones(4, 8, dtype=torch.float32))
    ours, theirs = (kind([p], lr=1e-3) for kind, p in ((RowSparseAdamW, table), (torch.optim.AdamW, expected)))
    for _ in range(2100):  # 16-bit floats count up to 256 or 2,048
        touch(table, torch.arange(4))
        expected.grad = torch.ones_like(expected)
        ours.step()
        theirs.step()
    assert ours.state[table]["step"].item() == 2100
    torch.testing.assert_close(table, expected, atol=1e-4, rtol=0)  # of 2; 2,100 times two roundings


def test_the_counter_goes_on_where_float32_would_stop():
    table, optimizer = stepped(num_steps=1)
    state = optimizer.state_dict()
    state["state"][0] |= {"step": torch.tensor(2.0**24), "last_step": torch.full((6,), 2**24, dtype=torch.int32)}
    optimizer.load_state_dict(state)  # counters of earlier releases are float32
    for _ in range(3):
        touch(table)
        optimizer.step()
    assert optimizer.state[table]["step"].item() == 2**24 + 3
    assert optimizer.state[table]["last_step"].tolist() == [2**24, 2**24 + 3] * 2 + [2**24] * 2


def test_state_is_on_the_tables_device_and_its_counter_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        table = nn.Parameter(torch.ones(6, 4, device="cpu"))
        optimizer = RowSparseAdamW([table])
        table.grad = torch.sparse_coo_tensor(ROWS[None], torch.ones(2, 4, device="cpu"), (6, 4), device="cpu")
        optimizer.step()
    assert {value.device.type for value in optimizer.state[table].values()} == {"cpu"}


def build(config, row_state="factored"):
    torch.manual_seed(1)
    model = PeerForCausalLM(config).train()
    groups = parameter_groups(model, 0.01, table_learning_rate_multiple=2.0)
    return model, RowSparseAdamW(groups, row_state=row_state)


def train(model, optimizer, num_steps, first=0):
    for i in range(first, first + num_steps):
        model(TOKENS + i, labels=TOKENS + i).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def torch_save(model, optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return lambda model, optimizer: optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def in_memory(**options):
    options = StateDictOptions(**options)

    def save(model, optimizer, folder):
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        return lambda model, optimizer: set_optimizer_state_dict(model, optimizer, state, options=options)

    return save


def distributed(write=dcp.save, **options):
    options = StateDictOptions(**options)

    def save(model, optimizer, folder):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        future = write(state, checkpoint_id=folder / "dcp", no_dist=True)
        if future is not None and hasattr(future, "result"):
            future.result()

        def load(model, optimizer):
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
            dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)

        return load

    return save


@pytest.mark.parametrize("num_steps", [0, 2])  # asked for before the first step, and after some
@pytest.mark.parametrize(
    "save",
    [
        torch_save,
        in_memory(),
        in_memory(flatten_optimizer_state_dict=True),
        in_memory(full_state_dict=True, cpu_offload=True),
        distributed(),
        distributed(flatten_optimizer_state_dict=True),
        distributed(dcp.async_save),
    ],
    ids=["torch.save", "nested", "flattened", "full", "DCP", "flattened DCP", "asynchronous DCP"],
)
@pytest.mark.parametrize("row_state", ["factored", "row"])
def test_a_run_that_was_saved_anywhere_goes_on_as_if_it_had_not_been(
    tmp_path, tiny_config, save, num_steps, row_state
):
    config = tiny_config(row_sparse_gradients=True, num_hidden_layers=2)
    (model, optimizer), (expected, undisturbed) = build(config, row_state), build(config, row_state)
    train(model, optimizer, num_steps)
    train(expected, undisturbed, num_steps + 2)
    load = save(model, optimizer, tmp_path)
    resumed, other = build(config, row_state)
    resumed.load_state_dict(model.state_dict())
    load(resumed, other)
    for one, its_optimizer in ((model, optimizer), (resumed, other)):
        train(one, its_optimizer, 2, first=num_steps)
        for name, parameter in expected.named_parameters():
            assert torch.equal(one.get_parameter(name), parameter), name
            state = its_optimizer.state[one.get_parameter(name)]
            torch.testing.assert_close(dict(state), dict(undisturbed.state[parameter]), rtol=0, atol=0)


@pytest.mark.parametrize("row_sparse", [True, False])
def test_state_made_before_the_first_step_is_of_the_gradients_that_come(tiny_config, row_sparse):
    model = PeerForCausalLM(tiny_config(row_sparse_gradients=row_sparse))
    # groups that say the contrary, or nothing
    groups = parameter_groups(model, 0.01) if not row_sparse else model.parameters()
    if not row_sparse:
        groups[-1]["row_sparse"] = True
    optimizer = RowSparseAdamW(groups)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, 1)
    tables = [p for name, p in model.named_parameters() if name.endswith("_embed")]
    assert {"last_step" in optimizer.state[table] for table in tables} == {row_sparse}
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_flattened_state_of_rows_is_refused_where_nobody_knew_that_they_are(tiny_config):
    config, options = tiny_config(row_sparse_gradients=True), StateDictOptions(flatten_optimizer_state_dict=True)
    model = PeerForCausalLM(config)
    optimizer = RowSparseAdamW(parameter_groups(model, 0.01))
    train(model, optimizer, 1)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    groups = [{**group} for group in optimizer.param_groups]
    for group in groups:
        group.pop("row_sparse", None)
    other = RowSparseAdamW(groups)
    set_optimizer_state_dict(model, other, state, options=options)
    with pytest.raises(ValueError, match="row_sparse=True, as in parameter_groups"):
        train(model, other, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_of_table_and_optimizer_goes_on_alike(copied):
    table, optimizer = stepped(row_state="bfloat16")
    other_table, other = copied((table, optimizer))
    for one, its_optimizer in ((table, optimizer), (other_table, other)):
        touch(one, torch.tensor([0, 1]))
        its_optimizer.step()
    assert torch.equal(table, other_table)
    assert other.state[other_table]["step"].item() == 4
    assert other.defaults["row_state"] == "bfloat16"


def test_state_saved_under_one_dtype_of_the_table_is_loaded_under_another():
    _, optimizer = stepped()
    table = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
    other = RowSparseAdamW([table])
    other.load_state_dict(optimizer.state_dict())
    touch(table)
    other.step()
    dtypes = {name: value.dtype for name, value in other.state[table].items()}
    assert dtypes == {
        "step": torch.int64,
        "last_step": torch.int32,
        "exp_avg": torch.float64,
        "exp_avg_sq": torch.float64,
    }


def test_hooks_of_loading_change_and_see_what_is_loaded():
    table, optimizer = stepped()
    state, seen = optimizer.state_dict(), []
    state["state"] = {"named": state["state"][0]}

    def rename(optimizer, state_dict):
        return {**state_dict, "state": {0: state_dict["state"]["named"]}}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda one: seen.append(one.state[table]["last_step"].dtype))
    optimizer.load_state_dict(state)
    assert seen == [torch.int32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"row_state": "int8"}, "row_state must be one of float32, bfloat16, factored, row; got 'int8'"),
        ({"betas": (0.99, 0.9)}, r"betas\[0\] \(0.99\) must be less than the square root of betas\[1\]"),
        ({"betas": (0.5, 1.0)}, r"betas\[1\] \(1.0\) must be at least 0 and less than 1"),
        ({"maximize": True}, "maximize=True"),
        ({"amsgrad": True}, "amsgrad=True"),
    ],
)
def test_settings_of_every_group_are_checked_when_it_comes(settings, message):
    first, second = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    with pytest.raises(ValueError, match=message):
        RowSparseAdamW([{"params": [first]}, {"params": [second], **settings}])
    optimizer = RowSparseAdamW([first], row_state="factored")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [second], **settings})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0] |= settings
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    optimizer.add_param_group({"params": [second]})
    assert optimizer.param_groups[1]["row_state"] == "factored"


def test_state_of_torch_adamw_goes_on_with_dense_gradients_and_is_refused_for_rows():
    weight = nn.Parameter(torch.ones(6, 4))
    theirs = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(6, 4)
    theirs.step()
    again = nn.Parameter(weight.detach().clone())
    ours = RowSparseAdamW([again], row_state="bfloat16")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["row_state"] == "bfloat16"
    again.grad = torch.ones(6, 4)
    theirs.step()
    ours.step()
    assert torch.equal(weight, again)
    touch(again)
    with pytest.raises(ValueError, match="row-sparse gradient, and moments of dense ones"):
        ours.step()


NAN = torch.full((6, 4), float("nan"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg": torch.zeros(6, 3)}, r"exp_avg must have the shape \(6, 4\).*got \(6, 3\)"),
        ({"exp_avg": torch.zeros(5, 4)}, r"parameter 0, of shape \(6, 4\).*got \(5, 4\)"),
        ({"exp_avg_sq": torch.zeros(6, 1)}, r"exp_avg_sq must have the shape \(6, 4\) with row_state='float32'"),
        ({"last_step": torch.zeros(7, dtype=torch.int32)}, r"last_step must have the shape \(6,\)"),
        ({"last_step": torch.zeros(6)}, "last_step must have whole numbers; got torch.float32"),
        ({"last_step": torch.full((6,), 4)}, "last_step ranges from 4 to 4, but step is 3"),
        ({"last_step": torch.full((6,), -1)}, "last_step ranges from -1 to -1"),
        ({"exp_avg": torch.zeros(6, 4, dtype=torch.int64)}, "exp_avg must have floating-point numbers"),
        ({"exp_avg": torch.zeros(6, 4, dtype=torch.complex64)}, "exp_avg must have floating-point numbers"),
        ({"exp_avg": torch.zeros(6, 4).to_sparse()}, "must be a tensor with values"),
        ({"exp_avg": torch.zeros(6, 4, device="meta")}, "must be a tensor with values"),
        ({"exp_avg": [0.0]}, "exp_avg must be a tensor; got list"),
        ({"exp_avg": NAN}, "exp_avg has NaN"),
        ({"exp_avg_sq": -torch.ones(6, 4)}, "negative numbers"),  # the two moments' names swapped look like this
        ({"step": torch.tensor(1.5)}, "step must be a whole number from 0 to 2147483647; got 1.5"),
        ({"step": torch.tensor(float("nan"))}, "step must be a whole number"),
        ({"step": torch.ones(2)}, r"step must be a whole number from 0 to 2147483647; got shape \(2,\)"),
        ({"step": -1}, "got -1"),
        ({"step": "3"}, "got '3'"),
        ({"momentum": torch.zeros(6, 4)}, "has momentum beside last_step"),
        ({"exp_avg": {}}, "needs exp_avg, exp_avg_sq, step; got step, last_step, exp_avg_sq"),
    ],
)
def test_a_state_that_is_not_of_this_table_is_refused_and_changes_nothing(changes, message):
    _, optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    state["state"][0] |= changes
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg": torch.zeros(6, 4)}, "has exp_avg beside last_step with row_state='row'"),
        ({"exp_avg_sq": torch.ones(6, 4)}, r"exp_avg_sq must have the shape \(6, 1\) with row_state='row'"),
        ({"exp_avg_sq": -torch.ones(6, 1)}, "exp_avg_sq has NaN or negative numbers"),
        ({"exp_avg_sq": torch.full((6, 1), float("nan"))}, "exp_avg_sq has NaN or negative numbers"),
        ({"last_step": torch.full((6,), 4)}, "last_step ranges from 4 to 4, but step is 3"),
        ({"exp_avg_sq": {}}, "needs exp_avg_sq, step; got step, last_step"),
    ],
)
def test_a_state_of_one_scalar_per_row_is_checked_too(changes, message):
    _, optimizer = stepped(row_state="row")
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    state["state"][0] |= changes
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("row_state", ["float32", "factored", "row"])
def test_bytes_of_state_per_row_are_as_documented(row_state):
    table, optimizer = stepped((6, 256), row_state=row_state)
    num_bytes = sum(value.nbytes for value in optimizer.state[table].values() if value.dim()) / len(table)
    assert num_bytes == {"float32": 4 + 8 * 256, "factored": 4 + 2 * 256 + 4, "row": 4 + 4}[row_state]


def test_dense_state_of_another_shape_and_other_groups_are_refused_with_the_numbers():
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
    optimizer = RowSparseAdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    swapped = {**state, "state": {0: state["state"][1], 1: state["state"][0]}}
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(3,\): exp_avg must .* \(3,\); got \(5,\)"):
        optimizer.load_state_dict(swapped)
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, but this optimizer of \[1\]"):
        RowSparseAdamW(weights[:1]).load_state_dict(state)
    with pytest.raises(ValueError, match="needs state and param_groups; got nothing"):
        optimizer.load_state_dict({})


def test_memory_that_lies_apart_is_updated_as_memory_in_one_piece():
    pytest.importorskip("numba")
    table = nn.Parameter(torch.ones(4, 6).T)
    expected, _ = stepped((6, 4), 1)
    other = RowSparseAdamW([table], lr=0.1)
    touch(table)
    other.step()
    assert not table.is_contiguous()
    torch.testing.assert_close(table, expected, rtol=0, atol=0)


def arguments(**changes):
    given = {
        "table": torch.ones(6, 4),
        "exp_avg": torch.zeros(6, 4),
        "exp_avg_sq": torch.zeros(6, 4),
        "rows": ROWS,
        "gradients": torch.ones(2, 4),
        "catch_up": torch.ones(2, 4),
        "step": 1,
    }
    return given | changes


def products(**changes):
    parts = {
        "rows": ROWS,
        "starts": torch.tensor([0, 1, 3]),
        "weights": torch.ones(3),
        "token_ids": torch.tensor([0, 1, 0]),
        "tokens": torch.ones(2, 4),
    }
    return OuterProducts(**(parts | changes))


WRONG_ARGUMENTS = [
    ({"exp_avg": torch.zeros(5, 4)}, r"exp_avg has the shape \(5, 4\); the table and its rows need \(6, 4\)"),
    ({"exp_avg_sq": torch.zeros(6, 2)}, r"exp_avg_sq has the shape \(6, 2\)"),
    ({"exp_avg_sq": torch.zeros(5, 1)}, r"exp_avg_sq has the shape \(5, 1\)"),
    ({"rows": torch.tensor([1, 6])}, "rows must be from 0 to 5; got 1 to 6"),
    ({"rows": torch.tensor([-1, 3])}, "rows must be from 0 to 5; got -1 to 3"),
    ({"rows": torch.tensor([3, 3])}, "1 of 2 rows are repeated"),
    ({"rows": ROWS.int()}, "one-dimensional and int64"),
    ({"gradients": torch.ones(3, 4)}, r"gradients has the shape \(3, 4\)"),
    ({"gradients": torch.ones(2, 5)}, r"gradients has the shape \(2, 5\)"),
    ({"catch_up": torch.ones(1, 4)}, r"catch_up has the shape \(1, 4\)"),
    ({"exp_avg": None}, r"exp_avg_sq has the shape \(6, 4\); the table and its rows need \(6, 1\)"),
    ({"step": 0}, r"step \(0\) must be at least 1"),
    ({"table": torch.ones(24)}, "table must have two dimensions"),
    ({"gradients": products(starts=torch.tensor([0, 1]))}, r"starts has the shape \(2,\)"),
    ({"gradients": products(starts=torch.tensor([0, 9, 3]))}, "starts must rise from 0 to 3"),
    ({"gradients": products(starts=torch.tensor([0, 1, 9]))}, "starts must rise from 0 to 3"),
    ({"gradients": products(token_ids=torch.tensor([0, 1, 2]))}, "token_ids must be from 0 to 1; got 0 to 2"),
    ({"gradients": products(tokens=torch.ones(2, 3))}, r"tokens has the shape \(2, 3\)"),
]


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize(("changes", "message"), WRONG_ARGUMENTS)
def test_an_update_of_rows_that_are_not_there_writes_nothing(implementation, changes, message):
    given = arguments(**changes)
    if implementation == "cpu":
        pytest.importorskip("numba")
    update = backends_peer.ADAMW_ROWS_FUNCTIONS["cpu"] if implementation == "cpu" else adamw_rows_
    before = given["table"].clone()
    with pytest.raises(ValueError, match=message):
        update(**given, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert torch.equal(given["table"], before)


@pytest.mark.parametrize("name", ["table", "exp_avg", "gradients"])
def test_the_compiled_update_refuses_dtypes_that_it_would_misread(name):
    pytest.importorskip("numba")
    given = arguments()
    given[name] = given[name].half()
    with pytest.raises(
        ValueError, match=f"{name} must be torch.float32 or torch.bfloat16 on the CPU; got torch.float16"
    ):
        backends_peer.ADAMW_ROWS_FUNCTIONS["cpu"](**given, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def test_rows_in_any_order_are_updated():
    check_adamw_rows(**arguments(rows=torch.tensor([3, 1])))


FUZZ = """
import copy, random, sys
import torch
from torch import nn
from modeling_peer.training import RowSparseAdamW

random.seed(int(sys.argv[1]))
NAMES = ("step", "last_step", "exp_avg", "exp_avg_sq")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool)

def optimizer(rows, width, row_state):
    table = nn.Parameter(torch.zeros(rows, width))
    made = RowSparseAdamW([table], lr=0.1, row_state=row_state)
    step(table, made)
    return table, made

def step(table, made):
    rows = torch.arange(len(table))[None]
    table.grad = torch.sparse_coo_tensor(rows, torch.ones_like(table), table.shape, check_invariants=True)
    made.step()

def change(state):
    kind, name = random.choice("truncate widen dtype swap drop rename row_state".split()), random.choice(NAMES)
    of_table, group = state["state"][0], state["param_groups"][0]
    value = of_table.get(name)
    if kind == "row_state":
        group["row_state"] = random.choice(("float32", "bfloat16", "factored", "row"))
    elif value is None:
        return
    elif kind == "truncate" and value.dim():
        of_table[name] = value[: random.randrange(len(value))]
    elif kind == "widen":
        of_table[name] = value.new_zeros([random.choice((0, 1, size, size * 3)) for size in value.shape] or [2])
    elif kind == "dtype":
        of_table[name] = value.to(random.choice(DTYPES))
    elif kind == "swap":
        other = random.choice(NAMES)
        of_table[name], of_table[other] = of_table.get(other, value), value
    elif kind == "drop":
        del of_table[name]
    elif kind == "rename":
        of_table[name + "_"] = of_table.pop(name)

loaded = refused = 0
for _ in range(300):
    sizes = [(random.choice((1, 7, 256)), random.choice((1, 3, 16))) for _ in range(2)]
    states = random.choices(("float32", "bfloat16", "factored", "row"), k=2)
    (_, source), (table, made) = (optimizer(*size, state) for size, state in zip(sizes, states))
    if random.random() < 0.7:
        _, source = optimizer(*sizes[1], source.param_groups[0]["row_state"])
    state = copy.deepcopy(source.state_dict())
    for _ in range(random.randrange(3)):
        change(state)
    try:
        made.load_state_dict(state)
    except ValueError:
        refused += 1
        continue
    try:
        for _ in range(3):
            step(table, made)
    except ValueError as error:
        assert "moments of dense ones" in str(error), error
    loaded += 1
print(loaded, refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_state_that_loads_lets_a_step_leave_its_memory(seed):
    # in a process of its own: what this guards against ends one
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FUZZ, str(seed)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded, refused = map(int, run.stdout.split())
    assert loaded > 30
    assert refused > 100

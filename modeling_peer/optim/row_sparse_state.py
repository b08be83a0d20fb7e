# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""State of `RowSparseAdamW`: its tensors, checks of a saved state, and its creation before the first step."""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from modeling_peer.optim.row_sparse_gradients import local_rows, sharded_as

# dtypes of the first moment (None: there is none) and of the second, and whether the weights of a row share the second
ROW_STATES = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "factored": (torch.bfloat16, torch.float32, True),
    "row": (None, torch.float32, True),
}
MOMENTS = ("exp_avg", "exp_avg_sq")
LAST_STEP = "last_step"
MAX_STEP = 2**31 - 1  # last_step is int32
WAY_OUT = "Load the state that was saved with this model, or use a new optimizer."


def row_state_shapes(table: torch.Tensor, row_state: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each state tensor of a table of this shape, sharded or not."""
    mean_dtype, square_dtype, factored = ROW_STATES[row_state]
    if table.dtype == torch.float64 and row_state == "float32":
        mean_dtype = square_dtype = torch.float64
    num_rows, width = table.shape
    shapes = {LAST_STEP: ((num_rows,), torch.int32)}
    if mean_dtype is not None:
        shapes["exp_avg"] = ((num_rows, width), mean_dtype)
    return {**shapes, "exp_avg_sq": ((num_rows, 1 if factored else width), square_dtype)}


def has_first_moment(row_state: str) -> bool:
    """Whether this storage of the state has `exp_avg`."""
    return ROW_STATES[row_state][0] is not None


def new_row_state(table: torch.Tensor, row_state: str) -> dict[str, torch.Tensor]:
    """The state of a table before its first gradient.

    Returns:
        step: `()`, int64 on the CPU, whatever the default dtype and device, so that it counts every step.
        last_step: step in which a row was last touched, `(num_rows,)`.
        exp_avg, exp_avg_sq: `(num_rows, width)`. For "factored" and "row", exp_avg_sq is `(num_rows, 1)`. For "row"
        there is no exp_avg.
        All but step are sharded like `table`.
    """
    rows = local_rows(table)
    state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
    for name, (shape, dtype) in row_state_shapes(table, row_state).items():
        state[name] = sharded_as(table, rows.new_zeros(len(rows), *shape[1:], dtype=dtype))
    return state


def loaded_row_state(table: torch.Tensor, saved: dict[str, Any], row_state: str) -> dict[str, torch.Tensor]:
    """A checked state with the dtypes of `new_row_state`, on the device of `table`."""
    # The keys are the loaded string objects, because pickle writes each object once. With other objects, optimizer.pt
    # of a resumed run would not equal that of an uninterrupted run to the byte.
    names = {name: name for name in saved}
    state = {names["step"]: torch.tensor(int(saved["step"]), dtype=torch.int64, device="cpu")}
    for name, (_, dtype) in row_state_shapes(table, row_state).items():
        value = saved[name].to(device=table.device, dtype=dtype)
        # compiled loops read rows in sequence
        state[names[name]] = value if isinstance(value, DTensor) else value.contiguous()
    return state


def is_blank(state: dict[str, Any]) -> bool:
    """Whether a state is new: no step has used it."""
    return int(state["step"]) == 0


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's distributed checkpoint calls `step` only to create the state of a new optimizer.

    `torch.distributed.checkpoint.state_dict` gives every parameter a dense gradient of zeros, sets all learning rates
    to zero, and calls `step`. If it counted as a step, it would shift the bias corrections of all later steps.
    """
    if any(optimizer.state.values()) or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not all(p.grad is not None and p.grad.layout == torch.strided for p in parameters):
        return False
    return not any(local_rows(p.grad).any() for p in parameters)


def check_groups(current: list[dict], saved: list[dict]) -> None:
    """Raise ValueError unless there are as many saved groups as current ones, with the same numbers of parameters."""
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (current, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"loaded state dict has parameter groups of {saved_sizes} parameters, but this optimizer of {sizes}. "
            f"{WAY_OUT}"
        )


def check_state(index: int, parameter: torch.Tensor, state: Any, row_state: str) -> None:
    """Check the saved state of one parameter, before anything is changed.

    Args:
        index: index of the parameter among all of the optimizer, for the message.
        state: row-sparse if it has `last_step`, otherwise that of `torch.optim.AdamW`.

    Raises:
        ValueError: names, shapes or types are wrong, or numbers are impossible after any step.
    """
    place = f"state of parameter {index}, of shape {tuple(parameter.shape)}:"
    names = {"step", *MOMENTS}
    if isinstance(state, dict) and LAST_STEP in state:
        names = {"step", *MOMENTS} if has_first_moment(row_state) else {"step", "exp_avg_sq"}
    if not isinstance(state, dict) or not names <= state.keys():
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{place} needs {', '.join(sorted(names))}; got {found}. {WAY_OUT}")
    step = _checked_step(place, state["step"])
    if LAST_STEP in state:
        _check_row_state(place, parameter, state, step, row_state)
        return
    for name in (*MOMENTS, "max_exp_avg_sq"):
        if name in state:
            _check_tensor(place, name, state[name], parameter, tuple(parameter.shape))


def _check_row_state(place: str, table: torch.Tensor, state: dict, step: int, row_state: str) -> None:
    if table.dim() != 2:
        raise ValueError(f"{place} has last_step, which only a table of rows has. {WAY_OUT}")
    shapes, why = row_state_shapes(table, row_state), f" with row_state={row_state!r}"
    if unknown := state.keys() - {"step", *shapes}:
        found = ", ".join(map(str, sorted(unknown, key=str)))
        raise ValueError(f"{place} has {found} beside last_step{why}. {WAY_OUT}")
    for name, (shape, _) in shapes.items():
        _check_tensor(place, name, state[name], table, shape, is_floating_point=name != LAST_STEP, why=why)
    last_step, *means, square = (local_rows(state[name]) for name in shapes)
    if last_step.is_meta or not last_step.numel():
        return
    lowest, highest = (int(value) for value in last_step.aminmax())
    if lowest < 0 or highest > step:
        raise ValueError(f"{place} last_step ranges from {lowest} to {highest}, but step is {step}. {WAY_OUT}")
    if any(mean.isnan().any() for mean in means):
        raise ValueError(f"{place} exp_avg has NaN. {WAY_OUT}")
    if not (square >= 0).all():
        raise ValueError(f"{place} exp_avg_sq has NaN or negative numbers. {WAY_OUT}")


def _checked_step(place: str, value: Any) -> int:
    number = value
    if isinstance(value, torch.Tensor):
        number = value.item() if value.numel() == 1 and not value.is_meta else None
    is_count = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    if not is_count or number != int(number) or not 0 <= number <= MAX_STEP:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) and number is None else repr(number)
        raise ValueError(f"{place} step must be a whole number from 0 to {MAX_STEP}; got {shown}. {WAY_OUT}")
    return int(number)


def _check_tensor(
    place: str,
    name: str,
    value: Any,
    parameter: torch.Tensor,
    shape: tuple[int, ...],
    is_floating_point: bool | None = None,
    why: str = "",
) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{place} {name} must be a tensor; got {type(value).__name__}. {WAY_OUT}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{place} {name} must have the shape {shape}{why}; got {tuple(value.shape)}. {WAY_OUT}")
    if is_floating_point is None:
        return  # dense state: torch casts it to the parameter's dtype
    whole = not (value.is_complex() or value.is_floating_point() or value.dtype == torch.bool)
    if value.layout != torch.strided or (value.is_meta and not parameter.is_meta):
        raise ValueError(f"{place} {name} must be a tensor with values; got {value.layout}, {value.device}. {WAY_OUT}")
    if is_floating_point != value.is_floating_point() or not (whole or is_floating_point):
        kind = "floating-point" if is_floating_point else "whole"
        raise ValueError(f"{place} {name} must have {kind} numbers; got {value.dtype}. {WAY_OUT}")
    if isinstance(parameter, DTensor):
        if not isinstance(value, DTensor) or len(local_rows(value)) != len(local_rows(parameter)):
            raise ValueError(
                f"{place} {name} must be sharded like the parameter. Save and load it with "
                "torch.distributed.checkpoint."
            )
    elif isinstance(value, DTensor):
        raise ValueError(
            f"{place} {name} is sharded over processes, but the parameter is not. Save it with full_state_dict=True, "
            "or load it with torch.distributed.checkpoint."
        )

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW whose step on an expert table has the cost of the touched rows only."""

import math

import torch

from modeling_peer.backends_peer import ADAMW_ROWS_FUNCTIONS, choose
from modeling_peer.kernels.lazy_gradients import OuterProducts
from modeling_peer.kernels.optimizer_arguments import check_adamw_rows
from modeling_peer.optim.row_sparse_gradients import is_row_sparse, local_rows, touched_rows
from modeling_peer.optim.row_sparse_state import (
    LAST_STEP,
    ROW_STATES,
    asks_for_state,
    check_groups,
    check_state,
    has_first_moment,
    is_blank,
    loaded_row_state,
    new_row_state,
)

# Settings of torch.optim.AdamW that a loaded group may have. Row updates would ignore them.
UNSUPPORTED = ("amsgrad", "maximize", "differentiable")


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW that accepts row-sparse gradients (`PeerConfig.row_sparse_gradients`) as well as dense ones.

    Dense gradients go to `torch.optim.AdamW`. A row-sparse gradient changes only the rows it contains. A row that was
    not retrieved for some steps is brought up to date when it is next touched. Its moments and weights then decay as
    often as under AdamW, and its weights move as far as the first moment would have moved them. That uses the current
    learning rate, and the bias corrections of the first skipped step. One difference from AdamW remains: the token
    that retrieves the row reads it before this update. Steps that touch every row equal AdamW's.

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; `lr` is per step. `betas[0]` must be less
            than the square root of `betas[1]`, otherwise the movement per skipped step would grow. With row_state
            "row" it need not.
        row_state: storage of the moments of a table; the rest of the state is 4 bytes per row.
            `"float32"`: 8 bytes per weight (float64 for float64 tables).
            `"bfloat16"`: 4 bytes per weight. The second moment is rounded stochastically. Rounding to nearest would
            lose all changes by a factor of 1 - beta2 = 0.001, because they are less than half of bfloat16's spacing.
            `"factored"`: 2 bytes per weight and 4 per row. The weights of a row share one second moment, the mean of
            squares over the row (in float32). The first moment is bfloat16, rounded to nearest. It averages about ten
            steps, too few for errors to add up. The weights of a row cannot share it, because it is the direction of
            each weight.
            `"row"`: 4 bytes per row, the second moment of `"factored"`. There is no first moment, so the step is
            AdamW's with `betas[0] = 0`: the gradient over the root of the row's mean square. A skipped step multiplies
            the weights by `1 - lr * weight_decay` and the second moment by `betas[1]`, and nothing else. `betas[0]`
            applies to dense gradients alone. A row with a gradient once in many steps moves by up to
            `1 / sqrt(1 - betas[1])` learning rates (32 by default) at once. AdamW moves it as far, over ten or so.

    State is created when a table is first touched. It keeps its dtype through `load_state_dict`, which first checks
    names, shapes and numbers. `torch.distributed.checkpoint` needs a state before the first step. For a group with
    `row_sparse=True` (`parameter_groups` of a model with row-sparse gradients) that state is row-sparse.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, row_state="float32"):
        if row_state not in ROW_STATES:
            raise ValueError(f"row_state must be one of {', '.join(ROW_STATES)}; got {row_state!r}.")
        self._row_state = row_state  # torch adds groups before it sets the defaults
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["row_state"] = row_state
        del self._row_state

    def add_param_group(self, param_group):
        """As in any optimizer. A group may have its own `row_state`, and `row_sparse`.

        Raises:
            ValueError: the group has settings that row updates do not support.
        """
        if isinstance(param_group, dict):
            row_state = self.defaults.get("row_state", getattr(self, "_row_state", "float32"))
            param_group = {"row_state": row_state, **param_group}
            _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if asks_for_state(self):
            self._make_state()
            return loss
        row_sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._is_row_sparse(parameter)
        ]
        for _, parameter, _ in row_sparse:
            parameter.grad = None
        try:
            self._step_dense()
        finally:
            for _, parameter, gradient in row_sparse:
                parameter.grad = gradient
        for group, parameter, gradient in row_sparse:
            self._step_rows(group, parameter, *touched_rows(gradient))
        return loss

    def _step_dense(self):
        # torch wraps the `step` of every class that has instances, to run hooks. Ours already run around this step.
        dense_step = torch.optim.AdamW.step
        dense_step = dense_step.__wrapped__ if getattr(dense_step, "hooked", False) else dense_step
        dense_step(self)

    def _make_state(self):
        """Create the state before the first step: row-sparse if the group is, otherwise AdamW's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if group.get("row_sparse") and parameter.requires_grad and parameter.dim() == 2:
                    self.state[parameter] = new_row_state(parameter, group["row_state"])
                    parameter.grad = None
        self._step_dense()
        for state in self.state.values():
            state["step"].zero_()

    def _is_row_sparse(self, parameter):
        state, is_sparse = self.state.get(parameter), is_row_sparse(parameter.grad)
        if state and is_sparse != (LAST_STEP in state):
            if is_blank(state):
                self.state[parameter] = {}
                return is_sparse
            now, before = ("row-sparse", "dense") if is_sparse else ("dense", "row-sparse")
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} has a {now} gradient, and moments of {before} ones. "
                f"Continue with {before} gradients (PeerConfig.row_sparse_gradients), or use a new optimizer. If "
                "torch.distributed.checkpoint loaded the state before the first step, the group of tables must have "
                "row_sparse=True, as in parameter_groups of a model with row-sparse gradients."
            )
        return is_sparse

    def _step_rows(self, group, table, rows, gradients):
        state = self.state[table]
        if not state:
            if not len(rows) and local_rows(table) is table:  # if sharded, other ranks may have rows
                return
            state.update(new_row_state(table, group["row_state"]))
        state["step"] += 1
        step, lr = int(state["step"]), float(group["lr"])
        last_step = local_rows(state["last_step"])
        skipped_steps = step - 1 - last_step[rows]
        last_step[rows] = step
        # without a first moment, the step is that of beta1 = 0
        betas = group["betas"] if has_first_moment(group["row_state"]) else (0.0, group["betas"][1])
        options = {"lr": lr, "betas": betas, "weight_decay": group["weight_decay"]}
        rows_here = local_rows(table)
        update = choose(ADAMW_ROWS_FUNCTIONS, None, adamw_rows_, rows_here)
        update(
            rows_here,
            local_rows(state["exp_avg"]) if "exp_avg" in state else None,
            local_rows(state["exp_avg_sq"]),
            rows,
            gradients,
            catch_up_factors(skipped_steps, step, **options),
            step=step,
            eps=group["eps"],
            **options,
        )

    def load_state_dict(self, state_dict):
        """As in any optimizer, but moments of tables keep their dtype. torch would cast them to the parameter's.

        Raises:
            ValueError: the saved state does not belong to these parameters. The optimizer is then unchanged.
        """
        loaded = {}

        def check(_, state_dict):  # after all hooks that change the loaded state
            if not {"state", "param_groups"} <= state_dict.keys():
                found = ", ".join(map(str, state_dict)) or "nothing"
                raise ValueError(f"loaded state dict needs state and param_groups; got {found}.")
            state_dict = {**state_dict, "state": _without_absent(state_dict["state"])}
            state_dict["param_groups"] = self._checked_groups(state_dict["param_groups"])
            saved_ids = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            for index, ((saved_id, group), parameter) in enumerate(zip(saved_ids, parameters, strict=True)):
                if state := state_dict["state"].get(saved_id):
                    check_state(index, parameter, state, group["row_state"])
                    if LAST_STEP in state:  # torch would cast it to the parameter's dtype
                        loaded[parameter] = (state_dict["state"].pop(saved_id), group["row_state"])
            return state_dict

        def restore(_):  # before all hooks that read the loaded state
            for parameter, (state, row_state) in loaded.items():
                self.state[parameter] = loaded_row_state(parameter, state, row_state)

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked_groups(self, saved: list[dict]) -> list[dict]:
        """The saved groups. If they are of `torch.optim.AdamW`, our own settings are added."""
        check_groups(self.param_groups, saved)
        ours = ("row_state", "row_sparse")
        groups = [
            # after the saved settings: a resumed run's optimizer.pt then equals an uninterrupted run's to the byte
            {**saved_group, **{name: group[name] for name in ours if name in group and name not in saved_group}}
            for group, saved_group in zip(self.param_groups, saved, strict=True)
        ]
        for group in groups:
            if missing := {"lr", "betas", "eps", "weight_decay"} - group.keys():
                raise ValueError(f"loaded parameter group has no {', '.join(sorted(missing))}, so it is not of AdamW.")
            _check_settings(group)
        return groups


def _check_settings(group: dict) -> None:
    row_state = group["row_state"]
    if row_state not in ROW_STATES:
        raise ValueError(f"row_state must be one of {', '.join(ROW_STATES)}; got {row_state!r}.")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    for position, beta in enumerate((beta1, beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{position}] ({beta}) must be at least 0 and less than 1.")
    if has_first_moment(row_state) and beta1 >= math.sqrt(beta2):
        raise ValueError(f"betas[0] ({beta1}) must be less than the square root of betas[1] ({math.sqrt(beta2):.4g}).")
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"RowSparseAdamW does not support {name}={group[name]}. Leave it out of the group.")


def _without_absent(state: dict) -> dict:
    """Drop `{}`: torch's flattened distributed checkpoints use it for state of a parameter that was not saved."""
    return {
        i: {name: value for name, value in parameter_state.items() if not isinstance(value, dict) or value}
        if isinstance(parameter_state, dict)
        else parameter_state
        for i, parameter_state in state.items()
    }


def catch_up_factors(
    skipped_steps: torch.Tensor, step: int, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.Tensor:
    """The effect of AdamW on rows in the steps that skipped them, with a gradient of zero.

    After s such steps the moments are `beta1**s * mean` and `beta2**s * square`. The weights are multiplied by
    `(1 - lr * decay)**s`. In the i-th of those steps they also move by
    `lr * mean / sqrt(square) * (beta1 / sqrt(beta2))**i`, a geometric series.

    Args:
        skipped_steps: `(num_touched,)`, steps between a row's last touch (or the start) and this step.
        step: number of this step.

    Returns:
        `(num_touched, 4)` float32: factors of the weights, of `mean / sqrt(square)`, of `mean` and of `square`.
    """
    if step < len(skipped_steps):  # powers for each possible number instead of each row take a third of the time
        numbers = torch.arange(step, device=skipped_steps.device)
        return catch_up_factors(numbers, step, lr, betas, weight_decay)[skipped_steps.long()]
    beta1, beta2 = betas
    skipped_steps = skipped_steps.double()
    first = (step - skipped_steps).clamp(max=step - 1).clamp(min=1)  # number of the first skipped step
    ratio = beta1 / math.sqrt(beta2)
    movement = ratio * (1 - ratio**skipped_steps) / (1 - ratio)
    corrections = (1 - beta2**first).sqrt() / (1 - beta1**first)
    factors = [
        (1 - lr * weight_decay) ** skipped_steps,
        -lr * movement * corrections,
        beta1**skipped_steps,
        beta2**skipped_steps,
    ]
    return torch.stack(factors, dim=1).float()


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor | None,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor | OuterProducts,
    catch_up: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; arXiv:1711.05101) of some rows, in place.

    Args:
        table, exp_avg: `(num_rows, width)`. Without exp_avg (None) the step is that of `betas[0] = 0`.
        exp_avg_sq: the same shape, or `(num_rows, 1)` for the mean over the row. Without exp_avg only the latter.
        rows: `(num_touched,)`, int64, each at most once.
        gradients: `(num_touched, width)`, computed or still as `OuterProducts`.
        catch_up: `(num_touched, 4)`, the result of `catch_up_factors`.
        step: number of this step; the first is 1.

    Raises:
        ValueError: shapes do not fit together; on the CPU also if rows are outside the table or given twice.
    """
    check_adamw_rows(table, exp_avg, exp_avg_sq, rows, gradients, catch_up, step)
    beta1, beta2 = betas
    dtype = torch.promote_types(table.dtype, torch.float32)
    if isinstance(gradients, OuterProducts):
        gradients = gradients.values(dtype)
    gradients, catch_up = gradients.to(dtype), catch_up.to(dtype).unsqueeze(-1)
    weights, square = table[rows].to(dtype) * catch_up[:, 0], exp_avg_sq[rows].to(dtype)
    if exp_avg is None:
        beta1, mean = 0.0, gradients
    else:
        mean = exp_avg[rows].to(dtype)
        weights += catch_up[:, 1] * mean / (square.sqrt() + eps)
        mean = (mean * catch_up[:, 2]).lerp_(gradients, 1 - beta1)
        exp_avg[rows] = mean.to(exp_avg.dtype)
    squared_gradients = gradients * gradients
    if exp_avg_sq.shape[1] == 1:
        squared_gradients = squared_gradients.mean(-1, keepdim=True)
    square = (square * catch_up[:, 3]).mul_(beta2).add_(squared_gradients, alpha=1 - beta2)
    by_chance = exp_avg_sq.dtype == torch.bfloat16
    exp_avg_sq[rows] = round_by_chance(square, rows, step) if by_chance else square.to(exp_avg_sq.dtype)
    scale = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weights.mul_(1 - lr * weight_decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
    table[rows] = weights.to(table.dtype)


def round_by_chance(values: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    """Round float32 `values` `(num_touched, width)` to bfloat16 stochastically, so that the expectation is preserved.

    The random number is a hash of row, column and step. So there is no generator state to save, and all processes
    agree.
    """
    columns = torch.arange(values.shape[1], device=rows.device)
    noise = rows.unsqueeze(1) * 0x9E3779B1 + columns * 0xC2B2AE3D + step * 0x85EBCA77 & 0xFFFFFFFF
    noise = (noise ^ noise >> 16) * 0x7FEB352D & 0xFFFFFFFF
    noise = (noise ^ noise >> 15) * 0x846CA68B & 0xFFFFFFFF
    bits = values.float().view(torch.int32) + (noise >> 16).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)

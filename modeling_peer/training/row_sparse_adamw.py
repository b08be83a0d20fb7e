# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW whose step on an expert table costs what the touched rows cost."""

import math

import torch

from modeling_peer.backends_peer import ADAMW_ROWS_FUNCTIONS, choose
from modeling_peer.kernels.lazy_gradients import OuterProducts
from modeling_peer.training.row_sparse_gradients import local_rows, sharded_as, touched_rows

# dtypes of the first and of the second moment, and whether a row shares one second moment
ROW_STATES = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "factored": (torch.bfloat16, torch.float32, True),
}


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW that takes row-sparse gradients (`PeerConfig.row_sparse_gradients`) beside dense ones.

    Dense gradients go to `torch.optim.AdamW`. Of a parameter with a row-sparse gradient only the rows in it change. A
    row that sleeps for some steps is caught up when it is next touched: moments and weights decay as often as AdamW
    would have let them, and the weights go as far as the first moment would have carried them meanwhile (with today's
    learning rate, and the bias corrections of the first step slept). What remains of AdamW is that a token reads the
    row before that. Steps that touch every row are AdamW's.

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; `lr` is per step. `betas[0]` must be less
            than the root of `betas[1]`, or a sleeping row would move faster and faster.
        row_state: how the two moments of a table are kept, the rest of the state being 4 bytes a row.
            `"float32"`: 8 bytes a weight (float64 for float64 tables).
            `"bfloat16"`: 4 bytes a weight. The second moment is rounded up or down by chance: of steps by 1 - beta2 =
            0.001 rounding to the nearest would lose all, being less than half of bfloat16's spacing.
            `"factored"`: 2 bytes a weight and 4 a row, whose weights share one second moment, the mean of squares over
            the row (in float32). The first moment is bfloat16, rounded to the nearest: it forgets within ten steps,
            before errors add up, and a row can't share it, since it says where each weight goes.

    State is made when a table is first touched, and keeps its dtype through `load_state_dict`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, row_state="float32"):
        if row_state not in ROW_STATES:
            raise ValueError(f"row_state={row_state!r} is none of {', '.join(ROW_STATES)}.")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["row_state"] = row_state
        for group in self.param_groups:
            group.setdefault("row_state", row_state)
            beta1, beta2 = group["betas"]
            if beta1 >= math.sqrt(beta2):
                raise ValueError(
                    f"betas[0] ({beta1}) must be less than the root of betas[1] ({math.sqrt(beta2):.4g})."
                )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        row_sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._is_row_sparse(parameter)
        ]
        for _, parameter, _ in row_sparse:
            parameter.grad = None
        # torch wraps the `step` of every class that has instances, to run hooks: ours run around this step already
        dense_step = torch.optim.AdamW.step
        dense_step = dense_step.__wrapped__ if getattr(dense_step, "hooked", False) else dense_step
        try:
            dense_step(self)
        finally:
            for _, parameter, gradient in row_sparse:
                parameter.grad = gradient
        for group, parameter, gradient in row_sparse:
            self._step_rows(group, parameter, *touched_rows(gradient))
        return loss

    def _is_row_sparse(self, parameter):
        state = self.state.get(parameter)
        if state and parameter.grad.is_sparse != ("last_step" in state):
            now, before = ("row-sparse", "dense") if parameter.grad.is_sparse else ("dense", "row-sparse")
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} has a {now} gradient, and moments of {before} ones. "
                f"Go on with {before} gradients (PeerConfig.row_sparse_gradients), or begin with a new optimizer."
            )
        return parameter.grad.is_sparse

    def _step_rows(self, group, table, rows, gradients):
        state = self.state[table]
        if not state:
            if not len(rows) and local_rows(table) is table:  # else other ranks' rows may have been touched: count
                return
            state.update(_new_state(table, group["row_state"]))
        state["step"] += 1
        step, lr = int(state["step"]), float(group["lr"])
        last_step = local_rows(state["last_step"])
        slept = step - 1 - last_step[rows]
        last_step[rows] = step
        options = {"lr": lr, "betas": group["betas"], "weight_decay": group["weight_decay"]}
        rows_here = local_rows(table)
        update = choose(ADAMW_ROWS_FUNCTIONS, None, adamw_rows_, rows_here)
        update(
            rows_here,
            local_rows(state["exp_avg"]),
            local_rows(state["exp_avg_sq"]),
            rows,
            gradients,
            sleep_factors(slept, step, **options),
            step=step,
            eps=group["eps"],
            **options,
        )

    def load_state_dict(self, state_dict):
        """As of any optimizer; torch gives all state the parameter's dtype, here moments of tables keep theirs."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if "last_step" in saved:
                self.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in saved.items()
                }


def _new_state(table: torch.Tensor, row_state: str) -> dict[str, torch.Tensor]:
    mean_dtype, square_dtype, factored = ROW_STATES[row_state]
    if table.dtype == torch.float64 and row_state == "float32":
        mean_dtype = square_dtype = torch.float64
    rows = local_rows(table)
    by_row = {
        "last_step": rows.new_zeros(len(rows), dtype=torch.int32),
        "exp_avg": torch.zeros_like(rows, dtype=mean_dtype),
        "exp_avg_sq": rows.new_zeros(len(rows), 1 if factored else rows.shape[1], dtype=square_dtype),
    }
    return {
        "step": torch.tensor(0.0, device="cpu"),
        **{name: sharded_as(table, state) for name, state in by_row.items()},
    }


def sleep_factors(
    slept: torch.Tensor, step: int, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.Tensor:
    """What AdamW would have done to rows in the steps that they slept, their gradient being zero.

    After s such steps the moments are `beta1**s * mean` and `beta2**s * square`, the weights `(1 - lr * decay)**s` of
    what they were; and in the i-th of them they went on by `lr * mean / sqrt(square) * (beta1 / sqrt(beta2))**i`, a
    geometric series.

    Args:
        slept: `(num_touched,)`, steps since a row was last touched, or ever, and before this one.
        step: number of this step.

    Returns:
        `(num_touched, 4)` float32: factors of the weights, of `mean / sqrt(square)`, of `mean` and of `square`.
    """
    if step < len(slept):  # powers of each possible number, rather than of each row's: a third of the time
        return sleep_factors(torch.arange(step, device=slept.device), step, lr, betas, weight_decay)[slept.long()]
    beta1, beta2 = betas
    slept = slept.double()
    first = (step - slept).clamp(max=step - 1).clamp(min=1)  # of the steps slept
    ratio = beta1 / math.sqrt(beta2)
    travelled = ratio * (1 - ratio**slept) / (1 - ratio)
    corrections = (1 - beta2**first).sqrt() / (1 - beta1**first)
    factors = [(1 - lr * weight_decay) ** slept, -lr * travelled * corrections, beta1**slept, beta2**slept]
    return torch.stack(factors, dim=1).float()


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor | OuterProducts,
    asleep: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; arXiv:1711.05101) of some rows, in place.

    Args:
        table, exp_avg: `(num_rows, width)`.
        exp_avg_sq: the same shape, or `(num_rows, 1)`: the mean over the row.
        rows: `(num_touched,)`, int64, each at most once.
        gradients: `(num_touched, width)`, multiplied out or not yet.
        asleep: `(num_touched, 4)`, `sleep_factors`.
        step: number of this step, the first is 1.
    """
    beta1, beta2 = betas
    dtype = torch.promote_types(table.dtype, torch.float32)
    if isinstance(gradients, OuterProducts):
        gradients = gradients.values(dtype)
    gradients, asleep = gradients.to(dtype), asleep.to(dtype).unsqueeze(-1)
    weights, mean, square = table[rows].to(dtype), exp_avg[rows].to(dtype), exp_avg_sq[rows].to(dtype)
    weights = weights * asleep[:, 0] + asleep[:, 1] * mean / (square.sqrt() + eps)
    squared_gradients = gradients * gradients
    if exp_avg_sq.shape[1] == 1:
        squared_gradients = squared_gradients.mean(-1, keepdim=True)
    mean = (mean * asleep[:, 2]).lerp_(gradients, 1 - beta1)
    square = (square * asleep[:, 3]).mul_(beta2).add_(squared_gradients, alpha=1 - beta2)
    exp_avg[rows] = mean.to(exp_avg.dtype)
    exp_avg_sq[rows] = round_by_chance(square, rows, step) if exp_avg_sq.dtype == torch.bfloat16 else square
    scale = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weights.mul_(1 - lr * weight_decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
    table[rows] = weights.to(table.dtype)


def round_by_chance(values: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    """float32 `values` `(num_touched, width)` as bfloat16, rounded up with the probability that keeps the mean.

    The chance is a hash of row, column and step: no generator has a state to be saved, and all processes agree.
    """
    columns = torch.arange(values.shape[1], device=rows.device)
    noise = rows.unsqueeze(1) * 0x9E3779B1 + columns * 0xC2B2AE3D + step * 0x85EBCA77 & 0xFFFFFFFF
    noise = (noise ^ noise >> 16) * 0x7FEB352D & 0xFFFFFFFF
    noise = (noise ^ noise >> 15) * 0x846CA68B & 0xFFFFFFFF
    bits = values.float().view(torch.int32) + (noise >> 16).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""AdamW whose step on an expert table costs what the touched rows cost."""

import math

import torch

from modeling_peer.backends_peer import ADAMW_ROWS_FUNCTIONS, choose


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW that takes row-sparse gradients (`PeerConfig.row_sparse_gradients`) beside dense ones.

    Dense gradients go to `torch.optim.AdamW`. Of a parameter with a row-sparse gradient only the rows in it change,
    moments and weight decay included; bias is corrected with the number of steps so far. A step that touches every row
    is AdamW's. A row that is not touched keeps its moments where AdamW would let them decay and move it on ("lazy",
    as in `torch.optim.SparseAdam`).

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; `lr` is per step.

    Moments are dense, float32 (float64 for float64 tables), made when the first gradient arrives.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

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
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for _, parameter, _ in row_sparse:
            parameter.grad = None
        try:
            super().step()
        finally:
            for _, parameter, gradient in row_sparse:
                parameter.grad = gradient
        for group, parameter, gradient in row_sparse:
            self._step_rows(group, parameter, *_rows_and_values(_local(gradient)))
        return loss

    def _step_rows(self, group, table, rows, gradients):
        state = self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)
            dtype = torch.promote_types(table.dtype, torch.float32)
            state["exp_avg"] = torch.zeros_like(table, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(table, dtype=dtype)
        state["step"] += 1
        update = choose(ADAMW_ROWS_FUNCTIONS, None, adamw_rows_, table)
        update(
            _local(table),
            _local(state["exp_avg"]),
            _local(state["exp_avg_sq"]),
            rows,
            gradients,
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that is sharded over processes (`DTensor.to_local` refuses sparse ones)."""
    return getattr(tensor, "_local_tensor", tensor)


def _rows_and_values(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a row-sparse gradient, each once, and their values."""
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"A gradient of shape {tuple(gradient.shape)} is sparse in {gradient.sparse_dim()} dimensions: "
            "RowSparseAdamW takes gradients that are sparse in rows only."
        )
    # Autograd forgets that a gradient is coalesced, and sorting it again would cost as much as the step.
    rows = gradient._indices()[0]
    if not gradient.is_coalesced() and not (rows[1:] > rows[:-1]).all():
        gradient = gradient.coalesce()
    return gradient._indices()[0], gradient._values()


def adamw_rows_(
    table: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; arXiv:1711.05101) of some rows, in place.

    Args:
        table, exp_avg, exp_avg_sq: `(num_rows, width)`; the moments float32.
        rows: `(num_touched,)`, int64, each at most once.
        gradients: `(num_touched, width)`.
        step: number of this step, the first is 1.
    """
    beta1, beta2 = betas
    gradients = gradients.to(exp_avg.dtype)
    mean = exp_avg[rows].lerp_(gradients, 1 - beta1)
    square = exp_avg_sq[rows].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    exp_avg[rows], exp_avg_sq[rows] = mean, square
    scale = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weights = table[rows].to(exp_avg.dtype).mul_(1 - lr * weight_decay)
    table[rows] = weights.addcdiv_(mean, scale, value=-lr / (1 - beta1**step)).to(table.dtype)

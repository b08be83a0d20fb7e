# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training of some experts only: the rows of all others stay as they are, bit by bit.

    with train_only_experts(model, {1: [17, 42]}):
        trainer.train()
    save_patch("base", model, "fine-tune.safetensors")

Few rows change, so little is forgotten (Lin et al. 2025, arXiv:2510.15103), and the result is a small patch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from modeling_peer.adaptation.expert_pools import layers_by_tables, plain_tables
from modeling_peer.analysis.routing_hooks import checked_experts, find_routed_layer
from modeling_peer.kernels.lazy_gradients import LazyRowGradient, OuterProducts
from modeling_peer.optim.row_sparse_gradients import coalesced, is_row_sparse, lazy_products
from modeling_peer.quantised_tables_peer import refuse_overlays


def train_only_experts(
    model: nn.Module,
    experts: Mapping[int | str, Sequence[int] | torch.Tensor],
    freeze_others: bool = True,
) -> "TrainedExperts":
    """Restrict training of the expert tables to the rows of some experts, until the result is closed.

    Gradients of the other rows are dropped after each backward. A row-sparse gradient then has the chosen rows only,
    and `RowSparseAdamW` touches no other. Of a dense gradient, optimizers also move rows whose gradient is zero, by
    weight decay and by moments. So all other rows are written back after each step of an optimizer of torch: that
    takes a copy of the tables.

    Args:
        model: a model with float tables in memory, on one device. Call this before `parameter_groups`, which leaves
            frozen parameters out.
        experts: ids of the experts to train, by number or name of a layer. Layers that are not named train no expert.
            Layers that share tables train the experts of all of them.
        freeze_others: also freeze everything else. Running statistics do not learn beside a frozen query network.

    Returns:
        A context manager. `close()`, or the end of the block, ends the restriction.

    Raises:
        ValueError: no such layer or expert, none is chosen, or tables are quantised, mapped, adapted, sharded or
            offloaded.
    """
    refuse_overlays(model, "training would change")
    chosen: dict[str, torch.Tensor] = {}
    for key, expert_ids in experts.items():
        layer = find_routed_layer(model, key)
        chosen[layer.name] = checked_experts(layer, expert_ids)
    masks: dict[nn.Parameter, torch.Tensor] = {}
    for layers in layers_by_tables(model):
        pool, tables = layers[0].experts, plain_tables(layers[0])
        if pool.scales():
            raise ValueError(f"{layers[0].name}: its tables are quantised and do not train. Load the float model.")
        if pool.mapped_tables is not None and pool.mapped_tables.only_mapped:
            raise ValueError(
                f"{layers[0].name}: its tables are read from their file and do not train. Load the model without "
                'table_placement="mapped".'
            )
        mask = torch.zeros(len(tables[1]), dtype=torch.bool, device=tables[1].device)
        for layer in layers:
            rows = pool.rows_of(chosen.get(layer.name, torch.empty(0, dtype=torch.int64)).to(mask.device))
            mask[rows[rows >= 0]] = True
        masks |= {table: mask for table in tables if table is not None}
    if not any(mask.any() for mask in masks.values()):
        raise ValueError("no expert is chosen that has a row: nothing would be trained.")
    return TrainedExperts(model, masks, freeze_others)


class TrainedExperts:
    """The restriction that `train_only_experts` makes.

    Args:
        masks: of each table, which rows are trained: `(num_rows,)`, boolean.
    """

    def __init__(self, model: nn.Module, masks: dict[nn.Parameter, torch.Tensor], freeze_others: bool):
        self._masks, self._frozen_rows = masks, {}
        self._trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for parameter in self._trained:
            if parameter in masks:
                parameter.requires_grad_(bool(masks[parameter].any()))
            elif freeze_others:
                parameter.requires_grad_(False)
        self._hooks = [
            table.register_post_accumulate_grad_hook(self._restrict) for table in masks if table.requires_grad
        ]
        self._hooks.append(register_optimizer_step_post_hook(self._write_back))

    @property
    def num_rows(self) -> int:
        """Rows that are trained, of all tables."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    def close(self) -> None:
        """End the restriction: everything trains that did before."""
        for hook in self._hooks:
            hook.remove()
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)
        self._hooks, self._trained, self._frozen_rows = [], {}, {}

    def __enter__(self) -> "TrainedExperts":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _restrict(self, table: nn.Parameter) -> None:
        mask = self._masks[table]
        if is_row_sparse(table.grad):
            table.grad = _chosen_rows(table, mask)
            return
        table.grad.masked_fill_(~mask.unsqueeze(1), 0)
        if table not in self._frozen_rows:  # before the first step with a dense gradient
            self._frozen_rows[table] = table.detach()[~mask]

    @torch.no_grad()
    def _write_back(self, optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for table in group["params"]:
                if table in self._frozen_rows:
                    table[~self._masks[table]] = self._frozen_rows[table]


def _chosen_rows(table: nn.Parameter, mask: torch.Tensor) -> torch.Tensor:
    """The rows of a row-sparse gradient that are trained. It stays products if it is products."""
    products = lazy_products(table.grad)
    if products is not None:
        return LazyRowGradient.of([_chosen_products(products, mask)], table)
    gradient = coalesced(table.grad)
    rows = gradient._indices()[0]
    kept = mask[rows]
    return torch.sparse_coo_tensor(
        rows[kept].unsqueeze(0),
        gradient._values()[kept],
        gradient.shape,
        device=table.device,
        is_coalesced=True,
        check_invariants=False,
    )


def _chosen_products(products: OuterProducts, mask: torch.Tensor) -> OuterProducts:
    kept, numbers = mask[products.rows], products.starts.diff()
    of_kept = kept.repeat_interleave(numbers)
    starts = torch.cat([products.starts[:1] * 0, numbers[kept].cumsum(0)])
    return OuterProducts(
        products.rows[kept], starts, products.weights[of_kept], products.token_ids[of_kept], products.tokens
    )

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Slices: models that keep the rows of some experts only. The others are still retrieved, and add nothing.

    importance = record_importance(model, batches)
    slice_experts(model, most_important(model, importance, num_kept=4096))
    model.save_pretrained("slice")

Retrieval stays as it is, and gates are not normalised again: what is left out is the small outputs of experts that the
text hardly used. A slice loads, trains and is quantised like any PEER checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from modeling_peer.adaptation.expert_pools import layers_by_tables, plain_tables
from modeling_peer.analysis.expert_importance import ExpertImportance
from modeling_peer.analysis.routing_hooks import RoutedLayer, checked_experts, find_routed_layer
from modeling_peer.quantised_tables_peer import refuse_overlays, renew_ties


def most_important(
    model: nn.Module, importance: Sequence[ExpertImportance], num_kept: int, measure: str = "output"
) -> dict[str, torch.Tensor]:
    """The experts to keep in each layer: those with the largest importance.

    Layers that share their tables keep the same experts, by the sum of their importances.

    Args:
        importance: result of `record_importance` of this model or of the whole one that it is a slice of.
        num_kept: experts to keep in each layer.
        measure: one of `expert_importance.MEASURES`.

    Returns:
        Sorted ids, `(num_kept,)`, int64, by the name of the layer.

    Raises:
        ValueError: `num_kept` exceeds the experts that there are, or the measure is unknown.
    """
    values = {entry.name: entry.by(measure) for entry in importance}
    kept: dict[str, torch.Tensor] = {}
    for layers in layers_by_tables(model):
        total = sum(values[layer.name] for layer in layers)
        rows = getattr(layers[0].experts, "row_of_expert", None)
        if rows is not None:  # experts that are gone cannot be kept
            total = total.masked_fill(rows.cpu() < 0, -1.0)
        num_present = layers[0].experts.num_rows
        if not 1 <= num_kept <= num_present:
            raise ValueError(f"{layers[0].name} has {num_present:,} experts, so 1 to {num_present:,} can be kept.")
        chosen = total.topk(num_kept).indices.sort().values
        kept |= {layer.name: chosen for layer in layers}
    return kept


@torch.no_grad()
def slice_experts(model: nn.Module, kept: Mapping[int | str, Sequence[int] | torch.Tensor]) -> nn.Module:
    """Keep the rows of some experts of each layer, in place. An optimizer of the old tables must be made anew.

    Args:
        model: a PEER model or layer, with plain or quantised tables, on one device. It may be a slice already.
        kept: ids of the experts to keep, by number or name of each layer with experts; equally many in each.

    Returns:
        `model`, whose configuration now has `num_kept_experts`.

    Raises:
        ValueError: a layer is missing or unknown, an expert does not exist or was not kept by an earlier slice, layers
            keep different numbers of experts or share tables and keep different ones, or tables are adapted, sharded
            or offloaded. Nothing has changed then.
    """
    refuse_overlays(model, "a slice would keep")
    if getattr(getattr(model, "config", None), "grown_pools", None):
        raise ValueError(
            "grown_pools: the pools of one layer have different experts, so a model with grown pools is not sliced. "
            "`peer quantise` makes it smaller."
        )
    groups = layers_by_tables(model)
    chosen = {}
    for key, expert_ids in kept.items():
        layer = find_routed_layer(model, key)
        chosen[layer.name] = checked_experts(layer, expert_ids).unique()
    num_kept = _check(groups, chosen)
    for layers in groups:
        pool = layers[0].experts
        ids = chosen[layers[0].name]
        row_of_expert = torch.full((layers[0].num_experts,), -1, dtype=torch.int32, device=pool.up_embed.device)
        row_of_expert[ids.to(row_of_expert.device)] = torch.arange(num_kept, dtype=torch.int32).to(row_of_expert)
        rows = pool.rows_of(ids.to(pool.up_embed.device))
        tables = {name: _rows(table, rows) for name, table in pool._parameters.items() if table is not None}
        for layer in layers:
            for name, table in tables.items():
                layer.experts.register_parameter(name, table)
            layer.experts.row_of_expert = row_of_expert.clone()
            layer.experts.num_rows, layer.experts.mapped_tables = num_kept, None
    configs = [layer.experts.config for layers in groups for layer in layers] + [getattr(model, "config", None)]
    for config in configs:
        if hasattr(config, "num_kept_experts"):
            config.num_kept_experts = num_kept
    renew_ties(model)
    return model


@torch.no_grad()
def scale_expert_rows(
    model: nn.Module, layer: int | str, expert_ids: Sequence[int] | torch.Tensor, factor: float = 0.0
) -> nn.Module:
    """Multiply the outputs of some experts for good, by their rows of `up_embed`; 0 switches them off.

    `routing_hooks.scale_experts` does the same until a block ends.

    Args:
        layer: the number of the decoder layer, or its name. Layers that share its tables change with it.
        expert_ids: experts of that layer; those that a slice does not keep are skipped.
        factor: any finite number.

    Returns:
        `model`.

    Raises:
        ValueError: no such layer or expert, a factor that is not finite, or tables that are adapted, sharded or
            offloaded.
    """
    found = find_routed_layer(model, layer)
    chosen = checked_experts(found, expert_ids)
    if not math.isfinite(factor):
        raise ValueError(f"factor ({factor}) must be finite.")
    refuse_overlays(model, "this would scale")
    layers_by_tables(model)  # refuses whole MLPs
    plain_tables(found)
    pool = found.experts
    rows = pool.rows_of(chosen.to(pool.up_embed.device)).unique()
    # of a quantised row, its scale
    table = pool.scales().get("up_scale", pool.up_embed)
    table[rows[rows >= 0]] *= factor
    return model


def _rows(table: nn.Parameter, rows: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(table.detach()[rows.to(table.device)].clone(), requires_grad=table.requires_grad)


def _check(groups: list[list[RoutedLayer]], chosen: dict[str, torch.Tensor]) -> int:
    """The number of experts that each layer keeps, after the checks of `slice_experts`."""
    names = [layer.name for layers in groups for layer in layers]
    if missing := [name for name in names if name not in chosen]:
        raise ValueError(f"kept has no entry for {', '.join(missing)}. Each layer with experts needs one.")
    sizes = {name: len(chosen[name]) for name in names}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        raise ValueError(f"layers must keep equally many experts, at least 1; got {sizes}.")
    for layers in groups:
        for layer in layers:
            gone = chosen[layer.name][layer.experts.rows_of(chosen[layer.name].to(layer.experts.up_embed.device)) < 0]
            if len(gone):
                raise ValueError(f"{layer.name}: an earlier slice did not keep {gone[:5].tolist()}.")
            if not torch.equal(chosen[layer.name], chosen[layers[0].name]):
                raise ValueError(f"{layer.name} shares the tables of {layers[0].name} and must keep the same experts.")
            plain_tables(layer)
    return next(iter(sizes.values()))

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The pools of experts of a model, and whether their tables can be changed."""

import torch
from torch import nn

from modeling_peer.analysis.routing_hooks import RoutedLayer, find_routed_layers


def layers_by_tables(model: nn.Module) -> list[list[RoutedLayer]]:
    """The routed layers, those that share their tables together."""
    groups: dict[int, list[RoutedLayer]] = {}
    for layer in find_routed_layers(model):
        if not layer.has_single_neurons:
            raise ValueError(f"{layer.name}: experts are whole MLPs. This is for pools of single neurons.")
        if not hasattr(layer.experts, "rows_of"):
            raise ValueError(
                f"{layer.name}: the model runs its checkpoint's own code, which is older than this function. Load it "
                "without trust_remote_code, after `import modeling_peer`."
            )
        table = layer.experts._parameters.get("up_embed")
        groups.setdefault(id(layer.experts) if table is None else id(table), []).append(layer)
    return list(groups.values())


def plain_tables(layer: RoutedLayer) -> tuple[torch.Tensor | None, ...]:
    """`down_embed`, `up_embed` and `gate_embed` of a pool, plain or quantised.

    Raises:
        ValueError: they are adapted, sharded or offloaded.
    """
    # PEFT's target_parameters wraps the pool, and replaces tables only while it runs
    tables = None if layer.path.endswith(".base_layer") else layer.experts.tables()
    kinds = {type(table).__name__ for table in tables or () if table is not None} - {"Parameter"}
    if tables is None or kinds or tables[1].is_meta:
        kind = "adapted" if tables is None else f"a {min(kinds)}" if kinds else "offloaded"
        raise ValueError(
            f"{layer.name}: its tables are {kind}. Merge adapters, and load the model on one device, without sharding "
            "or offloading."
        )
    return tables

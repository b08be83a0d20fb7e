# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Growth: a second pool of experts beside the first one of PEER layers, with retrieval heads of its own.

    grow(model, num_sub_keys=128)
    model.train_only_newest_pool()
    ...                                   # any training loop, or Trainer
    model.save_pretrained("grown")

The new writers are zero, so the logits stay as they were until the pool is trained. New experts could also share the
old heads, by more sub-keys. Then they would take places and gates from old ones.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from modeling_peer.adaptation.expert_pools import layers_by_tables, plain_tables
from modeling_peer.console.errors import nearest
from modeling_peer.grown_pools_peer import POOL_FIELDS, PoolConfig
from modeling_peer.quantised_tables_peer import refuse_overlays


@torch.no_grad()
def grow(model: PreTrainedModel, layers: Iterable[int] | None = None, **fields: Any) -> PreTrainedModel:
    """Add a pool of experts beside those of PEER layers, in place. It may be called again for another pool.

    Args:
        model: a PEER model with float tables, whole and not adapted or sharded.
        layers: numbers of the decoder layers that get a pool each; unset, all PEER layers.
        fields: of the new pools: `num_sub_keys`, `num_retrieval_heads`, `num_experts_per_head`, `query_dim`,
            `query_norm`. Unset, those of the model.

    Returns:
        `model`, whose configuration has one more entry in `grown_pools`.

    Raises:
        ValueError: the model is of another kind, a slice or quantised, there is no such layer or field, or sizes do
            not fit together. Nothing has changed then.
    """
    for name in fields:
        if name not in POOL_FIELDS:
            known = nearest(name, POOL_FIELDS) or f" Known: {', '.join(POOL_FIELDS)}."
            raise ValueError(f"{name!r} is no field of a grown pool.{known}")
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "peer":
        raise ValueError(f"{type(model).__name__} is not a PEER model. `peer retrofit` makes one of a dense model.")
    if not hasattr(type(model), "train_only_newest_pool"):
        raise ValueError(
            "the model runs its checkpoint's own code, which is older than growth. Load it without trust_remote_code, "
            "after `import modeling_peer`."
        )
    if config.expert_table_format is not None:
        raise ValueError(
            f"expert_table_format={config.expert_table_format!r}: a new pool would be quantised too, and would not "
            "train. Grow the float model, and quantise it afterwards."
        )
    refuse_overlays(model, "a new pool would be trained beside")
    for same in layers_by_tables(model):
        plain_tables(same[0])
    sparse = [number for number, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    chosen = sparse if layers is None else sorted(set(layers))
    entry = {"layers": chosen, **{name: fields.get(name, getattr(config, name)) for name in POOL_FIELDS}}
    grown = copy.deepcopy(config)
    try:
        grown.grown_pools = [*(config.grown_pools or ()), entry]
        grown.validate_architecture()
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    config.grown_pools = grown.grown_pools
    for number in chosen:
        layer = model.base_model.layers[number]
        table = layer.mlp.experts.up_embed
        device = model.device if table.device.type == "cpu" else table.device
        pool = type(layer.mlp)(PoolConfig(config, entry)).to(device, table.dtype).train(model.training)
        if layer.grown_pools is None:
            layer.grown_pools = nn.ModuleList()
        layer.grown_pools.append(pool)
    return model

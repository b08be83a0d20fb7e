# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Names of the files of a checkpoint, as Transformers reads them, and of the files of expert tables."""

import re
from collections.abc import Callable

CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"


def weights_stem(variant: str | None = None) -> str:
    """How the names of a variant's weight files begin (`variant` as in `save_pretrained`)."""
    return f"model.{variant}" if variant else "model"


def index_name(variant: str | None = None) -> str:
    """Name of the file that says which tensor is in which file."""
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def expert_tables_stem(layer: int, beside: str | None = None, variant: str | None = None) -> str:
    """How the names of the files of one layer's expert tables begin.

    Args:
        beside: module of a pool that stands beside the layer's own, as `"grown_pools.0"` or `"hashed_memory"`.
    """
    pool = "" if beside is None else "-" + beside.replace("grown_pools.", "grown-").replace("_", "-")
    return f"{weights_stem(variant)}-layer-{layer:03d}{pool}-experts"


def is_weight_file(variant: str | None = None) -> Callable[[str], re.Match | None]:
    """A function of a file's name: whether the file holds weights of a model in this variant."""
    stem, pool = re.escape(weights_stem(variant)), r"-layer-\d{3,}(-grown-\d+|-hashed-memory)?-experts"
    return re.compile(rf"{stem}({pool})?(-\d{{5}}-of-\d{{5}})?\.safetensors").fullmatch

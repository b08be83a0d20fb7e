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


def expert_tables_stem(layer: int, grown: int | None = None, variant: str | None = None) -> str:
    """How the names of the files of one layer's expert tables begin, or of those of a grown pool beside it."""
    pool = "" if grown is None else f"-grown-{grown}"
    return f"{weights_stem(variant)}-layer-{layer:03d}{pool}-experts"


def is_weight_file(variant: str | None = None) -> Callable[[str], re.Match | None]:
    """A function of a file's name: whether the file holds weights of a model in this variant."""
    stem = re.escape(weights_stem(variant))
    return re.compile(rf"{stem}(-layer-\d{{3,}}(-grown-\d+)?-experts)?(-\d{{5}}-of-\d{{5}})?\.safetensors").fullmatch

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantise the expert tables of a checkpoint, for `peer quantise`."""

import time
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedModel

import modeling_peer
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.names import locate_model
from modeling_peer.console.tables import as_markdown
from modeling_peer.hub.loading import LOADING_ERRORS, cause_of, own_model_class
from modeling_peer.hub.saving import other_folder, save_with_tokenizer
from modeling_peer.quantised_tables_peer import expert_pools
from modeling_peer.row_formats_peer import TABLE_FORMATS


@dataclass
class QuantisationArguments:
    """Which checkpoint, which format, and where to save."""

    model: str | None = field(default=None, metadata={"help": "PEER checkpoint: a folder or a Hub id."})
    format: str = field(
        default="int8",
        metadata={"help": "How rows of the expert tables are stored: int8, int4 or float8_e4m3, with a scale each."},
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the quantised checkpoint and its tokenizer; not that of the model."},
    )

    def __post_init__(self):
        if self.format not in TABLE_FORMATS:
            known = ", ".join(TABLE_FORMATS)
            raise SettingsError(
                f"--format must be one of {known}; got {self.format!r}.{nearest(self.format, TABLE_FORMATS)}"
            )


def quantise_checkpoint(arguments: QuantisationArguments) -> dict[str, Any]:
    """Load a checkpoint, quantise its tables one by one, and save it with its tokenizer, all or nothing.

    Raises:
        SettingsError: there is no such checkpoint, it has no expert tables or quantised ones, or the output folder is
            missing or that of the model.
    """
    started = time.perf_counter()
    for name in ("model", "output_dir"):
        if not getattr(arguments, name):
            raise SettingsError(f"--{name} is missing.")
    source = locate_model(arguments.model, trained=True)
    output_dir = other_folder(arguments.output_dir, source, "the float tables cannot be restored from quantised ones")
    model = _load(source, arguments.model)
    before = _sizes(model)
    try:
        modeling_peer.quantise_expert_tables(model, arguments.format)
    except ValueError as error:
        raise SettingsError(f"cannot quantise {arguments.model!r}: {error}") from error
    after = _sizes(model)
    save_with_tokenizer(model, source, output_dir)
    rows = [
        {"MiB": part, "before": f"{before[part] / 2**20:,.1f}", "after": f"{after[part] / 2**20:,.1f}"}
        for part in before
    ]
    print(as_markdown(rows))
    return {
        "model": arguments.model,
        "output_dir": str(output_dir),
        "format": arguments.format,
        "bytes_before": before,
        "bytes_after": after,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _load(source: str, name: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise SettingsError(f"cannot load {name!r}: {cause_of(error)}") from error
    if config.model_type != "peer":
        raise SettingsError(f"{name!r} has model_type {config.model_type!r}: only PEER models have expert tables.")
    if config.expert_table_format is not None:
        raise SettingsError(
            f"{name!r} is quantised already ({config.expert_table_format}). Quantise the float model: another "
            "rounding would add its error to the first."
        )
    model_class = own_model_class(config, name, "quantise_expert_tables(model, ...)")
    try:
        return model_class.from_pretrained(source, config=config)
    except LOADING_ERRORS as error:
        raise SettingsError(f"cannot load {name!r}: {cause_of(error)}") from error


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the expert tables with their scales, and of all weights. What is shared counts once."""
    tables = {
        id(table): table.nbytes
        for pool in expert_pools(model).values()
        for table in (*pool.tables(), *pool.scales().values())
        if table is not None
    }
    return {"expert tables": sum(tables.values()), "all weights": sum(one.nbytes for one in model.parameters())}

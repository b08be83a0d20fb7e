# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantise the expert tables of a checkpoint, for `peer quantise`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

import modeling_peer
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.names import locate_model
from modeling_peer.console.tables import as_markdown
from modeling_peer.hub.loading import LOADING_ERRORS, cause_of, open_tokenizer
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
    class_name = (config.architectures or ["PeerForCausalLM"])[0]
    model_class = getattr(modeling_peer, class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise SettingsError(
            f"{name!r} is a {class_name}, which modeling_peer does not have. Load it, and call "
            "quantise_expert_tables(model, ...) and save_pretrained."
        )
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


def other_folder(name: str, source: str, reason: str) -> Path:
    """The folder `name`, which must not be that of the model.

    Raises:
        SettingsError: it is; `reason` says why that is no choice.
    """
    folder = Path(name).expanduser()
    if Path(source).is_dir() and folder.resolve() == Path(source).resolve():
        raise SettingsError(f"--output_dir {name} is the folder of the model. Give another one: {reason}.")
    return folder


def save_with_tokenizer(model: PreTrainedModel, source: str, output_dir: Path) -> None:
    """Save a model, and the tokenizer of `source` if it has one.

    Raises:
        SettingsError: the folder cannot be written to.
    """
    try:
        model.save_pretrained(output_dir)
        try:
            tokenizer = open_tokenizer(source, trust_remote_code=False)
        except SettingsError as error:
            print(f"no tokenizer was copied: {error}")
            return
        tokenizer.save_pretrained(output_dir)
    except OSError as error:
        raise SettingsError(f"cannot save to --output_dir {output_dir}: {error}") from error

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantised expert tables: how modules hold them, and how the tables of a model are quantised.

The format is a field of the configuration, `expert_table_format`, and not one of Transformers' quantisation methods.
Transformers skips a `quantization_config` of a method it does not know, with a warning: without this package's
registration, integers would be loaded as weights. And its registration raises when it runs twice, as it does when the
package and a checkpoint's own code are both imported. Quantisers of others stay free for the dense part of the model.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

from .checksums_peer import read_header
from .parallel_peer import draw_rows_
from .row_formats_peer import TABLE_FORMATS, format_of, quantise_rows, row_chunks, row_width, stored_width
from .row_overlay_peer import RowOverlay

SCALE_NAMES = {"down_embed": "down_scale", "up_embed": "up_scale", "gate_embed": "gate_scale"}
_NAMES = (*SCALE_NAMES, *SCALE_NAMES.values())
# Names of dtypes in the header of a safetensors file.
_STORED_AS = {"I8": "int8", "U8": "int4", "F8_E4M3": "float8_e4m3"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class QuantisableTables(nn.Module):
    """A module with a `config` whose expert tables are floats or, with `expert_table_format`, quantised.

    Beside a quantised table `down_embed` stands `down_scale`, `(num_expert_rows,)` in float32, with the scales of its
    rows. Both are frozen, and keep their dtypes when the model is cast.
    """

    overlay: RowOverlay | None = None

    def register_table(self, name: str, exists: bool):
        """Register the table `name`, and its scale if it has one; as None if it does not exist."""
        config, table, scale = self.config, None, None
        table_format = config.expert_table_format
        if exists:
            dtype = None if table_format is None else TABLE_FORMATS[table_format].dtype
            table = torch.empty(config.num_expert_rows, stored_width(config.hidden_size, table_format), dtype=dtype)
            table = nn.Parameter(table, requires_grad=table_format is None)
        if exists and table_format is not None:
            scale = nn.Parameter(torch.empty(config.num_expert_rows, dtype=torch.float32), requires_grad=False)
        self.register_parameter(name, table)
        self.register_parameter(SCALE_NAMES[name], scale)

    def draw_table(self, name: str, std: float):
        """Draw the rows of a table from a normal distribution; quantised ones chunk by chunk."""
        table, scale = self._parameters[name], self._parameters[SCALE_NAMES[name]]
        if scale is None:
            draw_rows_(table, std=std)
            return
        if getattr(table, "_is_hf_initialized", False):
            if not getattr(scale, "_is_hf_initialized", False):
                raise ValueError(
                    f"{name} was loaded without the scales of its rows, and expert_table_format="
                    f"{self.config.expert_table_format!r} needs them. Load the checkpoint with its own configuration. "
                    "To quantise the tables of a float one: `peer quantise`, or quantise_expert_tables(model, ...)."
                )
            return
        if table.is_meta:
            return
        rows, scales = (one.to_local() if hasattr(one, "placements") else one.data for one in (table, scale))
        with torch.no_grad():
            for chunk in row_chunks(rows):
                drawn = torch.empty(len(rows[chunk]), row_width(rows), dtype=torch.float32, device=rows.device)
                rows[chunk], scales[chunk] = quantise_rows(drawn.normal_(std=std), format_of(table))

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales of quantised tables by name, as registered; empty if the tables are not quantised."""
        if self._parameters.get("up_scale") is None:  # which every quantised pool has; this runs for each token
            return {}
        found = {name: self._parameters.get(name) for name in SCALE_NAMES.values()}
        return {name: scale for name, scale in found.items() if scale is not None}

    def frozen_tables(self) -> list[torch.Tensor]:
        """Quantised tables and their scales, as registered; empty if the tables are not quantised."""
        return [self._parameters[name] for name in _NAMES if self._parameters.get(name) is not None and self.scales()]

    def tables_to_quantise(self, table_format: str) -> dict[str, nn.Parameter]:
        """The tables by name, after a check that they can be quantised (`quantise_expert_tables`)."""
        if self.config.expert_table_format is not None or self.scales():
            raise ValueError(
                f"The expert tables are quantised already ({format_of(self.up_embed)}). Quantise the float model: "
                "another rounding would add its error to the first."
            )
        per_element = TABLE_FORMATS[table_format].numbers_per_element
        if self.config.hidden_size % per_element:
            raise ValueError(
                f"expert_table_format={table_format!r} packs two numbers into a byte, so the width of a row "
                f"({self.config.hidden_size}) must be even. Use 'int8'."
            )
        tables = {name: self._parameters.get(name) for name in SCALE_NAMES if getattr(self, name) is not None}
        for name, table in tables.items():
            if type(table) is not nn.Parameter or table.is_meta:
                kind = "adapted" if table is None else "on meta" if table.is_meta else f"a {type(table).__name__}"
                raise ValueError(
                    f"{name} is {kind}: only plain tables in memory can be quantised. Merge adapters, and load the "
                    "model on one device, without sharding or offloading."
                )
        return tables

    def quantise_tables(
        self,
        table_format: str,
        quantised: dict[int, tuple[nn.Parameter, nn.Parameter]],
        step: Callable[[int], None] = lambda num_rows: None,
    ):
        """Replace the tables by quantised ones. `quantised` has those of tables that layers share, by `id`."""
        for name, scale_name in SCALE_NAMES.items():
            table = self._parameters[name]
            if table is None:
                continue
            if id(table) not in quantised:
                quantised[id(table)] = quantise_table(table, table_format, step)
            self._parameters[name], self._parameters[scale_name] = quantised[id(table)]

    def register_parameter(self, name: str, param: nn.Parameter | None):
        # Transformers makes parameters that train of all floating-point tensors it loads: scales, and rows of float8.
        if param is not None and name in _NAMES and self.config.expert_table_format is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad and self.config.expert_table_format is not None:
            self._refuse_training()
        return super().requires_grad_(requires_grad)

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` and `.to(dtype)` call this. Float tables, and the activation's parameters, are cast.
        if self.config.expert_table_format is None:
            return super()._apply(fn, recurse)

        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(keep_dtype, recurse=False)

    def check_quantised_tables(self):
        """Raise ValueError if quantised tables are adapted, or are to be trained."""
        if is_parametrized(self):
            raise ValueError(
                f"expert_table_format={self.config.expert_table_format!r}: an adapter of expert tables "
                "(target_parameters) adds its update to the table, and a quantised one takes none. Adapt other "
                "weights (target_modules), or the float model."
            )
        if torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in map(self._parameters.get, _NAMES)
        ):
            self._refuse_training()

    def _refuse_training(self):
        raise ValueError(
            f"expert_table_format={self.config.expert_table_format!r}: quantised expert tables do not train. Train "
            "the other parameters and leave the tables frozen (requires_grad=False), or train the float model and "
            "quantise it afterwards."
        )


def expert_pools(model: nn.Module) -> dict[str, QuantisableTables]:
    """The modules of `model` that hold expert tables, by name.

    By a method, because modules of a checkpoint's own code are of another class. On the type, because a wrapper (PEFT)
    forwards attributes.
    """
    return {name: module for name, module in model.named_modules() if hasattr(type(module), "quantise_tables")}


def refuse_overlays(model: nn.Module, action: str) -> None:
    """Raise ValueError if rows of a pool are replaced by an overlay, which `action` would leave out."""
    for name, pool in expert_pools(model).items():
        if getattr(pool, "overlay", None) is not None:
            raise ValueError(
                f"{name or 'The pool'}: a patch is applied as an overlay, and {action} the tables without it. Remove "
                "it (remove_patch), or load the float checkpoint into memory and apply the patch there."
            )


@torch.no_grad()
def quantise_expert_tables(model: nn.Module, table_format: str) -> nn.Module:
    """Quantise the expert tables of a model in place, one after the other.

    Besides the model, memory holds the quantised table and a chunk of rows. The other parameters stay as they are. The
    tables cannot be trained any more; everything else can.

    Args:
        model: a PEER model or layer with float tables, on one device.
        table_format: `"int8"`, `"int4"` or `"float8_e4m3"`.

    Returns:
        `model`, whose configuration now has `expert_table_format`.

    Raises:
        ValueError: it has no expert tables, they are quantised already, sharded, offloaded or adapted, or a row is not
            finite. Nothing has changed then.
    """
    if table_format not in TABLE_FORMATS:
        raise ValueError(f"expert_table_format={table_format!r} is unknown. Known: {', '.join(TABLE_FORMATS)}.")
    refuse_overlays(model, "quantising would round")
    pools = expert_pools(model)
    if not pools:
        raise ValueError(
            f"{type(model).__name__} has no expert tables to quantise: only sparse layers with product keys have them "
            '(sparse_mlp "peer" and "product_key_memory").'
        )
    tables = {}  # those that layers share once
    for name, pool in pools.items():
        if name.endswith(".base_layer"):  # PEFT wraps the pool, and replaces tables only while it runs
            raise ValueError(
                f"{name}: an adapter of expert tables (target_parameters) is on it. Merge adapters first."
            )
        for table_name, table in pool.tables_to_quantise(table_format).items():
            tables.setdefault(id(table), (f"{name}.{table_name}".lstrip("."), table))
    for name, table in tables.values():
        _check_finite(name, table)
    quantised: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    num_rows = sum(len(table) for _, table in tables.values())
    with logging.tqdm(total=num_rows, desc=f"Quantising tables to {table_format}", unit=" rows") as bar:
        tables.clear()  # so that each is freed once it is replaced
        for pool in pools.values():
            pool.quantise_tables(table_format, quantised, bar.update)
    for config in [
        *{id(pool.config): pool.config for pool in pools.values()}.values(),
        getattr(model, "config", None),
    ]:
        if hasattr(config, "expert_table_format"):
            config.expert_table_format = table_format
    renew_ties(model)
    return model


def quantise_table(
    table: torch.Tensor, table_format: str, step: Callable[[int], None]
) -> tuple[nn.Parameter, nn.Parameter]:
    """Rows and scales of a table `(num_peer_experts, hidden_size)` as frozen parameters.

    `step` is called with the number of rows after each chunk.
    """
    dtype = TABLE_FORMATS[table_format].dtype
    width = stored_width(table.shape[1], table_format)
    rows = torch.empty(len(table), width, dtype=dtype, device=table.device)
    scales = torch.empty(len(table), dtype=torch.float32, device=table.device)
    for chunk in row_chunks(table):
        rows[chunk], scales[chunk] = quantise_rows(table[chunk], table_format)
        step(len(scales[chunk]))
    return nn.Parameter(rows, requires_grad=False), nn.Parameter(scales, requires_grad=False)


def _check_finite(name: str, table: torch.Tensor) -> None:
    for chunk in row_chunks(table):
        finite = table[chunk].to(torch.float32).isfinite().all(-1)
        if not finite.all():
            row = chunk.start + int(finite.logical_not().nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has values that are not finite in float32, so it has no scale. Repair the model "
                "first; nothing was quantised."
            )


def renew_ties(model: nn.Module) -> None:
    """Let tables that layers share be saved once, with their scales."""
    for module in model.modules():
        if hasattr(type(module), "_shared_tables"):
            module._tied_weights_keys = module._shared_tables()
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def refuse_other_format(files: Iterable[Path], table_format: str | None) -> None:
    """Raise ValueError if weight files hold expert tables of another format than the configuration says.

    Transformers would cast one to the other: integers to weights, or weights to zeros. Other dtypes than those that a
    table or its scales can have are refused too.

    Args:
        files: safetensors files.
    """
    for file in files:
        for name, tensor in read_header(file)[0].items():
            if ".experts." not in f".{name}":
                continue
            kind = name.rpartition("_")[2]
            allowed = {"embed": (*_FLOATS, *_STORED_AS), "scale": ("F32",)}.get(kind, (tensor.dtype,))
            if tensor.dtype not in allowed:
                raise ValueError(
                    f"{name} in {file.name} has the dtype {tensor.dtype}, which must be one of {', '.join(allowed)}. "
                    "Save or copy the checkpoint again."
                )
            if kind == "embed":
                stored = _STORED_AS.get(tensor.dtype)
                if stored != table_format:
                    raise ValueError(
                        f"{name} in {file.name} is stored with expert_table_format={stored!r}, and the "
                        f"configuration has {table_format!r}. Load the checkpoint with its own "
                        "configuration. To quantise the tables of a float one: `peer quantise`, or "
                        "quantise_expert_tables(model, ...)."
                    )

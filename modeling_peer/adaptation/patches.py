# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Patches: a fine-tune that touched few rows, as a small file beside its base.

    save_patch("base", "tuned", "fine-tune.safetensors")
    applied = apply_patch(model, "fine-tune.safetensors")       # model is the base, loaded
    remove_patch(model, applied)

Base and patch make the tuned model, and removing the patch makes the base, both bit by bit. Tables that are mapped
from their file or quantised are not written to: the patch becomes an overlay (`row_overlay_peer`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from modeling_peer.adaptation.checkpoint_differences import (
    LoadedTensors,
    StoredTensors,
    check_same_architecture,
    differences,
    name_in,
    tensors_of,
)
from modeling_peer.adaptation.patch_files import (
    AS_STORED,
    Base,
    Patch,
    PatchedTensor,
    open_patch,
    sum_of_checksums,
    write_patch,
)
from modeling_peer.experts_peer import TABLE_NAMES
from modeling_peer.quantised_tables_peer import expert_pools
from modeling_peer.row_formats_peer import dequantise_rows, format_of
from modeling_peer.row_overlay_peer import RowOverlay

OTHER_TENSORS = ("refuse", "store")
_STACK = "_applied_patches"


@dataclass(eq=False)
class AppliedPatch:
    """A patch in a model, with what it replaced.

    Args:
        patch: the file's name.
        base: the checkpoint that it belongs to.
        replaced: row ids (None: the whole tensor) and the earlier rows, by the tensor's name in the model.
        overlays: the pools that got an overlay, each with its earlier one.
    """

    patch: str
    base: Base
    replaced: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)
    overlays: list[tuple[nn.Module, RowOverlay | None]] = field(default_factory=list)


@torch.no_grad()
def save_patch(
    base: str | os.PathLike,
    tuned: str | os.PathLike | nn.Module,
    file: str | os.PathLike,
    other_tensors: str = "refuse",
    revision: str | None = None,
) -> Patch:
    """Store the rows of the expert tables that differ in any bit.

    Checkpoints are read tensor by tensor and chunk by chunk. Memory holds two chunks and the changed rows of one
    tensor.

    Args:
        base: the checkpoint that was fine-tuned: a folder, or a Hub id that was downloaded.
        tuned: the fine-tuned checkpoint, likewise, or the model itself. Its dtypes must be those of the base.
        file: the patch, `*.safetensors`. It is replaced whole or not at all.
        other_tensors: what to do if a tensor other than an expert table differs. `"refuse"`: raise. `"store"`: store
            its rows if it has two dimensions, and else the whole.
        revision: of `base` on the Hub.

    Returns:
        The patch, read again.

    Raises:
        OSError: a checkpoint is damaged.
        ValueError: nothing differs, other tensors differ, or the two are not of the same architecture, dtype and
            slice.
    """
    if other_tensors not in OTHER_TENSORS:
        raise ValueError(f"other_tensors must be one of {', '.join(OTHER_TENSORS)}; got {other_tensors!r}.")
    before = StoredTensors(base, revision)
    after = LoadedTensors(tuned, before.shapes) if isinstance(tuned, nn.Module) else StoredTensors(tuned)
    check_same_architecture(before, after)
    write_patch(file, Base.of(base, revision), differences(before, after, other_tensors))
    return open_patch(file)


@torch.no_grad()
def apply_patch(model: nn.Module, file: str | os.PathLike) -> AppliedPatch:
    """Apply a patch to its base, in place. Patches stack: of a row that several have, the last one counts.

    The base is recognised by the checksums in its files. They are not read whole. A quantised base, and a model that
    was not loaded from files with checksums, are recognised by the rows that the patch replaces.

    Args:
        model: the base, loaded in its own dtype. Mapped (`table_placement="mapped"`) and quantised tables stay as they
            are and get an overlay. Such a model is neither trained nor saved until the patch is removed.

    Returns:
        What `remove_patch` needs. It holds the rows that were replaced.

    Raises:
        OSError: the file does not exist or is damaged.
        ValueError: the patch belongs to another base, a tensor is missing or has another shape or dtype, or tables are
            adapted, sharded or offloaded. Nothing has changed then.
    """
    patch = open_patch(file)
    tensors = tensors_of(model)
    pools = expert_pools(model)
    names = {}
    for key, one in patch.tensors.items():
        names[key] = _checked_name(model, tensors, pools, patch, key, one)
    _check_base(model, tensors, pools, patch, names)
    applied = AppliedPatch(patch.file.name, patch.base)
    overlays: dict[int, dict[str, PatchedTensor]] = {}
    for key, one in patch.tensors.items():
        path, _, attribute = names[key].rpartition(".")
        pool = pools.get(path)
        if pool is not None and attribute in TABLE_NAMES and _needs_overlay(pool):
            overlays.setdefault(id(tensors[f"{path}.up_embed"]), {})[attribute] = one
            continue
        tensor = tensors[names[key]]
        if one.row_ids is None:
            applied.replaced[names[key]] = (None, tensor.detach().clone())
            tensor.copy_(one.rows)
        else:
            ids = one.row_ids.to(tensor.device)
            applied.replaced[names[key]] = (ids, tensor.detach()[ids])
            tensor.index_copy_(0, ids, one.rows.to(tensor.device))
    made: dict[tuple[int, int], RowOverlay] = {}  # layers that share tables share their overlay
    for pool in pools.values():
        table = pool._parameters.get("up_embed")
        if (found := overlays.get(id(table))) is not None:
            applied.overlays.append((pool, pool.overlay))
            place = (id(table), id(pool.overlay))
            if place not in made:
                made[place] = _overlay(pool, found)
            pool.overlay = made[place]
    model.__dict__.setdefault(_STACK, []).append(applied)
    return applied


@torch.no_grad()
def remove_patch(model: nn.Module, applied: AppliedPatch | None = None) -> None:
    """Undo `apply_patch`: rows and tensors are again what they were before it, bit by bit.

    Args:
        applied: the patch that was applied last, which is the default.

    Raises:
        ValueError: no patch is applied, or this one is not the last.
    """
    stack = model.__dict__.get(_STACK, [])
    if not stack or (applied is not None and applied not in stack):
        what = "no patch is" if not stack else f"{applied.patch} is not"
        raise ValueError(f"{what} applied to this {type(model).__name__}.")
    if applied is not None and stack[-1] is not applied:
        later = ", ".join(one.patch for one in reversed(stack[stack.index(applied) + 1 :]))
        raise ValueError(
            f"{applied.patch} is not the patch that was applied last. Remove {later} first, in this order."
        )
    applied = stack.pop()
    tensors = tensors_of(model)
    for name, (row_ids, rows) in applied.replaced.items():
        tensor = tensors[name]
        if row_ids is None:
            tensor.copy_(rows)
        else:
            tensor.index_copy_(0, row_ids.to(tensor.device), rows.to(tensor))
    for pool, before in applied.overlays:
        pool.overlay = before


def _checked_name(model, tensors, pools, patch: Patch, key: str, one: PatchedTensor) -> str:
    """The name of a patch's tensor in the model, after a check that it can be replaced."""
    place = f"{patch.file.name}: {key}"
    name = name_in(model, tensors, key)
    if name is None:
        raise ValueError(
            f"{place} is not a tensor of this {type(model).__name__}. Load the base {patch.base.name!r}, and merge "
            "adapters."
        )
    tensor, pool = tensors[name], pools.get(name.rpartition(".")[0])
    is_quantised = pool is not None and format_of(tensor) is not None
    shape = (tensor.shape[0], pool.config.hidden_size) if is_quantised else tuple(tensor.shape)
    if shape != one.shape:
        kept = getattr(getattr(model, "config", None), "num_kept_experts", None)
        a_slice = f" The model is a slice (num_kept_experts={kept}), and the patch is not of it." if kept else ""
        raise ValueError(
            f"{place} has the shape {one.shape}, and the model's has {shape}.{a_slice} The patch is for "
            f"{patch.base.name!r}."
        )
    takes_floats = is_quantised and one.row_ids is not None and one.rows.is_floating_point()
    if tensor.dtype != one.rows.dtype and not takes_floats:
        raise ValueError(
            f"{place} is {one.rows.dtype}, and the model's is {tensor.dtype}. Load the base in the dtype that it was "
            "saved in: leave dtype unset."
        )
    kind = type(tensor.data).__name__ if isinstance(tensor, nn.Parameter) else type(tensor).__name__
    if tensor.is_meta or kind != "Tensor" or (pool is not None and not hasattr(type(pool), "overlay")):
        kind = "on meta" if tensor.is_meta else f"a {kind}" if kind != "Tensor" else "in code older than patches"
        raise ValueError(
            f"{place} is {kind} in the model. Load it on one device, without sharding, offloading and "
            "trust_remote_code."
        )
    return name


def _check_base(model, tensors, pools, patch: Patch, names: Mapping[str, str]) -> None:
    """Raise ValueError if the model is not the patch's base."""
    source, revision = getattr(model, "name_or_path", ""), None
    if hasattr(model, "config"):
        revision = getattr(model.config, "_commit_hash", None)
    found = Base.of(source, revision) if source else Base("", None, None)
    known = found.checksums is not None and patch.base.checksums is not None
    if known and found.checksums == patch.base.checksums:
        return
    is_quantised = any(format_of(tensors[name]) is not None for name in names.values())
    if known and not is_quantised:
        raise ValueError(f"{patch.file.name} is a patch for {patch.base}, and the model was loaded from {found}.")
    for key, name in names.items():
        one, tensor = patch.tensors[key], tensors[name].detach()
        path, _, attribute = name.rpartition(".")
        rows = tensor if one.row_ids is None else tensor[one.row_ids.to(tensor.device)]
        scales, stored = None, AS_STORED
        if path in pools and attribute in TABLE_NAMES and format_of(tensor) is not None:
            stored = format_of(tensor)
            scales = pools[path].scales()[attribute.replace("embed", "scale")][one.row_ids.to(tensor.device)]
        for applied in reversed(model.__dict__.get(_STACK, [])):  # compared as it was before any patch
            if name in applied.replaced:
                rows = _as_before(rows, one.row_ids, *applied.replaced[name])
        if sum_of_checksums(one.row_ids, rows, scales) != one.base_sums.get(stored):
            raise ValueError(
                f"{patch.file.name} is a patch for {patch.base}, and the model is another: {key} differs from the "
                "base where the patch replaces it."
            )


def _as_before(
    rows: torch.Tensor, row_ids: torch.Tensor | None, replaced_ids: torch.Tensor | None, replaced: torch.Tensor
) -> torch.Tensor:
    """`rows` with these ids of a tensor (None: all of it), before some of its rows, or all, were replaced."""
    row_ids = torch.arange(len(rows)) if row_ids is None else row_ids
    if replaced_ids is None:
        return replaced[row_ids.to(replaced.device)]
    return RowOverlay(replaced_ids, (replaced,) * len(TABLE_NAMES)).replace(row_ids.to(rows.device), 0, rows)


def _needs_overlay(pool: nn.Module) -> bool:
    """Whether rows of the pool cannot be written to: mapped for reading only, or quantised."""
    return bool(pool.scales()) or (pool.mapped_tables is not None and pool.mapped_tables.only_mapped)


def _overlay(pool: nn.Module, patched: Mapping[str, PatchedTensor]) -> RowOverlay:
    """The overlay of a pool after a patch: all tables' rows of each expert that is patched in any of them."""
    ids = [one.row_ids for one in patched.values()]
    if pool.overlay is not None:
        ids.append(pool.overlay.row_ids.cpu())
    row_ids = torch.cat(ids).unique()
    tables = []
    for number, name in enumerate(TABLE_NAMES):
        table = pool._parameters[name]
        if table is None:
            tables.append(None)
            continue
        places = row_ids.to(table.device)
        rows = table.detach()[places]
        if pool.scales():
            rows = dequantise_rows(rows, pool.scales()[name.replace("embed", "scale")].detach()[places])
        if pool.overlay is not None:
            rows = pool.overlay.replace(places, number, rows)
        if name in patched:
            one = patched[name]
            rows = RowOverlay(one.row_ids, [one.rows] * len(TABLE_NAMES)).replace(row_ids, number, rows)
        tables.append(rows.to(pool.up_embed.device))
    return RowOverlay(row_ids.to(pool.up_embed.device), tables)


def merge_patches(files: Sequence[str | os.PathLike], out: str | os.PathLike) -> Patch:
    """Join patches of one base that replace different rows.

    Returns:
        The joined patch, read again.

    Raises:
        OSError: a file does not exist or is damaged.
        ValueError: there are fewer than two, they belong to different bases, or two replace the same row.
    """
    if len(files) < 2:
        raise ValueError(f"merging takes at least two patches; got {len(files)}.")
    patches = [open_patch(file) for file in files]
    first = patches[0]
    for patch in patches[1:]:
        if patch.base.checksums != first.base.checksums or patch.base.name != first.base.name:
            raise ValueError(
                f"{first.file.name} is a patch for {first.base}, and {patch.file.name} for {patch.base}: only patches "
                "for one base merge."
            )
    names = dict.fromkeys(name for patch in patches for name in patch.tensors)
    joined = [(name, _join(name, [patch for patch in patches if name in patch.tensors])) for name in names]
    write_patch(out, first.base, joined)
    return open_patch(Path(out))


def _join(name: str, patches: Sequence[Patch]) -> PatchedTensor:
    parts = [patch.tensors[name] for patch in patches]
    if len(parts) == 1:
        return parts[0]
    way_out = "Apply the patches one after the other instead: the last one counts there. Or train them on other rows."
    if any(one.row_ids is None for one in parts):
        owners = " and ".join(patch.file.name for patch in patches)
        raise ValueError(f"{name} is replaced whole, and {owners} both have it. {way_out}")
    if len({(one.shape, one.rows.dtype) for one in parts}) > 1:
        found = ", ".join(f"{tuple(one.shape)} {one.rows.dtype}" for one in parts)
        raise ValueError(f"{name} has different shapes or dtypes in the patches: {found}.")
    row_ids, order = torch.cat([one.row_ids for one in parts]).sort(stable=True)
    both = row_ids[1:][row_ids[1:] == row_ids[:-1]].unique()
    if len(both):
        owners = [patch.file.name for patch in patches if torch.isin(both[:1], patch.tensors[name].row_ids).any()]
        raise ValueError(
            f"{name}: {len(both)} rows are in several patches, such as rows {both[:5].tolist()} "
            f"({' and '.join(owners)}). {way_out}"
        )
    formats = set.intersection(*(set(one.base_sums) for one in parts))
    sums = {stored: sum(one.base_sums[stored] for one in parts) % 2**32 for stored in sorted(formats)}
    return PatchedTensor(parts[0].shape, torch.cat([one.rows for one in parts])[order], row_ids, sums)

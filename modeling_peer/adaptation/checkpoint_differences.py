# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Where two checkpoints of one architecture differ: tensors, and rows of matrices, read in pieces."""

import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from torch import nn

from modeling_peer.adaptation.patch_files import PatchedTensor, sums_of_base
from modeling_peer.checksums_peer import read_header
from modeling_peer.damage_peer import refuse_damage, weight_files, weight_indexes
from modeling_peer.quantised_tables_peer import refuse_overlays
from modeling_peer.row_formats_peer import format_of
from modeling_peer.table_shards_peer import TABLE

CHUNK_ELEMENTS = 2**24  # of one tensor, read at a time from each of the two checkpoints


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def name_in(model: nn.Module, tensors: Mapping[str, torch.Tensor], key: str) -> str | None:
    """The name in `model` of a tensor of a checkpoint, which may be of the model with or without its head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = (key, key.removeprefix(prefix), prefix + key)
    return next((name for name in candidates if name in tensors), None)


class StoredTensors:
    """A checkpoint on the disk, read in pieces."""

    def __init__(self, path: str | os.PathLike, revision: str | None = None):
        files = weight_files(path, revision=revision)
        if not files:
            raise ValueError(f"{path} has no *.safetensors weights. Give the folder that a model was saved to.")
        refuse_damage(path, files, weight_indexes(path, revision=revision), verify=False)
        self.name = str(path)
        headers = {file: read_header(file)[0] for file in files}
        self.shapes = {name: one.shape for tensors in headers.values() for name, one in tensors.items()}
        opened = {file: safe_open(file, framework="pt") for file in files}
        self._files = {name: opened[file] for file, tensors in headers.items() for name in tensors}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        file = self._files[name]
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


class LoadedTensors:
    """A model in memory, by the names of a checkpoint of it."""

    def __init__(self, model: nn.Module, names: Mapping[str, tuple[int, ...]]):
        refuse_overlays(model, "the patch would have")
        self.name = f"the loaded {type(model).__name__}"
        tensors = tensors_of(model)
        found = {key: name_in(model, tensors, key) for key in names}
        self._tensors = {key: tensors[name] for key, name in found.items() if name is not None}
        ours = {id(tensor) for tensor in self._tensors.values()}
        state = model.state_dict(keep_vars=True)
        self._tensors |= {name: one for name, one in state.items() if id(one) not in ours}  # which the base lacks
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = self._tensors[name].detach()
        return (tensor if rows is None else tensor[rows]).cpu()


def check_same_architecture(before: StoredTensors, after: StoredTensors | LoadedTensors) -> None:
    if missing := sorted(before.shapes.keys() ^ after.shapes.keys()):
        owner, other = (before, after) if missing[0] in before.shapes else (after, before)
        raise ValueError(
            f"{owner.name} has {missing[0]!r}, and {other.name} does not ({len(missing)} such tensors). Base and "
            "fine-tune must be of the same architecture; merge adapters first."
        )
    for name, shape in before.shapes.items():
        if shape != after.shapes[name]:
            raise ValueError(
                f"{name} has the shape {shape} in {before.name} and {after.shapes[name]} in {after.name}. Base and "
                "fine-tune must be of the same architecture, and the same slice."
            )


def differences(
    before: StoredTensors, after: StoredTensors | LoadedTensors, other_tensors: str
) -> Iterator[tuple[str, PatchedTensor]]:
    """The tensors that differ. All others than tables are compared first, so that a refusal comes soon."""
    others = [name for name in before.shapes if not TABLE.fullmatch(name)]
    changed = [name for name in others if _differs(before, after, name)]
    if any(name.endswith(".row_of_expert") for name in changed):
        raise ValueError(f"{before.name} and {after.name} keep other experts: a patch needs the same slice.")
    if changed and other_tensors == "refuse":
        raise ValueError(
            f"{len(changed)} tensors other than expert tables differ: {', '.join(changed[:4])}"
            f'{", ..." if len(changed) > 4 else ""}. Store them too (other_tensors="store"), or train with them '
            "frozen, running statistics included (train_only_experts)."
        )
    for name in [*changed, *(name for name in before.shapes if TABLE.fullmatch(name))]:
        one = _difference(before, after, name)
        if one is not None:
            yield name, one


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    num_rows = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    return (slice(start, min(start + num_rows, shape[0])) for start in range(0, shape[0], num_rows))


def _pairs(before, after, name) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """First row and rows of both checkpoints, chunk by chunk; of other than matrices the whole."""
    shape = before.shapes[name]
    for rows in _chunks(shape) if len(shape) == 2 else [None]:
        ours, theirs = before.read(name, rows), after.read(name, rows)
        if ours.dtype != theirs.dtype:
            raise ValueError(
                f"{name} has the dtype {ours.dtype} in {before.name} and {theirs.dtype} in {after.name}. Save the "
                "fine-tune in the dtype of its base."
            )
        yield (rows.start if rows else 0), ours, theirs


def _differing_rows(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Whether each row differs in any bit, which zeros of two signs do and equal NaNs do not: `(num_rows,)`."""
    ours, theirs = (one.contiguous().flatten(1).view(torch.uint8) for one in (ours, theirs))
    if ours.shape[1] % 8 == 0 and not (ours.data_ptr() | theirs.data_ptr()) % 8:
        ours, theirs = ours.view(torch.int64), theirs.view(torch.int64)
    return (ours != theirs).any(1)


def _differs(before, after, name) -> bool:
    return any(_differing_rows(ours[None], theirs[None])[0] for _, ours, theirs in _pairs(before, after, name))


def _difference(before, after, name) -> PatchedTensor | None:
    shape, ids, ours_all, theirs_all = before.shapes[name], [], [], []
    for start, ours, theirs in _pairs(before, after, name):
        if len(shape) != 2:
            return PatchedTensor(shape, theirs, None, sums_of_base(None, ours, is_table=False))
        places = _differing_rows(ours, theirs).nonzero().squeeze(1)
        ids.append(places + start)
        ours_all.append(ours[places])
        theirs_all.append(theirs[places])
    row_ids = torch.cat(ids) if ids else torch.empty(0)
    if not len(row_ids):
        return None
    is_table = TABLE.fullmatch(name) is not None
    rows = torch.cat(ours_all)
    if is_table and format_of(rows) is not None:
        raise ValueError(
            f"{name} is quantised and differs. Make the patch of the float checkpoints; it can be applied to the "
            "quantised base."
        )
    return PatchedTensor(shape, torch.cat(theirs_all), row_ids, sums_of_base(row_ids, rows, is_table))

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The file of a patch: tensors that replace those of a base checkpoint, whole or some rows of them.

    model.layers.1.mlp.experts.up_embed            (num_rows, hidden_size), the rows that replace
    model.layers.1.mlp.experts.up_embed.row_ids    (num_rows,), int32, ascending: which rows they replace
    model.norm.weight                              a tensor without row ids replaces the whole

It is a safetensors file with its checksum. Its metadata has the base, and sums of checksums of what is replaced.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_peer.checksums_peer import StoredTensor, read_header, stored_checksum, write_tensors
from modeling_peer.damage_peer import UNREADABLE, find_safetensors_damage, weight_files
from modeling_peer.file_names_peer import is_weight_file
from modeling_peer.files_peer import replaced_when_written
from modeling_peer.row_formats_peer import TABLE_FORMATS, quantise_rows

ROW_IDS, METADATA, VERSION = ".row_ids", "patch", 1
# How a table stores the rows that a checksum is of: as the base does, or quantised.
AS_STORED = "as_stored"


@dataclass(frozen=True)
class Base:
    """The checkpoint that a patch belongs to.

    Args:
        name: of its repository on the Hub, or of its folder, without the path.
        revision: of the repository; None for a folder.
        checksums: stored checksum of each of its weight files; None if one of them has none.
    """

    name: str
    revision: str | None
    checksums: dict[str, str] | None

    @classmethod
    def of(cls, path: str | os.PathLike, revision: str | None = None) -> "Base":
        """The checkpoint in a folder, or of a repository that was downloaded. Reads the start of each weight file."""
        found = {file.name: stored_checksum(file) for file in weight_files(path, revision=revision)}
        known = bool(found) and all(found.values())
        name = Path(path).resolve().name if os.path.isdir(path) else str(path)
        return cls(name, revision, found if known else None)

    def __str__(self):
        at = f" at revision {self.revision}" if self.revision else ""
        files = ", ".join(
            f"{name} with checksum {digits}" for name, digits in list((self.checksums or {}).items())[:2]
        )
        return f"{self.name!r}{at}" + (f" ({files}{', ...' if len(self.checksums) > 2 else ''})" if files else "")


@dataclass(frozen=True)
class PatchedTensor:
    """What a patch has for one tensor of the base.

    Args:
        shape: of the tensor in the base.
        rows: the rows that replace, `(num_rows, ...)`, or the whole tensor.
        row_ids: `(num_rows,)`, int64, ascending; None if the tensor is replaced whole.
        base_sums: sums of the checksums of what is replaced, by how it is stored: `AS_STORED`, and for rows of a float
            table the formats of `row_formats_peer`. A patch of rows is recognised by them where a base has no files.
    """

    shape: tuple[int, ...]
    rows: torch.Tensor
    row_ids: torch.Tensor | None
    base_sums: dict[str, int]


@dataclass(frozen=True)
class Patch:
    """A patch that was read.

    Args:
        file: its path.
        base: the checkpoint that it belongs to.
        tensors: by their names in the base.
    """

    file: Path
    base: Base
    tensors: dict[str, PatchedTensor]

    def describe(self) -> dict[str, Any]:
        """`base`, `revision`, `bytes`, `num_rows`, and of each tensor its shape, dtype and number of rows."""
        tensors = [
            {
                "tensor": name,
                "shape": list(one.shape),
                "dtype": str(one.rows.dtype).removeprefix("torch."),
                "rows": "all" if one.row_ids is None else len(one.row_ids),
            }
            for name, one in self.tensors.items()
        ]
        return {
            "base": self.base.name,
            "revision": self.base.revision,
            "bytes": self.file.stat().st_size,
            "num_rows": sum(len(one.row_ids) for one in self.tensors.values() if one.row_ids is not None),
            "tensors": tensors,
        }


def sum_of_checksums(row_ids: torch.Tensor | None, rows: torch.Tensor, scales: torch.Tensor | None = None) -> int:
    """Sum of the CRC-32 of each row with its id, modulo `2**32`. Sums of disjoint rows can be added.

    Args:
        row_ids: `(num_rows,)`; None for a tensor that counts as one row.
        rows: `(num_rows, ...)`.
        scales: `(num_rows,)`, of quantised rows.
    """
    if row_ids is None:
        return zlib.crc32(_bytes_of(rows).numpy())
    parts = [part for part in (rows, scales) if part is not None]
    joined = torch.cat([_bytes_of(part).view(len(row_ids), -1) for part in parts], dim=1).numpy()
    return sum(zlib.crc32(row, row_id) for row_id, row in zip(row_ids.tolist(), joined, strict=True)) % 2**32


def sums_of_base(row_ids: torch.Tensor | None, rows: torch.Tensor, is_table: bool) -> dict[str, int]:
    """`PatchedTensor.base_sums` of what is replaced; with the formats, if these are rows of a float table."""
    sums = {AS_STORED: sum_of_checksums(row_ids, rows)}
    if is_table and rows.is_floating_point() and rows.itemsize > 1 and rows.float().isfinite().all():
        for name, table_format in TABLE_FORMATS.items():
            if rows.shape[1] % table_format.numbers_per_element == 0:
                sums[name] = sum_of_checksums(row_ids, *quantise_rows(rows, name))
    return sums


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def patch_file(file: str | os.PathLike) -> Path:
    """The path of a patch to write.

    Raises:
        ValueError: it would have the name of a checkpoint's weights, or of another kind of file.
    """
    file = Path(file).expanduser()
    if file.suffix != ".safetensors" or is_weight_file()(file.name):
        raise ValueError(f"a patch is a file named *.safetensors, and not as the weights of a model; got {file.name}.")
    return file


def write_patch(file: str | os.PathLike, base: Base, tensors: Iterable[tuple[str, PatchedTensor]]) -> Path:
    """Write a patch, all or nothing. Each tensor is on the disk before the next is taken.

    Raises:
        ValueError: `tensors` is empty, or the file cannot be a patch by its name (`patch_file`).
    """
    file = patch_file(file)
    with tempfile.TemporaryDirectory(prefix=".patch-", dir=file.parent) as folder:
        stored: dict[str, StoredTensor] = {}
        entries = {}
        for name, one in tensors:
            parts = {name: one.rows.detach().cpu().contiguous()}
            if one.row_ids is not None:
                parts[name + ROW_IDS] = one.row_ids.cpu().to(torch.int32)
            part = Path(folder, f"{len(entries)}.safetensors")
            save_file(parts, part)
            stored |= read_header(part)[0]
            entries[name] = {"shape": list(one.shape), "base_sums": one.base_sums}
        if not entries:
            raise ValueError(f"no tensor differs from the base {base.name!r}: there is nothing to store.")
        content = {"version": VERSION, "base": vars(base), "tensors": entries}
        with replaced_when_written(file) as unfinished:
            write_tensors(unfinished, stored, {"format": "pt", METADATA: json.dumps(content)})
    return file


def open_patch(file: str | os.PathLike) -> Patch:
    """Read a patch, after comparing it with its checksum.

    Raises:
        OSError: there is no such file, or it is damaged or truncated.
        ValueError: it is not a patch, or row ids are repeated or outside of their tensor.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no patch {file}.")
    if (damage := find_safetensors_damage(file)) is not None:
        raise OSError(f"{damage} Copy the patch again.")
    try:
        content = json.loads(read_header(file)[1][METADATA])
        version, base, entries = content["version"], Base(**content["base"]), dict(content["tensors"])
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        sums = {name: dict(entry["base_sums"]) for name, entry in entries.items()}
    except UNREADABLE as error:
        raise ValueError(f"{file.name} is not a patch: its metadata has no readable entry {METADATA!r}.") from error
    if version != VERSION:
        raise ValueError(
            f"{file.name} is a patch of version {version}; this release reads {VERSION}. Update modeling_peer."
        )
    tensors = {}
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        if unknown := names - entries.keys() - {name + ROW_IDS for name in entries}:
            raise ValueError(f"{file.name} has {min(unknown)!r}, which its metadata does not name.")
        for name in entries:
            if name not in names:
                raise ValueError(f"{file.name} lacks {name!r}, which its metadata names.")
            row_ids = stored.get_tensor(name + ROW_IDS).long() if name + ROW_IDS in names else None
            tensors[name] = PatchedTensor(shapes[name], stored.get_tensor(name), row_ids, sums[name])
            _check_rows(file.name, name, tensors[name])
    return Patch(file, base, tensors)


def _check_rows(file: str, name: str, one: PatchedTensor) -> None:
    if one.row_ids is None:
        if tuple(one.rows.shape) != one.shape:
            raise ValueError(f"{file}: {name} has the shape {tuple(one.rows.shape)}, and its entry says {one.shape}.")
        return
    ids = one.row_ids
    if ids.dim() != 1 or tuple(one.rows.shape) != (len(ids), *one.shape[1:]) or not len(ids):
        raise ValueError(
            f"{file}: {name} has rows {tuple(one.rows.shape)} and row ids {tuple(ids.shape)}, for a tensor "
            f"of the shape {one.shape}."
        )
    outside = ids[(ids < 0) | (ids >= one.shape[0])]
    if len(outside):
        raise ValueError(f"{file}: {name} has {one.shape[0]:,} rows; row ids {outside[:5].tolist()} are outside.")
    repeated = ids[1:][ids[1:] <= ids[:-1]]
    if len(repeated):
        raise ValueError(
            f"{file}: row ids of {name} must ascend; {repeated[:5].tolist()} are repeated or out of order."
        )

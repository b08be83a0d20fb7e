# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Damage to a checkpoint's weight files: found, named, and refused."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from safetensors import SafetensorError, safe_open

from .checksums_peer import LARGEST_HEADER, checksum_without_its_digits, read_header, stored_checksum
from .file_names_peer import index_name, weights_stem

# What reading a file of another kind as JSON, or as a safetensors header, raises.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


def find_file(
    path: str | os.PathLike, name: str, subfolder: str = "", cache_dir=None, revision: str | None = None
) -> Path | None:
    """A file of a local folder, or of a Hub repository that was downloaded; None if there is none."""
    name = os.path.join(subfolder or "", name)
    if os.path.isdir(path):
        return Path(path, name) if os.path.isfile(os.path.join(path, name)) else None
    try:
        cached = huggingface_hub.try_to_load_from_cache(str(path), Path(name).as_posix(), cache_dir, revision)
    except ValueError:  # not a repository name
        return None
    return Path(cached) if isinstance(cached, str) else None


def weight_files(path: str | os.PathLike, variant: str | None = None, **where) -> list[Path]:
    """The safetensors files that `from_pretrained` reads, in a local folder or downloaded from the Hub.

    Args:
        where: `subfolder`, `cache_dir` and `revision`, as in `find_file`.
    """
    if whole := find_file(path, f"{weights_stem(variant)}.safetensors", **where):
        return [whole]
    try:
        (index,) = weight_indexes(path, variant, **where)
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # An index may name only files beside it; `find_index_damage` reports others.
        files = [find_file(path, name, **where) for name in sorted(names) if Path(name).name == name]
    except UNREADABLE:
        return []
    return [file for file in files if file]


def weight_indexes(path: str | os.PathLike, variant: str | None = None, **where) -> list[Path]:
    """The index that `from_pretrained` reads; empty if it reads a single file. Arguments: see `weight_files`."""
    whole = find_file(path, f"{weights_stem(variant)}.safetensors", **where)
    index = find_file(path, index_name(variant), **where)
    return [index] if index and not whole else []


def find_safetensors_damage(file: str | os.PathLike, verify: bool = True) -> str | None:
    """One sentence that describes the damage to a safetensors file, with sizes in bytes; None if it is sound.

    Args:
        verify: whether to read the whole file and compare it with its checksum, if it has one.
    """
    file = Path(file)
    try:
        if (damage := _header_damage(file)) is not None:
            return damage
        with safe_open(file, framework="pt"):
            pass
        stored = stored_checksum(file) if verify else None
        if stored is not None and (found := checksum_without_its_digits(file)) != stored:
            return f"{file.name} was saved with the checksum {stored}, but now has {found}: its content changed."
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read ({error})."
    return None


def _header_damage(file: Path) -> str | None:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if header_size > size - 8:
            return f"{file.name} is {size} bytes long, less than its header announces ({header_size + 8})."
        unreadable = f"The header of {file.name} is not readable: the file is damaged or not safetensors."
        if header_size > LARGEST_HEADER:
            return unreadable
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        except UNREADABLE:
            return unreadable
    if size != expected:
        return f"{file.name} is {size} bytes long, but its header announces {expected}."
    return None


def find_index_damage(index: Path) -> list[str]:
    """Sentences that say where an index and its files do not fit each other. Reads headers only.

    An index may name only files beside it. A file that it gives a checksum for must have that checksum in its header,
    so files of two saves, and files that were swapped, are found. Each tensor must be in the file that it names, and
    an index with checksums must name every tensor of its files.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        checksums = content.get("metadata", {}).get("checksums", {})
        names = sorted({*weight_map.values(), *checksums})
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        expected = {name: {tensor for tensor, file in weight_map.items() if file == name} for name in names}
    except UNREADABLE:
        return [f"{index.name} is not readable as an index."]
    damages = []
    for name in names:
        file = index.parent / name
        if Path(name).name != name or name in ("", ".", ".."):
            damages.append(f"{index.name} names {name!r}, which is not a file beside it.")
        elif not file.is_file():
            damages.append(f"{name} is missing; {index.name} names it.")
        else:
            damages += _file_damage(file, index.name, expected[name], checksums.get(name))
    return damages


def _file_damage(file: Path, index: str, expected: set[str], checksum: str | None) -> list[str]:
    try:
        stored, tensors = stored_checksum(file), read_header(file)[0].keys()
    except UNREADABLE:
        return []  # `find_safetensors_damage` says what is wrong with it
    if checksum is not None and stored is not None and stored != checksum:
        return [f"{file.name} was saved with the checksum {stored}, and {index} names a file with {checksum}."]
    if missing := sorted(expected - tensors):
        return [f"{file.name} lacks {missing[0]!r} ({len(missing)} tensors in all), which {index} looks for there."]
    # An index with checksums was written with its files, so it names all of their tensors.
    if checksum is not None and (unnamed := sorted(tensors - expected)):
        return [f"{file.name} has {unnamed[0]!r} ({len(unnamed)} tensors in all), which {index} does not name there."]
    return []


def refuse_damage(
    path: str | os.PathLike,
    files: Iterable[Path] = (),
    indexes: Iterable[Path] = (),
    verify: bool = True,
    cause: Exception | None = None,
) -> None:
    """Raise OSError if weight files, or the indexes that name them, are damaged. The message names each of them.

    Args:
        path: the checkpoint, for the message.
        verify: whether to read files whole and compare them with their checksums.
        cause: the error of a loading that failed.
    """
    damages = [damage for index in indexes for damage in find_index_damage(index)]
    damages += [damage for file in files if (damage := find_safetensors_damage(file, verify)) is not None]
    if isinstance(cause, SafetensorError) and not damages:
        damages = ["A weight file is damaged."]
    if damages:
        because = f" ({cause})" if isinstance(cause, SafetensorError) else ""
        raise OSError(
            f"Cannot read the weights of {path}{because}. {' '.join(damages)} Copy or save the checkpoint again, or "
            "download it again with force_download=True."
        ) from cause


def verify_checkpoint(folder: str | os.PathLike) -> dict[str, bool]:
    """Read every safetensors file in `folder` and compare it with its checksum and its index: one second per GiB.

    Returns:
        For each file, by its path in `folder`, whether it has a checksum. A file without one was saved by another
        program or an older release. For that file, only the size given in its header is verified.

    Raises:
        OSError: a file or an index is damaged. The message names all of them.
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(file for file in Path(folder).rglob("*.safetensors") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file. Give the folder that a model was saved to.")
    refuse_damage(folder, files, sorted(Path(folder).rglob(index_name().replace(".json", "*.json"))))
    return {file.relative_to(folder).as_posix(): stored_checksum(file) is not None for file in files}

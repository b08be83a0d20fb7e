# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checksums of weight files, stored in the files themselves, and the detection of damaged files."""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from safetensors import SafetensorError, safe_open

from .file_names_peer import index_name, weights_stem

# The safetensors library writes other spaces. A program that copies a file's metadata to other tensors therefore does
# not produce this text, so the checksum is not copied.
CHECKSUM_START = b'{"__metadata__": {"crc32": "'
NO_CHECKSUM = b"0" * 8
LARGEST_HEADER = 100_000_000  # bytes, the safetensors format's limit
BLOCK = 1 << 24  # bytes read at once
PAGE = 4096  # bytes: the smallest unit that is read from a mapped file


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
    index = weight_index(path, variant, **where)
    if index is None:
        whole = find_file(path, f"{weights_stem(variant)}.safetensors", **where)
        return [whole] if whole else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # An index may name only files beside it; `refuse_index_damage` reports others.
        files = [find_file(path, name, **where) for name in sorted(names) if Path(name).name == name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return [file for file in files if file]


def weight_index(path: str | os.PathLike, variant: str | None = None, **where) -> Path | None:
    """The index that `from_pretrained` reads; None if it reads a single file. Arguments: see `weight_files`."""
    if find_file(path, f"{weights_stem(variant)}.safetensors", **where):
        return None
    return find_file(path, index_name(variant), **where)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its dtype by the format's name, and the position of its data in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: str | os.PathLike) -> dict[str, dict]:
    """The header of a safetensors file: dtype, shape and offsets of each tensor, and `"__metadata__"`.

    Raises:
        ValueError: the file does not start with such a header.
    """
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"{file} announces a header of {size} bytes: it is not a safetensors file.")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{file} does not start with a safetensors header.")
    return header


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file, by name. Only the header is read."""
    with open(file, "rb") as stream:
        first = 8 + int.from_bytes(stream.read(8), "little")
    found = {}
    for name, entry in read_header(file).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), first + start, end - start)
    return found


def write_tensors(file: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with copies of stored tensors, and its CRC-32 in the header.

    The checksum is of the whole file, with zeros for its own eight digits. The data starts at a multiple of `PAGE`.
    """
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.num_bytes]}
        end += tensor.num_bytes
    parts = [json.dumps(part, separators=(",", ":")).encode()[1:] for part in (metadata, entries)]
    others, tables = (b"," + part if len(part) > 1 else part for part in parts)  # without its first brace
    header = CHECKSUM_START + NO_CHECKSUM + b'"' + others + tables
    header += b" " * (-(8 + len(header)) % PAGE)
    start = len(header).to_bytes(8, "little") + header
    found = zlib.crc32(start)
    with open(file, "wb") as target:
        target.write(start)
        for tensor in tensors.values():
            for block in _blocks(tensor):
                found = zlib.crc32(block, found)
                target.write(block)
        target.seek(8 + len(CHECKSUM_START))
        target.write(b"%08x" % found)


def _blocks(tensor: StoredTensor) -> Iterator[bytes]:
    left = tensor.num_bytes
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        while left:
            block = stream.read(min(BLOCK, left))
            if not block:
                raise OSError(f"{tensor.file} ends {left} bytes before its header says.")
            left -= len(block)
            yield block


def _checksum_without_its_digits(stream) -> int:
    stream.seek(0)
    start = bytearray(stream.read(8 + len(CHECKSUM_START) + len(NO_CHECKSUM)))
    start[-len(NO_CHECKSUM) :] = NO_CHECKSUM
    return _checksum_of_rest(stream, zlib.crc32(start))


def _checksum_of_rest(stream, checksum: int = 0) -> int:
    while block := stream.read(BLOCK):
        checksum = zlib.crc32(block, checksum)
    return checksum


def checksum(file: str | os.PathLike) -> str:
    """The CRC-32 of a file, eight hexadecimal digits. Cached until the file's size or time changes."""
    status = os.stat(file)
    return _checksum(os.path.abspath(file), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _checksum(path: str, *_) -> str:
    with open(path, "rb") as stream:
        return f"{_checksum_of_rest(stream):08x}"


def stored_checksum(file: str | os.PathLike) -> str | None:
    """The checksum in a safetensors file that a PEER model saved; None for files of other programs."""
    with open(file, "rb") as stream:
        start = stream.read(8 + len(CHECKSUM_START) + len(NO_CHECKSUM))[8:]
    digits = start[len(CHECKSUM_START) :]
    return digits.decode("latin-1") if start.startswith(CHECKSUM_START) else None


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
        if verify and (stored := stored_checksum(file)) is not None:
            with open(file, "rb") as stream:
                found = f"{_checksum_without_its_digits(stream):08x}"
            if found != stored:
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
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return unreadable
    if size != expected:
        return f"{file.name} is {size} bytes long, but its header announces {expected}."
    return None


def refuse_damage(path, files: list[Path], verify: bool = True, cause: Exception | None = None):
    damages = [damage for file in files if (damage := find_safetensors_damage(file, verify)) is not None]
    if isinstance(cause, SafetensorError) and not damages:
        damages = ["A weight file is damaged."]
    if damages:
        because = f" ({cause})" if isinstance(cause, SafetensorError) else ""
        raise OSError(
            f"Cannot read the weights of {path}{because}. {' '.join(damages)} Copy or save the checkpoint again, or "
            "download it again with force_download=True."
        ) from cause


def verify_checkpoint(folder: str | os.PathLike) -> dict[str, bool]:
    """Read every safetensors file in `folder` and compare it with its checksum: one second per GiB.

    Returns:
        For each file, by its path in `folder`, whether it has a checksum. A file without one was saved by another
        program or an older release. For that file, only the size given in its header is verified.

    Raises:
        OSError: a file is damaged. The message names all damaged files.
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(file for file in Path(folder).rglob("*.safetensors") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file. Give the folder that a model was saved to.")
    refuse_damage(folder, files)
    return {file.relative_to(folder).as_posix(): stored_checksum(file) is not None for file in files}

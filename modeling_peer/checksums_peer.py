# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files with a checksum of their own: reading headers, writing, and the checksum of any file."""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .mapped_memory_peer import PAGE

# The safetensors library writes other spaces. A program that copies a file's metadata to other tensors therefore does
# not produce this text, so the checksum is not copied.
CHECKSUM_START = b'{"__metadata__": {"crc32": "'
NO_CHECKSUM = b"0" * 8
LARGEST_HEADER = 100_000_000  # bytes, the safetensors format's limit
BLOCK = 1 << 24  # bytes read at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its dtype by the format's name, and the position of its data in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors in a safetensors file by name, and its metadata. Their data is not read.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the file does not start with such a header.
    """
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"{file} announces a header of {size} bytes: it is not a safetensors file.")
        header = json.loads(stream.read(size))
    tensors, metadata = {}, header.pop("__metadata__", {})
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
    return tensors, metadata


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


def checksum_without_its_digits(file: str | os.PathLike) -> str:
    """The checksum that a file has now, to be compared with the one that is stored in it."""
    with open(file, "rb") as stream:
        start = bytearray(stream.read(8 + len(CHECKSUM_START) + len(NO_CHECKSUM)))
        start[-len(NO_CHECKSUM) :] = NO_CHECKSUM
        return f"{_checksum_of_rest(stream, zlib.crc32(start)):08x}"


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

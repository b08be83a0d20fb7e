# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Storage of chunks (Xet) for the Hub of the tests: what hf_xet uploads, put together to files again.

By the specification in huggingface/xet-core, `spec/`: a file is cut into chunks; a xorb is a run of chunks, each
compressed; a shard says of which chunks of which xorbs a file consists, and its SHA-256.
"""

import hashlib
import struct

# A shard begins with these bytes and, at 32, its version.
SHARD_HEADER = 48
ENTRY = 48
END_OF_FILES = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2


class XetStore:
    """Xorbs by their name in requests.

    Attributes:
        xorbs: for each xorb its chunks, decompressed.
    """

    def __init__(self):
        self.xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, body: bytes) -> bool:
        """Keep a xorb; returns whether it is new."""
        is_new = name not in self.xorbs
        self.xorbs[name] = list(_read_chunks(body))
        return is_new

    def files_of_shard(self, body: bytes) -> dict[str, bytes]:
        """The files that a shard describes, by their SHA-256.

        Raises:
            ValueError: a chunk is missing, or a file is not what its SHA-256 says.
        """
        files, place = {}, SHARD_HEADER
        while (header := body[place : place + ENTRY])[:32] != END_OF_FILES:
            flags, num_terms = struct.unpack_from("<II", header, 32)
            place += ENTRY
            content = b""
            for _ in range(num_terms):
                xorb = name_of_hash(body[place : place + 32])
                _, num_bytes, first, end = struct.unpack_from("<4I", body, place + 32)
                part = b"".join(self.xorbs[xorb][first:end]) if xorb in self.xorbs else b""
                if len(part) != num_bytes:
                    raise ValueError(f"xorb {xorb} has not the chunks {first} to {end}")
                content += part
                place += ENTRY
            place += ENTRY * num_terms * bool(flags & WITH_VERIFICATION)
            if not flags & WITH_SHA256:
                raise ValueError("a file without its SHA-256")
            sha256 = name_of_hash(body[place : place + 32])
            place += ENTRY
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError(f"the chunks are not the file {sha256}")
            files[sha256] = content
        return files


def name_of_hash(hash_bytes: bytes) -> str:
    """A hash as requests name it: four little-endian integers of 64 bits, in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash_bytes))


def _read_chunks(xorb: bytes):
    place = 0
    while place < len(xorb) and xorb[place] == 0:  # the version; a footer, if any, begins otherwise
        size = int.from_bytes(xorb[place + 1 : place + 4], "little")
        scheme = xorb[place + 4]
        num_bytes = int.from_bytes(xorb[place + 5 : place + 8], "little")
        chunk = xorb[place + 8 : place + 8 + size]
        if scheme != STORED:
            chunk = decompress_lz4(chunk)
        if scheme == GROUPED_LZ4:
            chunk = _ungroup(chunk)
        if len(chunk) != num_bytes:
            raise ValueError(f"a chunk of {len(chunk)} bytes, announced with {num_bytes}")
        yield chunk
        place += 8 + size


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping of bytes by their place in words of four."""
    content, begin = bytearray(len(grouped)), 0
    for place in range(4):
        length = len(range(place, len(grouped), 4))
        content[place::4] = grouped[begin : begin + length]
        begin += length
    return bytes(content)


def decompress_lz4(frame: bytes) -> bytes:
    """A frame of LZ4 (its "Frame Format", version 1.6), checksums unread."""
    flags = frame[4]
    if frame[:4] != b"\x04\x22\x4d\x18" or flags >> 6 != 1:
        raise ValueError("not a frame of LZ4")
    place = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    content = bytearray()
    while size := int.from_bytes(frame[place : place + 4], "little"):
        place += 4
        block = frame[place : place + (size & 0x7FFFFFFF)]
        place += len(block) + 4 * bool(flags & 16)
        if size >> 31:
            content += block
        else:
            _decompress_block(block, content)
    return bytes(content)


def _decompress_block(block: bytes, content: bytearray) -> None:
    place = 0

    def length_of(nibble: int) -> int:
        nonlocal place
        length = nibble
        while nibble == 15:
            more = block[place]
            place += 1
            length += more
            if more != 255:
                break
        return length

    while place < len(block):
        token = block[place]
        place += 1
        num_literals = length_of(token >> 4)
        content += block[place : place + num_literals]
        place += num_literals
        if place >= len(block):
            return  # the last sequence has literals only
        distance = int.from_bytes(block[place : place + 2], "little")
        place += 2
        length = length_of(token & 15) + 4
        start = len(content) - distance
        if distance >= length:
            content += content[start : start + length]
        else:  # a match that overlaps itself repeats
            content += (bytes(content[start:]) * (length // distance + 1))[:length]

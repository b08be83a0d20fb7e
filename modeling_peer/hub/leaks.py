# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Secrets and pickles in files that are about to be published: recognised by name and by content."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from modeling_peer.checksums_peer import read_header
from modeling_peer.damage_peer import UNREADABLE

# Files with these names are secrets, whatever they contain.
SECRET_FILE = re.compile(
    r"(\.env(\..*)?|\.netrc|\.npmrc|\.pypirc|\.git-credentials|\.htpasswd|id_(rsa|dsa|ecdsa|ed25519)|credentials(\.json)?|"
    r"(stored_)?tokens?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk))",
    re.I,
)
# Long enough that names in code, such as hf_modules_cache, are none of them.
SECRET_TEXTS = {
    "a Hugging Face token": re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{24,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----"),
    "an AWS access key": re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "a Google API key": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
    "a password in a URL": re.compile(rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}]+:[^/\s:@\"'<>{}]+@"),
    "a password or key": re.compile(
        rb"[\"']?\b(password|passwd|passphrase|secret(_key)?|api_?key|access_key|(hub|auth|access|refresh)_token)\b[\"']?"
        rb"\s*[:=]\s*[\"'][^\"'\s]{8,}[\"']",
        re.I,
    ),
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
PICKLE_START = re.compile(rb"\x80[\x02-\x05]")  # of protocols 2 to 5
ZIP_START = b"PK\x03\x04"  # torch.save writes a zip archive with a pickle in it
BLOCK, OVERLAP = 1 << 22, 4096  # bytes read at once, and of those, read again with the next


def find_secret(file: Path) -> str | None:
    """What is secret in `file`, and in which line; None if nothing is found. The secret itself is not repeated."""
    if SECRET_FILE.fullmatch(file.name):
        return "its name is that of a file of secrets"
    line, overlap = 1, b""
    for block in _readable_blocks(file):
        text = overlap + block
        for what, pattern in SECRET_TEXTS.items():
            if match := pattern.search(text):
                return f"line {line + text.count(bytes([10]), 0, match.start())} holds {what}"
        overlap = text[-OVERLAP:]
        line += text.count(b"\n", 0, len(text) - len(overlap))
    return None


def find_pickle(file: Path) -> bool:
    """Whether `file` is one that Python loads by running what it says, by its name or its first bytes."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with open(file, "rb") as stream:
        start = stream.read(4)
    return bool(PICKLE_START.match(start)) or start == ZIP_START


def _readable_blocks(file: Path) -> Iterator[bytes]:
    """A file's bytes; of safetensors the metadata alone, since the tensors are numbers."""
    if file.suffix == ".safetensors":
        with suppress(*UNREADABLE):  # the check of damage reports it
            yield json.dumps(read_header(file)[1]).encode()
        return
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            yield block

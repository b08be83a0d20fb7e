# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Text from files: plain, compressed (.gz, .xz) or JSON lines, one file or a folder of them."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from modeling_peer.console.errors import SettingsError, nearest

# suffixes searched for in a folder; a file given directly may have any name
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".jsonl")
COMPRESSED_SUFFIXES = (".gz", ".xz")
REFUSED_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".zip", ".zst", ".bz2", ".tar")
# A longer document becomes several rows. Then no row fills the memory, and part of one file can be held out.
PIECE_CHARACTERS = 2048


def find_text_files(path: str | Path) -> list[Path]:
    """The files to read, in a fixed order.

    Args:
        path: a file, or a folder that is searched with its subfolders.

    Raises:
        SettingsError: the path does not exist, or has no files that can be read as text.
    """
    path = Path(path).expanduser()
    if path.is_file():
        files = [path]
        if (suffix := path.suffix.lower()) in REFUSED_SUFFIXES:
            raise SettingsError(
                f"{path}: {suffix} is not read as text. Put the file in a folder and set --dataset_name to it."
            )
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _text_suffix(p) in TEXT_SUFFIXES)
        if not files:
            found = sorted({p.suffix or "no suffix" for p in path.rglob("*") if p.is_file()})
            raise SettingsError(
                f"{path} holds no text files ({', '.join(TEXT_SUFFIXES)}, plain or {', '.join(COMPRESSED_SUFFIXES)}); "
                f"it holds: {', '.join(found[:10]) or 'no files'}."
            )
    else:
        near = nearest(path.name, _names_in(path.parent))
        raise SettingsError(f"no such file or folder: {path} (looked from {Path.cwd()}).{near}")
    return files


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def require_text(files: Iterable[Path], text_column: str) -> None:
    """Raise SettingsError unless a file has at least one character. Reading stops at the first."""
    files = list(files)
    for path in files:
        if any(text for text, _ in read_pieces(path, text_column)):
            return
    raise SettingsError(f"no text in {files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}: empty.")


def read_pieces(path: Path, text_column: str) -> Iterator[tuple[str, bool]]:
    """Read one file a piece at a time.

    A file is one document; in a .jsonl file, each line is one.

    Yields:
        text: a piece. Joined, the pieces of a document are exactly its text, with line ends unchanged.
        ends_document: whether this is the document's last piece.
    """
    try:
        with open_text(path) as handle:
            if _text_suffix(path) == ".jsonl":
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        yield _text_of_row(line, text_column, f"{path} line {number}"), True
                return
            piece = _next_piece(handle)
            while piece:
                following = _next_piece(handle)
                yield piece, not following
                piece = following
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SettingsError(f"{path} is not UTF-8 text: {error.reason} (byte {byte:#x}).") from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise SettingsError(f"{path} cannot be decompressed: {error}.") from error


def open_text(path: Path):
    """Open for reading as UTF-8, decompressed by suffix. newline="" keeps every byte of a line end for counting."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8", newline="")


def _next_piece(handle) -> str:
    # up to the end of the line, so that words stay whole, but bounded, because some corpora have no line ends
    piece = handle.read(PIECE_CHARACTERS)
    return piece + handle.readline(PIECE_CHARACTERS) if piece else ""


def _text_of_row(line: str, text_column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{place} is not JSON: {error}.") from error
    if isinstance(row, dict) and text_column in row and not isinstance(row[text_column], str):
        raise SettingsError(f"{place} has no text under {text_column!r} but {json.dumps(row[text_column])[:40]}.")
    if not isinstance(row, dict) or text_column not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise SettingsError(f"{place} has no text under {text_column!r}; it has: {keys}. Set --text_column.")
    try:
        row[text_column].encode("utf-8")
    except UnicodeEncodeError as error:  # \ud800 to \udfff: possible in JSON, not in UTF-8
        raise SettingsError(f"{place} holds half a character, {error.object[error.start]!a}. Remove it.") from error
    return row[text_column]


def _text_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""File writes that are all or nothing and reach the disk."""

import errno
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path


def give_default_permissions(folder: Path):
    """Give files the permissions that the umask allows any new file: safetensors writes for the owner alone."""
    probe = folder / "permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def flush(path: str | os.PathLike):
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # Windows flushes only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def flush_all(paths: Iterable[str | os.PathLike]):
    """Call `flush` on all paths in parallel: many waiting writes take a disk about as long as one."""
    with ThreadPoolExecutor(16) as threads:
        for _ in threads.map(flush, paths):
            pass


def write_text(path: str | os.PathLike, text: str):
    """Write a file to the disk, all or nothing: after a failure it is unchanged."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    with replaced_when_written(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def replaced_when_written(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It replaces `path` when the block ends, and is deleted if the block raises."""
    unfinished = path.with_name(f"_{path.name}")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)

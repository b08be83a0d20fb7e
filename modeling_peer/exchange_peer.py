# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Replace the files of a folder all or nothing, even if the process is killed."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .file_names_peer import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    index_name,
    is_weight_file,
)
from .files_peer import flush, flush_all, give_default_permissions
from .travelling_code_peer import LAYER_FILES, MODELS

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


# Followed by host and process id, which tell the files of a killed process from a save in progress.
STAGING_PREFIX = ".saving-"
# Inside a staging folder: the complete new files, the old ones while they are replaced, the names of both, and a lock
# held by the saving process.
NEW_FILES, OLD_FILES, EXCHANGE, LOCK = "new", "old", "exchange.json", "lock"


@contextmanager
def staged_save(directory: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Yield a folder to save into. On success its files replace those of `directory`; on failure nothing changes.

    The files are on the disk before the first is replaced. If only one file changes, it is replaced in one step, so a
    killed save leaves the old model or the new one. If more change, `config.json` is removed first and restored last:
    a folder without it cannot be loaded. The next save then restores the old files before it starts, as
    `restore_old_files` does at any time.

    Args:
        directory: folder to save to; created if absent. Its other files (tokenizer, trainer state) stay.
        variant: name of the weight variant being saved, as in `save_pretrained`.

    Raises:
        NotADirectoryError: `directory` is a file.
        IsADirectoryError: it has a folder with the name of a file to be saved.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Cannot save a model to {directory}: it is a file. Give the path of a folder.")
    directory.mkdir(parents=True, exist_ok=True)
    restore_old_files(directory)
    # Inside the target, so that moving the files is a rename on the same file system.
    host = re.sub(r"[^\w.-]", "_", platform.node())
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{host}-{os.getpid()}-", dir=directory))
    try:
        with _locked(staging / LOCK, create=True):
            (staging / NEW_FILES).mkdir()
            yield staging / NEW_FILES
            give_default_permissions(staging / NEW_FILES)
            with _locked(directory):
                _replace_files(staging, directory, variant)
    finally:
        if not _holds_old_files(staging):
            shutil.rmtree(staging, ignore_errors=True)


def restore_old_files(directory: str | os.PathLike) -> None:
    """Restore a model's old files after an interrupted exchange, and delete what dead processes left in `directory`.

    Nothing is restored if `directory` has a configuration, because it can then be loaded as it is.
    """
    directory = Path(directory)
    for staging in staging_folders(directory):
        with suppress(OSError), _locked(directory):
            if _is_abandoned(staging):
                if _holds_old_files(staging) and not (directory / _read_exchange(staging)["last"]).exists():
                    _put_back(staging, directory)
                shutil.rmtree(staging)


def staging_folders(directory: str | os.PathLike) -> list[Path]:
    """Folders that may be our staging folders. Links are left out, since they can point anywhere."""
    found = Path(directory).glob(f"{STAGING_PREFIX}*")
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_abandoned(staging: Path) -> bool:
    """Whether the process that made this folder has ended. For another container's process only a lock shows that."""
    if fcntl is not None and (staging / LOCK).is_file():
        descriptor = os.open(staging / LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(descriptor)
    host = re.sub(r"[^\w.-]", "_", platform.node())
    of_this_host = re.fullmatch(rf"{re.escape(STAGING_PREFIX + host)}-([0-9]{{1,9}})-[^-]+", staging.name)
    return bool(of_this_host) and not _is_running(int(of_this_host[1]))


def _is_running(process_id: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C on Windows
        return True
    try:
        os.kill(process_id, 0)  # sends no signal, only checks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _locked(path: Path, create: bool = False) -> Iterator[None]:
    """Hold a lock on a file or folder; continue without one if the system cannot lock it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o600)
    try:
        with suppress(OSError):  # network file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace_files(staging: Path, directory: Path, variant: str | None):
    index, is_weights = index_name(variant), is_weight_file(variant)
    source = staging / NEW_FILES
    # relative paths, because an adapter may have a folder of its own
    new = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    # Code of the layers of an earlier model, which the new one does not have.
    stale = {name for name in LAYER_FILES if MODELS in new and (directory / name).is_file()}
    if any(map(is_weights, new)):
        # Transformers prefers `model.safetensors` to an index, so a stale one beside new shards would be loaded.
        stale |= {path.name for path in directory.iterdir() if is_weights(path.name) or path.name == index}
        if variant is None and CONFIG_NAME in new and (directory / GENERATION_CONFIG_NAME).exists():
            stale.add(GENERATION_CONFIG_NAME)  # left by a model that generates; the new one does not
    stale -= new
    changed = {name for name in new if is_weights(name) or not _same_content(source / name, directory / name)}
    for name in sorted(changed | stale):
        if (directory / name).is_dir():
            raise IsADirectoryError(
                f"Cannot save to {directory}: the model has a file {name}, and a folder there has that name. "
                "Rename the folder."
            )
    last = None
    if len(changed | stale) > 1:
        last = next((name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) if name in new), max(changed))
        changed.add(last)
    flush_all([*(source / name for name in changed), *(path for path in source.rglob("*") if path.is_dir()), source])
    for name in changed:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    if last is not None:
        old = {name for name in changed | stale if os.path.lexists(directory / name)}
        _exchange(staging, directory, {"new": sorted(changed), "old": sorted(old), "last": last})
    for name in changed if last is None else ():  # one at most
        os.replace(source / name, directory / name)
    flush(directory)


def _same_content(one: Path, two: Path) -> bool:
    if not (one.is_file() and two.is_file() and one.stat().st_size == two.stat().st_size):
        return False
    return one.stat().st_mode == two.stat().st_mode and one.read_bytes() == two.read_bytes()


def _exchange(staging: Path, directory: Path, exchange: dict):
    """Move old files out of `directory` and new ones into it; if that fails, put the old ones back.

    Args:
        exchange: the names of `new` and `old` files, and the `last` one, without which the folder cannot be loaded. It
            is moved out first and in last.
    """
    last = exchange["last"]
    (staging / OLD_FILES).mkdir()
    (staging / EXCHANGE).write_text(json.dumps(exchange), encoding="utf-8")
    try:
        for name in sorted(exchange["old"], key=lambda name: (name != last, name)):
            (staging / OLD_FILES / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(directory / name, staging / OLD_FILES / name)
            if name == last:
                flush(directory)
        for name in sorted(exchange["new"], key=lambda name: (name == last, name)):
            if name == last:
                flush(directory)
            os.replace(staging / NEW_FILES / name, directory / name)
    except BaseException as failure:
        try:
            _put_back(staging, directory)
        except OSError as error:
            raise OSError(
                f"Cannot save to {directory} ({failure}) or restore the old files ({error}). They are in "
                f"{staging / OLD_FILES}. The next save to that folder restores them, and so does "
                "modeling_peer.exchange_peer.restore_old_files(folder)."
            ) from failure
        raise


def _read_exchange(staging: Path) -> dict | None:
    """The names of an exchange that started and did not finish; None if there is no such exchange."""
    try:
        exchange = json.loads((staging / EXCHANGE).read_text(encoding="utf-8"))
        names = [*exchange["new"], *exchange["old"], exchange["last"]]
        # anyone may have written these names
        inside = all(not os.path.isabs(name) and ".." not in Path(name).parts for name in names)
        return exchange if inside and (staging / NEW_FILES / exchange["last"]).exists() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _holds_old_files(staging: Path) -> bool:
    exchange = _read_exchange(staging)
    return exchange is not None and any(os.path.lexists(staging / OLD_FILES / name) for name in exchange["old"])


def _put_back(staging: Path, directory: Path):
    if (exchange := _read_exchange(staging)) is None:  # the last file is moved, so all are
        return
    for name in exchange["new"]:
        # moved, and there was no file of this name before
        if name not in exchange["old"] and not (staging / NEW_FILES / name).exists():
            (directory / name).unlink(missing_ok=True)
    for name in sorted(exchange["old"], key=lambda name: (name == exchange["last"], name)):
        if os.path.lexists(staging / OLD_FILES / name):
            if name == exchange["last"]:
                flush(directory)
            os.replace(staging / OLD_FILES / name, directory / name)
    flush(directory)

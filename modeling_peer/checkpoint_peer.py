# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How a checkpoint folder is replaced without a half-written state, and what is wrong with one that will not load."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Followed by the host and the process that saves, so that what a killed one left can be told from work in progress.
STAGING_PREFIX = ".saving-"
CONFIG_NAME = "config.json"


@contextmanager
def staged_save(directory: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Yield a folder to save into; on success its files replace those of `directory`, on failure nothing changes.

    A save that is killed leaves either the old model, or the new one, or (during the renames at the end, and only if
    configuration or sharding changed) a folder without `config.json`, which loads as nothing.

    Args:
        directory: folder to save to; created if absent. Its other files (tokenizer, trainer state) stay.
        variant: name of the weight variant being saved, as in `save_pretrained`.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Cannot save a model to {directory}: it is a file. Give the path of a folder.")
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the target, so that moving the files is a rename on the same file system.
    prefix = f"{STAGING_PREFIX}{platform.node()}-{os.getpid()}-"
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
    try:
        yield staging
        _replace_files(staging, directory, variant)
        for folder in directory.iterdir():
            of_this_host = re.fullmatch(rf"{re.escape(STAGING_PREFIX + platform.node())}-(\d+)-[^-]+", folder.name)
            if of_this_host and not _is_running(int(of_this_host[1])):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(process_id, 0)  # no signal: only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _replace_files(staging: Path, directory: Path, variant: str | None):
    stem = "model" if variant is None else f"model.{variant}"
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    is_weights = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors").fullmatch

    new = {path.name for path in staging.iterdir()}
    new_weights = {name for name in new if is_weights(name)}
    old_weights = {path.name for path in directory.iterdir() if is_weights(path.name) or path.name == index}
    # Transformers prefers `model.safetensors` to an index, so a stale one beside new shards would be loaded.
    stale = old_weights - new if new_weights else set()

    one_rename = not stale and len(new_weights) <= 1 and _same_config(staging, directory)
    if CONFIG_NAME in new and not one_rename:
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        (directory / index).unlink(missing_ok=True)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    # Weights before their index, the configuration after everything: without it a folder does not load.
    for name in sorted(new, key=lambda name: (name == CONFIG_NAME, name == index, name)):
        os.replace(staging / name, directory / name)


def _same_config(staging: Path, directory: Path) -> bool:
    old, new = directory / CONFIG_NAME, staging / CONFIG_NAME
    return old.exists() and new.exists() and old.read_bytes() == new.read_bytes()


def describe_damage(path: str | os.PathLike) -> str:
    """One sentence on which safetensors file of the local folder `path` is incomplete, with sizes in bytes."""
    for file in sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else []:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if header_size > size - 8:
                return f"{file.name} is {size} bytes long, less than its header announces ({header_size + 8})."
            try:
                header = json.loads(stream.read(header_size))
            except ValueError:
                return f"The header of {file.name} is not readable: the file is damaged or not safetensors."
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
        if size != expected:
            return f"{file.name} is {size} bytes long, its header announces {expected}."
    return "A weight file is damaged."

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders of a run: written all or nothing, found, checked and deleted."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_peer.checksums_peer import checksum
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json
from modeling_peer.console.run_files import UNFINISHED, list_checkpoints
from modeling_peer.damage_peer import find_safetensors_damage
from modeling_peer.files_peer import flush, flush_all, give_default_permissions, write_text

logger = logging.get_logger(__name__)

REPLACED = "replaced-"  # prefix, in the folder `_unfinished`, of an old checkpoint while a new one replaces it
# Names, sizes and checksums of all files, written last. They reveal a copy that lost a file or a bit, however the
# model is sharded. Older versions wrote only sizes.
LIST_OF_FILES = "checkpoint_files.json"
ZIP_FILES = (".pt", ".pth", ".bin")
# Files that Trainer needs to continue as if it had not been interrupted. FSDP and DeepSpeed use other names.
PARTS = {
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    "model.safetensors": ("**/*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


@contextmanager
def staged_checkpoint(target: Path, writes: bool, wait_for_everyone: Callable[[], None]) -> Iterator[Path]:
    """Yield a folder that is renamed to `target` after all processes have written to it. On failure nothing changes.

    Its files are on the disk before the rename. If the run is killed, the folder stays in `_unfinished` beside
    `target`, and the next save deletes it. An existing `target` is replaced by two renames. If the run is killed
    between them, the next save or `newest_checkpoint` restores the old `target`.

    Args:
        target: the checkpoint's final path.
        writes: whether this process creates and renames folders (`TrainingArguments.should_save`).
        wait_for_everyone: barrier of all processes.
    """
    unfinished = target.parent / UNFINISHED
    staged = unfinished / target.name
    if writes:
        _remove_unfinished(unfinished)
        staged.mkdir(parents=True)
    wait_for_everyone()
    try:
        yield staged
        wait_for_everyone()
        if writes:
            _publish(staged, target)
    finally:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
    wait_for_everyone()


def _publish(staged: Path, target: Path):
    give_default_permissions(staged)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    flush_all(files)  # before the checksums, which then read the files from the page cache
    content = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)} for path in files
    }
    write_text(staged / LIST_OF_FILES, json.dumps(content, indent=2) + "\n")
    # otherwise the new name could reach the disk before the entries of its folder
    flush_all([*(path for path in staged.rglob("*") if path.is_dir()), staged])
    replaced = staged.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    try:
        staged.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    flush(target.parent)


def _restore_replaced(unfinished: Path):
    for replaced in unfinished.glob(f"{REPLACED}checkpoint-*"):
        target = unfinished.parent / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.rename(target)


def _remove_unfinished(unfinished: Path):
    _restore_replaced(unfinished)
    if unfinished.is_dir():
        logger.warning("deleting what an interrupted save left: %s", ", ".join(_names(unfinished)) or unfinished)
        shutil.rmtree(unfinished)


def _names(folder: Path) -> list[str]:
    return sorted(f"{folder.name}/{path.name}" for path in folder.glob("*"))


def delete_oldest(run_dir: Path, limit: int, kept: set[str]):
    """Delete checkpoints until at most `limit` remain: damaged ones first, then the oldest, but none in `kept`."""
    others = [path for path in list_checkpoints(run_dir) if path.name not in kept and not path.is_symlink()]
    surplus = max(0, len(others) + len(kept) - limit)
    unfinished = run_dir / UNFINISHED
    # The sort is stable, so complete checkpoints stay in order. Checksums are compared only before a run is resumed,
    # not at every save.
    for path in sorted(others, key=lambda path: find_damage(path, contents=False) is None)[:surplus]:
        # renamed first, so that its name never belongs to a partly deleted folder
        unfinished.mkdir(exist_ok=True)
        path.rename(unfinished / path.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> tuple[str, list[str]]:
    """The path of a run's newest complete checkpoint, and a description of each newer incomplete one.

    Raises:
        SettingsError: there is no complete checkpoint.
    """
    _restore_replaced(run_dir / UNFINISHED)
    incomplete = [f"{name} (its save or deletion was interrupted)" for name in _names(run_dir / UNFINISHED)]
    for folder in reversed(list_checkpoints(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return str(folder), incomplete
        incomplete.append(f"{folder.name} ({damage})")
    found = f"no complete checkpoint: {'; '.join(incomplete)}" if incomplete else f"no checkpoint-* in {run_dir}"
    raise SettingsError(f"nothing to resume: {found}. See --save_steps.")


def require_complete(checkpoint: str | os.PathLike):
    """Raise SettingsError unless training can be resumed from this folder."""
    if damage := find_damage(Path(checkpoint)):
        raise SettingsError(f"cannot resume from {checkpoint}: {damage}.")


def find_damage(checkpoint: Path, contents: bool = True) -> str | None:
    """A description of what a checkpoint of Trainer lacks or what is damaged; None if it can be resumed.

    Sizes and checksums are compared with the list that `staged_checkpoint` writes, if there is one. Each file is also
    checked by itself: safetensors files of PEER models and files of `torch.save` contain checksums.

    Args:
        contents: whether to compare checksums, which takes one second per GiB. Otherwise only names, sizes and the
            structure of files are checked.
    """
    for name, patterns in PARTS.items():
        if not any(True for pattern in patterns for _ in checkpoint.glob(pattern)):
            return f"it has no {name}"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        if not _is_whole(path):
            return f"{path.name} is damaged or cut short"
    try:
        listed = {name: _size_and_checksum(entry) for name, entry in read_json(checkpoint / LIST_OF_FILES).items()}
        parts = set(read_json(checkpoint / "model.safetensors.index.json").get("weight_map", {}).values())
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{LIST_OF_FILES} or model.safetensors.index.json is damaged"
    if missing := [name for name in listed if not (checkpoint / name).is_file()]:
        return f"it has no {missing[0]}"
    for name, (size, _) in listed.items():
        if (length := (checkpoint / name).stat().st_size) != size:
            return f"{name} is {length} bytes long instead of {size}"
    for path in files if contents else ():
        _, expected = listed.get(path.relative_to(checkpoint).as_posix(), (None, None))
        if damage := _content_damage(path, expected):
            return damage
    # after the contents, because a flipped bit of the index changes the names in it
    if missing := [name for name in sorted(parts) if not (checkpoint / name).is_file()]:
        return f"it has no {missing[0]}"
    return None


def _size_and_checksum(entry: int | dict) -> tuple[int, str | None]:
    return (entry, None) if isinstance(entry, int) else (entry["bytes"], entry["crc32"])


def _content_damage(path: Path, expected: str | None) -> str | None:
    """A description of how a file's content is damaged; None if it is not.

    Args:
        expected: its checksum. If None, the checksums inside the file are compared.
    """
    changed = f"the content of {path.name} changed after it was saved"
    try:
        if expected is not None:
            return None if (found := checksum(path)) == expected else f"{changed}: crc32 {found} instead of {expected}"
        if path.suffix == ".safetensors":
            return find_safetensors_damage(path)
        if path.suffix in ZIP_FILES:
            with zipfile.ZipFile(path) as archive:
                record = archive.testzip()
            return record and f"{changed}: the crc32 of its record {record} differs from the stored one"
    except Exception as error:  # zipfile raises many kinds, such as NotImplementedError
        return f"{path.name} cannot be read ({type(error).__name__}: {error})"
    return None


def _has_steps(path: Path, content: dict) -> bool:
    """Whether Trainer can read its progress from a trainer_state.json; true for any other file."""
    kinds = {"global_step": int, "log_history": list}
    return path.name != TRAINER_STATE_NAME or all(isinstance(content.get(n, k()), k) for n, k in kinds.items())


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix in ZIP_FILES:
            return zipfile.is_zipfile(path)  # finds the directory at the end of the file
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and _has_steps(path, content)
        elif path.suffix == ".safetensors":
            return find_safetensors_damage(path, verify=False) is None  # compares the header with the length
    except (ValueError, OSError, RecursionError):
        return False
    return True

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints of a run as folders: made whole or not at all, found, checked, and deleted when newer ones stand."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_peer.checksums_peer import checksum, find_safetensors_damage
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json
from modeling_peer.console.run_files import UNFINISHED, list_checkpoints
from modeling_peer.files_peer import flush, flush_all, give_default_permissions, write_text

logger = logging.get_logger(__name__)

REPLACED = "replaced-"  # in there, before the name of a whole checkpoint that is to have another in its place
# Names, sizes and checksums, written last: a copy that lost a file or a bit is told from a whole one, however the
# model is sharded. Older releases wrote sizes alone.
LIST_OF_FILES = "checkpoint_files.json"
ZIP_FILES = (".pt", ".pth", ".bin")
# What Trainer needs to continue as if nothing had happened; FSDP and DeepSpeed have names of their own.
PARTS = {
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    "model.safetensors": ("**/*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


@contextmanager
def staged_checkpoint(target: Path, writes: bool, wait_for_everyone: Callable[[], None]) -> Iterator[Path]:
    """Yield a folder that becomes `target` when all processes have written to it; on failure nothing changes.

    Its files are on the disk before it gets its name. A run that is killed leaves it in the folder `_unfinished`
    beside `target`, which the next save clears. Where it is killed between the two renames that replace an existing
    `target`, the next save, or whoever looks for the newest checkpoint, puts that one back.

    Args:
        target: the checkpoint's final path.
        writes: whether this process is the one that makes and names folders (`TrainingArguments.should_save`).
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
    flush_all(files)  # before the checksums, so that they are read back from memory while the disk is done
    content = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)} for path in files
    }
    write_text(staged / LIST_OF_FILES, json.dumps(content, indent=2) + "\n")
    # a new name may get to the disk before what it names
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


def _put_back_replaced(unfinished: Path):
    for replaced in unfinished.glob(f"{REPLACED}checkpoint-*"):
        target = unfinished.parent / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.rename(target)


def _remove_unfinished(unfinished: Path):
    _put_back_replaced(unfinished)
    if unfinished.is_dir():
        logger.warning("clearing what a run that died left: %s", ", ".join(_names(unfinished)) or unfinished)
        shutil.rmtree(unfinished)


def _names(folder: Path) -> list[str]:
    return sorted(f"{folder.name}/{path.name}" for path in folder.glob("*"))


def delete_oldest(run_dir: Path, limit: int, kept: set[str]):
    """Delete checkpoints until at most `limit` remain: damaged ones first, then the oldest, never those in `kept`."""
    others = [path for path in list_checkpoints(run_dir) if path.name not in kept and not path.is_symlink()]
    surplus = max(0, len(others) + len(kept) - limit)
    unfinished = run_dir / UNFINISHED
    # A stable sort: whole ones stay in order. Their contents are read before one is resumed, not at every save.
    for path in sorted(others, key=lambda path: find_damage(path, contents=False) is None)[:surplus]:
        # renamed first, so that no half of it stands under its name
        unfinished.mkdir(exist_ok=True)
        path.rename(unfinished / path.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> tuple[str, list[str]]:
    """The newest whole checkpoint of a run, and in words those that are not whole and newer.

    Raises:
        SettingsError: there is none.
    """
    _put_back_replaced(run_dir / UNFINISHED)
    passed_over = [f"{name} (left half written or half deleted)" for name in _names(run_dir / UNFINISHED)]
    for folder in reversed(list_checkpoints(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return str(folder), passed_over
        passed_over.append(f"{folder.name} ({damage})")
    found = f"no complete one: {'; '.join(passed_over)}" if passed_over else f"no checkpoint-* in {run_dir}"
    raise SettingsError(f"nothing to resume: {found}. See --save_steps.")


def require_complete(checkpoint: str | os.PathLike):
    """Raise SettingsError unless the training can be resumed from this folder."""
    if damage := find_damage(Path(checkpoint)):
        raise SettingsError(f"{checkpoint} is no training checkpoint that can be resumed: {damage}.")


def find_damage(checkpoint: Path, contents: bool = True) -> str | None:
    """What a checkpoint of Trainer lacks or has only in part, in words; None when it can be resumed.

    Sizes and checksums are compared with the list that `staged_checkpoint` leaves, if it is there, and every file with
    what it says of itself: safetensors files of PEER models and those of `torch.save` have checksums of their own.

    Args:
        contents: whether to compare checksums, one second per GiB. Without, only names and sizes are looked at.
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
        missing = [name for name in (*listed, *sorted(parts)) if not (checkpoint / name).is_file()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{LIST_OF_FILES} or model.safetensors.index.json is damaged"
    if missing:
        return f"it has no {missing[0]}"
    for name, (size, _) in listed.items():
        if (length := (checkpoint / name).stat().st_size) != size:
            return f"{name} is {length} bytes long instead of {size}"
    for path in files if contents else ():
        _, expected = listed.get(path.relative_to(checkpoint).as_posix(), (None, None))
        if damage := _content_damage(path, expected):
            return damage
    return None


def _size_and_checksum(entry: int | dict) -> tuple[int, str | None]:
    return (entry, None) if isinstance(entry, int) else (entry["bytes"], entry["crc32"])


def _content_damage(path: Path, expected: str | None) -> str | None:
    """What a file has in place of what was saved.

    Args:
        expected: its checksum; without one, the file's own is asked.
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
            return record and f"{changed}: its record {record} has another crc32 than it was written with"
    except Exception as error:  # zipfile raises many: NotImplementedError where the flipped bit is of the compression
        return f"{path.name} cannot be read ({type(error).__name__}: {error})"
    return None


def _has_steps(path: Path, content: dict) -> bool:
    """Whether a trainer_state.json, if it is one, can be read for how far the run was; Trainer has defaults."""
    kinds = {"global_step": int, "log_history": list}
    return path.name != TRAINER_STATE_NAME or all(isinstance(content.get(n, k()), k) for n, k in kinds.items())


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix in ZIP_FILES:
            return zipfile.is_zipfile(path)  # looks for the directory, which stands at the end
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and _has_steps(path, content)
        elif path.suffix == ".safetensors":
            return find_safetensors_damage(path, verify=False) is None  # compares the header with the length
    except (ValueError, OSError, RecursionError):
        return False
    return True

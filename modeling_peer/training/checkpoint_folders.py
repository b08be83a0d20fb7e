"""The checkpoints of a run as folders: made whole or not at all, found, checked, and deleted when newer ones stand."""

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_peer.training.recipes import SettingsError

logger = logging.get_logger(__name__)

# Trainer uploads nothing of output_dir that begins with an underscore, and takes nothing in it for a checkpoint.
UNFINISHED = "_unfinished"
# names and sizes, written last: a copy that lost a file is told from a whole one, however the model is sharded
LIST_OF_FILES = "checkpoint_files.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
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
    beside `target`, which the next save clears. (Killed between the two renames that replace an existing `target`, it
    leaves none of that name.)

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
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    (staged / LIST_OF_FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    for path in (*staged.rglob("*"), staged):  # a new name may get to the disk before what it names
        _flush(path)
    if target.exists():
        target.rename(staged.with_name(f"replaced-{target.name}"))
    staged.rename(target)
    _flush(target.parent)


def _flush(path: Path):
    if os.name == "nt":  # there, only what is open for writing can be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _remove_unfinished(unfinished: Path):
    if unfinished.is_dir():
        logger.warning("clearing what a run that died left: %s", ", ".join(_names(unfinished)) or unfinished)
        shutil.rmtree(unfinished)


def _names(folder: Path) -> list[str]:
    return sorted(f"{folder.name}/{path.name}" for path in folder.glob("*"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by N."""
    folders = [path for path in run_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


def delete_oldest(run_dir: Path, limit: int, kept: set[str]):
    """Delete checkpoints until at most `limit` remain: damaged ones first, then the oldest, never those in `kept`."""
    others = [path for path in list_checkpoints(run_dir) if path.name not in kept and not path.is_symlink()]
    surplus = max(0, len(others) + len(kept) - limit)
    unfinished = run_dir / UNFINISHED
    # a stable sort: whole ones stay in order
    for path in sorted(others, key=lambda path: find_damage(path) is None)[:surplus]:
        # renamed first, so that no half of it stands under its name
        unfinished.mkdir(exist_ok=True)
        path.rename(unfinished / path.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> tuple[str, list[str]]:
    """The newest whole checkpoint of a run, and in words those that are not whole and newer.

    Raises:
        SettingsError: there is none.
    """
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


def find_damage(checkpoint: Path) -> str | None:
    """What a checkpoint of Trainer lacks or has only in part, in words; None when it can be resumed.

    Sizes are compared with the list that `staged_checkpoint` leaves, if it is there, and every file with what its own
    header says.
    """
    for name, patterns in PARTS.items():
        if not any(True for pattern in patterns for _ in checkpoint.glob(pattern)):
            return f"it has no {name}"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_whole(path):
            return f"{path.name} is damaged or cut short"
    sizes = read_json(checkpoint / LIST_OF_FILES)
    index = read_json(checkpoint / "model.safetensors.index.json")
    for name in (*sizes, *index.get("weight_map", {}).values()):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    for name, size in sizes.items():
        if (length := (checkpoint / name).stat().st_size) != size:
            return f"{name} is {length} bytes long instead of {size}"
    return None


def read_json(path: Path) -> dict:
    """What a JSON file holds; an empty dict if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    """Write a file that is whole or not there."""
    unfinished = path.with_name(f"_{path.name}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _has_steps(path: Path, content: dict) -> bool:
    """Whether a trainer_state.json, if it is one, says how far the run was."""
    kinds = {"global_step": int, "log_history": list}
    return path.name != TRAINER_STATE_NAME or all(isinstance(content.get(n), kind) for n, kind in kinds.items())


def _is_whole(path: Path) -> bool:
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # looks for the directory, which stands at the end
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and _has_steps(path, content)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length
                pass
    except (ValueError, SafetensorError, OSError):
        return False
    return True

"""Checkpoints of a training that exist whole or not at all, and what is wrong with one that came from elsewhere."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_peer.checkpoint_peer import flush, flush_to_disk
from modeling_peer.training.recipes import SettingsError

logger = logging.get_logger(__name__)

# Trainer uploads nothing of output_dir that begins with an underscore, and takes nothing in it for a checkpoint.
UNFINISHED = "_unfinished"
# names and sizes, written last: a copy that lost a file is told from a whole one, however the model is sharded
LIST_OF_FILES = "checkpoint_files.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# what gloo says when a process at the other end is gone
LOST_CONNECTION = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting")
# What Trainer needs to continue as if nothing had happened; FSDP and DeepSpeed have names of their own.
PARTS = {
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    "model.safetensors": ("**/*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


class CompleteCheckpoints:
    """Mixin for Trainer: a folder `checkpoint-N` is a whole checkpoint, on the disk, whenever the run may die.

    `train(resume_from_checkpoint=True)` takes the newest whole one and names those it passes over. Older ones are
    deleted (`save_total_limit`) only after the new one is whole. The sum of losses that is not logged yet is saved
    too, so that the logged curve does not depend on where a run was interrupted.
    """

    _staging: Path | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as Trainer does; refuse to resume from a checkpoint that is not whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint, passed_over = newest_checkpoint(Path(self.args.output_dir))
            if passed_over and self.is_world_process_zero():
                logger.warning("not resumed, being incomplete: %s", "; ".join(passed_over))
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and not LOST_CONNECTION.search(str(error)):
                raise
            raise SettingsError(
                f"process {self.args.process_index} lost the others after step {self.state.global_step}: "
                f"{str(error).splitlines()[0]} See what the first one to end said, then --resume_from_checkpoint last."
            ) from error

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the model; a failure is told with the room there is on the disk."""
        in_checkpoint = self._staging is not None  # its failure is told of the whole
        with nullcontext() if in_checkpoint else explained_failure(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        with (
            explained_failure(target),
            staged_checkpoint(target, self.args.should_save, self.accelerator.wait_for_everyone) as staged,
        ):
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == target or best.exists():  # Trainer looked for it among what is staged
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(staged / TRAINER_STATE_NAME)
        if self.args.should_save and self.args.save_total_limit:
            kept = {target.name, Path(self.state.best_model_checkpoint or target).name}
            delete_oldest(run_dir, self.args.save_total_limit, kept)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # Each process keeps its own random numbers and its own losses, saved and loaded at the same moments.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        unlogged = {"sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
        Path(output_dir, self._unlogged_file()).write_text(json.dumps(unlogged) + "\n")

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if unlogged := _read_json(Path(checkpoint, self._unlogged_file())):
            self._tr_loss.fill_(unlogged["sum"])
            self._globalstep_last_logged = unlogged["last_logged_step"]
            # train_loss is the mean of this session's steps
            self._total_loss_scalar -= unlogged["sum"]

    def _unlogged_file(self):
        return f"unlogged_loss_{self.args.process_index}.json"


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
            files = sorted(path for path in staged.rglob("*") if path.is_file())
            sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
            (staged / LIST_OF_FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
            flush_to_disk(staged)
            if target.exists():
                target.rename(unfinished / f"replaced-{target.name}")
            staged.rename(target)
            flush(target.parent)
    finally:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
    wait_for_everyone()


def _remove_unfinished(unfinished: Path):
    if unfinished.is_dir():
        logger.warning("clearing what a run that died left: %s", ", ".join(_names(unfinished)) or unfinished)
        shutil.rmtree(unfinished)


def _names(folder: Path) -> list[str]:
    return sorted(f"{folder.name}/{path.name}" for path in folder.glob("*"))


@contextmanager
def explained_failure(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the libraries raise when they cannot write into a SettingsError with the room that is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        folder = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        raise SettingsError(
            f"cannot save {path}: {type(error).__name__}: {error}. Free in {folder}: "
            f"{shutil.disk_usage(folder).free:,} bytes. Checkpoints saved before are as they were: "
            "--resume_from_checkpoint last continues from there."
        ) from error


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
    sizes = _read_json(checkpoint / LIST_OF_FILES)
    index = _read_json(checkpoint / "model.safetensors.index.json")
    for name in (*sizes, *index.get("weight_map", {}).values()):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    for name, size in sizes.items():
        if (length := (checkpoint / name).stat().st_size) != size:
            return f"{name} is {length} bytes long instead of {size}"
    return None


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_whole(path: Path) -> bool:
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # looks for the directory, which stands at the end
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length
                pass
    except (ValueError, SafetensorError, OSError):
        return False
    return True

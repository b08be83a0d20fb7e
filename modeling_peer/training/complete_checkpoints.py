# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Trainer whose checkpoints are complete even if it is killed, with errors that name the cause of a failed save."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json
from modeling_peer.exchange_peer import staged_save
from modeling_peer.training.checkpoint_folders import (
    delete_oldest,
    newest_checkpoint,
    require_complete,
    staged_checkpoint,
)

logger = logging.get_logger(__name__)

# messages of gloo when another process has ended, or has not answered in time
LOST_CONNECTION = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting")


class CompleteCheckpoints:
    """Mixin for Trainer: each folder `checkpoint-N` is complete and on the disk, even if the run is killed.

    `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint, and logs which newer ones it
    skips. Old checkpoints are deleted (`save_total_limit`) only after the new one is complete. The sum of losses since
    the last log is saved too. So the logged curve does not depend on where a run was interrupted.
    """

    _staging: Path | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as Trainer does, but resume only from complete checkpoints.

        Raises:
            SettingsError: the checkpoint is incomplete, or the connection to another process was lost.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, incomplete = newest_checkpoint(Path(self.args.output_dir))
            if incomplete and self.is_world_process_zero():
                logger.warning("not resumed, because incomplete: %s", "; ".join(incomplete))
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if not LOST_CONNECTION.search(str(error)):
                raise
            raise SettingsError(
                f"process {self.args.process_index} lost the connection to the others after step "
                f"{self.state.global_step}: {str(error).splitlines()[0]} Read the error of the process that ended "
                "first. Then continue with --resume_from_checkpoint last."
            ) from error

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the model. The error of a failed save has the free space on the disk."""
        in_checkpoint = self._staging is not None  # the error then names the checkpoint
        with nullcontext() if in_checkpoint else explained_failure(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def save_state(self):
        """Save the state as Trainer does, but all or nothing."""
        if self.is_world_process_zero():
            with staged_save(self.args.output_dir) as staging:
                self.state.save_to_json(staging / TRAINER_STATE_NAME)

    def _save(self, output_dir=None, state_dict=None):
        # A checkpoint is staged as a whole. Elsewhere, tokenizer and model replace the old files together.
        if self._staging is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with staged_save(output_dir or self.args.output_dir) as staging:
            super()._save(str(staging), state_dict)

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
            if best == target or best.exists():  # Trainer looked for it in the staged folder
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

    # Each process has its own losses, as it has its own random state: both are saved and loaded together.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        unlogged = {"sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
        Path(output_dir, self._unlogged_file()).write_text(json.dumps(unlogged) + "\n")

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if unlogged := read_json(Path(checkpoint, self._unlogged_file())):
            self._tr_loss.fill_(unlogged["sum"])
            self._globalstep_last_logged = unlogged["last_logged_step"]
            # train_loss is the mean over the steps of this session
            self._total_loss_scalar -= unlogged["sum"]

    def _unlogged_file(self):
        return f"unlogged_loss_{self.args.process_index}.json"


@contextmanager
def explained_failure(path: str | os.PathLike) -> Iterator[None]:
    """Raise SettingsError, with the free space on the disk, for any error of the libraries when they cannot write."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        folder = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        raise SettingsError(
            f"cannot save {path}: {type(error).__name__}: {error}. Free in {folder}: "
            f"{shutil.disk_usage(folder).free:,} bytes. Earlier checkpoints are unchanged: continue from the newest "
            "with --resume_from_checkpoint last."
        ) from error

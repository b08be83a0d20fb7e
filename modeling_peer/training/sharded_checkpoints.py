# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Trainer resumes models that were sharded as they were loaded: every process saves and reads its part."""

import os
from itertools import chain

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME

from modeling_peer.console.errors import SettingsError

# older releases of Transformers keep them elsewhere, and know less: not the parts of parts that FSDP2 leaves
try:
    from transformers.distributed.checkpoint import (
        _redistribute_state_dict,
        load_optimizer_distributed,
        save_optimizer_distributed,
    )
except ImportError:
    save_optimizer_distributed = None

OPTIMIZER_FOLDER = "optimizer"


class ShardedCheckpoints:
    """Mixin for Trainer: a run whose model came from `from_pretrained(..., distributed_config=...)` can be resumed, on
    as many processes as before, on others, or on one.

    Trainer (Transformers 5.23) can do neither half, and refuses: it would save the first process' part of the
    optimizer's state for all of it, and give whole weights to processes that have parts. Here that state is a folder
    of `torch.distributed.checkpoint`: each process writes its part, under the names of parameters. Weights are saved
    whole, as ever, and each process reads its part of them.
    """

    def __init__(self, model=None, args=None, *others, **options):
        """As of Trainer, which looks at `save_only_model` to refuse a sharded model."""
        saves_more = is_sharded(model) and args and args.save_strategy != "no" and not args.save_only_model
        if saves_more:
            require_engine()
            args.save_only_model = True
        try:
            super().__init__(model, args, *others, **options)
        finally:
            if saves_more:
                args.save_only_model = False

    @property
    def _sharded_at_load(self) -> bool:
        return is_sharded(self.model) and not self.is_fsdp_enabled

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._sharded_at_load:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        try:
            save_optimizer_distributed(self.model, *self._optimizer_and_folder(output_dir))
        except CheckpointException as error:  # of any process, and no Exception
            raise RuntimeError(str(error)) from error
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not os.path.isdir(os.path.join(checkpoint, OPTIMIZER_FOLDER)):
            if checkpoint is not None and self._sharded_at_load:
                raise SettingsError(
                    f"{checkpoint} was saved by processes that had the whole model each, and this one has a part of "
                    "it. Resume without sharding, or begin a new run with its weights (--model)."
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        require_engine()
        load_optimizer_distributed(self.model, *self._optimizer_and_folder(checkpoint))
        state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        # Groups are by device mesh, too: with other processes there may be others, whose rates the optimizer has now.
        groups = self.optimizer.param_groups
        of_groups = {
            "base_lrs": [group["initial_lr"] for group in groups],
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [None] * len(groups),  # functions, which have no state
        }
        state |= {name: of_groups[name] for name in of_groups.keys() & state.keys()}
        self.lr_scheduler.load_state_dict(state)

    def _optimizer_and_folder(self, checkpoint):
        # that of torch: the engine begins with a step of zero gradients, which Accelerate's would count
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer, os.path.join(checkpoint, OPTIMIZER_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._sharded_at_load and isinstance(self.model, PreTrainedModel):  # not the adapters of PEFT
            load_parts(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._sharded_at_load:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def is_sharded(model) -> bool:
    """Whether `from_pretrained(..., distributed_config=...)` dealt it out to processes."""
    return getattr(model, "_device_mesh", None) is not None


def require_engine() -> None:
    """Raise SettingsError when this Transformers does not save and load the parts of an optimizer's state."""
    if save_optimizer_distributed is None:
        raise SettingsError(
            "the optimizer of a model that is sharded over processes is saved and resumed with transformers 5.23: "
            "update it, or set --save_only_model true, whose checkpoints are models to begin with, no runs to resume."
        )


@torch.no_grad()
def load_parts(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Give every process its part of the weights in the safetensors files of `folder`; it reads no more of them."""
    # a weight of two names is saved under the first
    names = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    weights = {name: value for name, value in model.state_dict().items() if name in names}
    parts = _redistribute_state_dict(weights)
    dcp.load(parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    for name, part in _redistribute_state_dict(parts, reference_state_dict=weights).items():
        weights[name].copy_(part)

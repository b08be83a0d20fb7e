# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of models that `from_pretrained` sharded: every process saves and loads its part."""

import os
from itertools import chain

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME

from modeling_peer.console.errors import SettingsError

# Older releases have these functions in another module, without support for shards that FSDP2 shards again.
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
    """Mixin for Trainer: a run can be resumed if its model came from `from_pretrained(..., distributed_config=...)`.

    The number of processes may change, also to one. Trainer (Transformers 5.23) refuses such models. It would save
    only the first process's part of the optimizer's state, and load whole weights into processes that have parts.

    Here the optimizer's state is a folder of `torch.distributed.checkpoint`. Each process writes its part, under the
    names of the parameters. Weights are saved whole, as usual, and each process reads its part of them.
    """

    def __init__(self, model=None, args=None, *others, **options):
        """As in Trainer, which would refuse to save a sharded model without `save_only_model`."""
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
        except CheckpointException as error:  # raised for an error of any process; not a subclass of Exception
            raise RuntimeError(str(error)) from error
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not os.path.isdir(os.path.join(checkpoint, OPTIMIZER_FOLDER)):
            if checkpoint is not None and self._sharded_at_load:
                raise SettingsError(
                    f"{checkpoint} was saved by processes that each had the whole model, and this process has a part "
                    "of it. Resume without sharding, or start a new run with its weights (--model)."
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        require_engine()
        load_optimizer_distributed(self.model, *self._optimizer_and_folder(checkpoint))
        state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        # Groups also depend on the device mesh, so they can change with the number of processes. The optimizer has
        # the rates of the new groups.
        groups = self.optimizer.param_groups
        group_states = {
            "base_lrs": [group["initial_lr"] for group in groups],
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [None] * len(groups),  # functions without state
        }
        state |= {name: group_states[name] for name in group_states.keys() & state.keys()}
        self.lr_scheduler.load_state_dict(state)

    def _optimizer_and_folder(self, checkpoint):
        # The optimizer of torch, because Accelerate's wrapper would count the step of zero gradients that Transformers
        # starts with.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer, os.path.join(checkpoint, OPTIMIZER_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._sharded_at_load and isinstance(self.model, PreTrainedModel):  # not adapters of PEFT
            load_parts(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._sharded_at_load:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def is_sharded(model) -> bool:
    """Whether `from_pretrained(..., distributed_config=...)` sharded the model over processes."""
    return getattr(model, "_device_mesh", None) is not None


def require_engine() -> None:
    """Raise SettingsError if this release of Transformers cannot save and load a sharded optimizer state."""
    if save_optimizer_distributed is None:
        raise SettingsError(
            "saving the optimizer of a model that is sharded over processes needs Transformers 5.23 or later. Update "
            "it, or set --save_only_model true. Runs cannot be resumed from such checkpoints."
        )


@torch.no_grad()
def load_parts(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load this process's part of the weights in the safetensors files of `folder`, and read nothing else."""
    # a weight with two names is saved under the first
    names = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    weights = {name: value for name, value in model.state_dict().items() if name in names}
    parts = _redistribute_state_dict(weights)
    dcp.load(parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    for name, part in _redistribute_state_dict(parts, reference_state_dict=weights).items():
        weights[name].copy_(part)

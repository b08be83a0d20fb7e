# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Trainer for models with expert tables."""

import math

import torch
from accelerate import DistributedType
from transformers import Trainer, TrainingArguments

from modeling_peer.console.errors import SettingsError, require_numbers
from modeling_peer.optim.parameter_groups import (
    TABLE_GROUPS,
    has_row_sparse_gradients,
    parameter_groups,
    schedule_tables,
    sparse_embeddings,
    trained_tables,
)
from modeling_peer.optim.row_sparse_adamw import RowSparseAdamW
from modeling_peer.optim.row_sparse_gradients import (
    average_over_processes,
    clip_gradients,
    row_sparse_gradients,
)
from modeling_peer.optim.sparse_embeddings import train_rows_sparsely
from modeling_peer.training.arguments import PeerTrainingArguments
from modeling_peer.training.complete_checkpoints import CompleteCheckpoints
from modeling_peer.training.private_settings import PrivateArguments
from modeling_peer.training.resumed_settings import ResumesAsAsked
from modeling_peer.training.sharded_checkpoints import ShardedCheckpoints
from modeling_peer.transformers_names_peer import require_arguments, require_methods

# Methods of Trainer that PeerTrainer and its mixins override. If a release renamed one, ours would never be called.
OVERRIDDEN = (
    *("create_optimizer", "create_scheduler", "get_optimizer_cls_and_kwargs", "training_step", "log", "train"),
    *("save_model", "prediction_step", "create_model_card", "_clip_grad_norm", "_get_grad_norm", "_get_learning_rate"),
    *("_get_output_dir", "_save", "_save_checkpoint", "_push_from_checkpoint", "_save_rng_state", "_load_rng_state"),
    *("_run_epoch", "_init_training_state", "_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler"),
    *("_load_from_checkpoint", "_load_best_model", "save_state", "init_hf_repo", "push_to_hub"),
)
require_methods(Trainer, *OVERRIDDEN)
require_arguments(Trainer.compute_loss, "num_items_in_batch")  # the model divides its loss by it


class PeerTrainer(ResumesAsAsked, PrivateArguments, CompleteCheckpoints, ShardedCheckpoints, Trainer):
    """Trainer for models with expert tables. It replaces `transformers.Trainer` and has the same arguments.

    - Embeddings may be trained as expert tables are, in any model (`row_sparse_modules`, `train_rows_sparsely`).
    - Expert tables have a separate parameter group (`parameter_groups`) and a separate schedule.
    - Their gradients are clipped to `max_grad_norm` separately from those of the other weights.
    - Logs have `table_grad_norm` and `table_learning_rate`. `grad_norm` and `learning_rate` are those of the others.
    - With row-sparse gradients the optimizer is `RowSparseAdamW`. Under `DistributedDataParallel`,
      `average_over_processes` then averages the gradients of tables.
    - A checkpoint is written all or nothing (`CompleteCheckpoints`), also that of a sharded model
      (`ShardedCheckpoints`).
    - A resumed run does the remaining steps with the settings it is given (`ResumesAsAsked`).
    - No file contains a token or password (`PrivateArguments`).

    `args` may be `TrainingArguments`; `PeerTrainingArguments` adds fields for expert tables. For another Trainer,
    define `class MyTrainer(PeerTrainer, SFTTrainer)`. Without a subclass, Trainer itself can use the optimizer. On a
    GPU it then needs dense gradients, because it cannot clip row-sparse ones:

        Trainer(..., optimizer_cls_and_kwargs=(RowSparseAdamW, {"params": parameter_groups(model, 1e-3)}))
    """

    _table_grad_norm = _table_learning_rate = None
    _row_sparse_model = None

    @property
    def _table_settings(self) -> PeerTrainingArguments | type[PeerTrainingArguments]:
        # for plain TrainingArguments the defaults, which are class attributes of a dataclass
        return self.args if isinstance(self.args, PeerTrainingArguments) else PeerTrainingArguments

    @property
    def _row_sparse_experts(self) -> bool:
        return self._table_settings.row_sparse_gradients or has_row_sparse_gradients(self.model)

    @property
    def _row_sparse(self) -> bool:
        return self._row_sparse_experts or bool(sparse_embeddings(self.model))

    def train(self, *args, **kwargs):
        """Train as Trainer does. Raise SettingsError if a number is out of its range (`RANGES`)."""
        require_numbers(self.args, TrainingArguments)
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """The optimizer that the arguments name, with `parameter_groups`."""
        given = self.optimizer_cls_and_kwargs
        self._train_rows_sparsely()
        if self._row_sparse and self._row_sparse_model is not self.model:  # a second train() calls this again
            self._prepare_row_sparse()
            self._row_sparse_model = self.model
        try:
            if self.optimizer is None:
                self.optimizer_cls_and_kwargs = self._optimizer_class_and_groups(model)
            return super().create_optimizer(model)
        except SettingsError:
            raise
        except (ValueError, TypeError, KeyError, ImportError) as error:
            if given:  # given by a program, not by the arguments
                raise
            name = getattr(self.args.optim, "value", self.args.optim)
            raise SettingsError(f"--optim {name} with --optim_args {self.args.optim_args}: {error}") from error
        finally:
            self.optimizer_cls_and_kwargs = given  # Trainer removes "params" from it

    def _optimizer_class_and_groups(self, model):
        settings, network = self._table_settings, self.model if model is None else model
        optimizer_class, options = self.optimizer_cls_and_kwargs or self._optimizer_class_and_options(network)
        with row_sparse_gradients(self.model, self._row_sparse_experts):  # the groups then have `row_sparse`
            groups = parameter_groups(
                network,
                options.get("lr", self.args.learning_rate),
                self.args.weight_decay,
                settings.table_learning_rate_multiple,
                settings.table_weight_decay,
                settings.retrieval_learning_rate_multiple,
            )
        return optimizer_class, {"params": groups, **options}

    def _optimizer_class_and_options(self, model):
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        state = self._table_settings.table_optimizer_state
        if self._row_sparse:
            if optimizer_class is not torch.optim.AdamW:
                raise SettingsError(
                    f"--optim {self.args.optim.value} does not support row-sparse gradients: use adamw_torch, or "
                    "set row_sparse_gradients to false and leave out row_sparse_modules."
                )
            options.pop("fused", None)
            return RowSparseAdamW, {**options, "row_state": state}
        if state != "float32":
            raise SettingsError(
                f"--table_optimizer_state {state} needs --row_sparse_gradients true or --row_sparse_modules."
            )
        return optimizer_class, options

    def _train_rows_sparsely(self):
        if names := self._table_settings.row_sparse_modules:
            try:
                train_rows_sparsely(self.model, names)
            except ValueError as error:
                raise SettingsError(f"--row_sparse_modules {' '.join(names)}: {error}") from error

    def _prepare_row_sparse(self):
        kind = self.accelerator.distributed_type
        if kind.value.startswith("MULTI_"):
            average_over_processes(self.model)
        elif kind != DistributedType.NO:
            raise SettingsError(
                f"row-sparse gradients need one process or DistributedDataParallel; {kind.value} reduces only dense "
                "gradients. Set row_sparse_gradients to false and leave out row_sparse_modules."
            )

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The scheduler that the arguments name, with the separate schedule of expert tables."""
        if self.lr_scheduler is None:
            settings = self._table_settings
            try:
                scheduler = super().create_scheduler(num_training_steps, optimizer)
                self.lr_scheduler = schedule_tables(
                    scheduler,
                    settings.table_learning_rate_schedule,
                    settings.table_learning_rate_multiple,
                    num_training_steps,
                )
            except (ValueError, TypeError, KeyError) as error:
                name = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
                options = self.args.lr_scheduler_kwargs or {}
                raise SettingsError(
                    f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {options}: {error}"
                ) from error
        return self.lr_scheduler

    def training_step(self, *args, **kwargs):
        """Forward and backward, with the kind of gradients that the run asks for."""
        with row_sparse_gradients(self.model, self._row_sparse_experts):
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model):
        grad_norm = self._clip_apart(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            grad_norm = self._clip_apart(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clip_apart(self, model, max_norm: float) -> torch.Tensor | None:
        """The gradient norm of all weights but the tables; None if there are no separate tables to clip."""
        engines = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
        flattened = self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2
        if flattened or self.accelerator.distributed_type in engines or not trained_tables(model):
            return None
        self.accelerator.unscale_gradients()
        norms = clip_gradients(model, max_norm)
        self._table_grad_norm = norms.tables
        return norms.others

    def _get_learning_rate(self):
        rates = [group["lr"] for group in self.optimizer.param_groups if group.get("name") in TABLE_GROUPS]
        self._table_learning_rate = float(rates[0]) if rates else None
        return super()._get_learning_rate()

    def log(self, logs, *args, **kwargs):
        """Log as Trainer does, with the gradient norm and the learning rate of the tables."""
        if "grad_norm" in logs and self._table_grad_norm is not None:
            logs["table_grad_norm"] = self._table_grad_norm.item()
        if "learning_rate" in logs and self._table_learning_rate is not None:
            logs["table_learning_rate"] = self._table_learning_rate
        super().log(logs, *args, **kwargs)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Trainer of a language model: its card, its upload, evaluations without auxiliary losses, a stop at NaN."""

import math
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.model_card import write_model_card
from modeling_peer.hub.pushing import explained_creation, explained_upload
from modeling_peer.training.trainer import PeerTrainer

LOSSES = ("loss", "eval_loss", "train_loss")


class LanguageModelTrainer(PeerTrainer):
    """Trainer whose model card is ours, also in `push_to_hub`, and which ends when the numbers are none."""

    card_facts: dict[str, Any] | None = None  # set once there are results

    def create_model_card(self, *args, **kwargs):
        """Write README.md into output_dir, with the results measured so far."""
        if self.is_world_process_zero() and self.card_facts:
            write_model_card(self.args.output_dir, self.card_facts)

    def init_hf_repo(self, *args, **kwargs):
        """Create the repository; a failure is one sentence. Trainer calls it before training."""
        with explained_creation(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """Save and upload; if the upload fails, the error names the folder with the saved model."""
        with explained_upload(self.hub_model_id or self.args.hub_model_id or "MODEL_ID", self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluate by the task's loss alone, so that models with auxiliary losses compare with models without."""
        if getattr(self.model.config, "has_aux_losses", False):
            inputs = {**inputs, "router_aux_loss_coef": 0.0}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """Log, unless a loss is not a number: then the run is over."""
        for name in LOSSES:
            if not math.isfinite(logs.get(name, 0.0)):
                raise self._diverged(f"{name} is {logs[name]}")
        super().log(logs, *args, **kwargs)

    def save_model(self, *args, **kwargs):
        """Save, unless a weight is not a number: it would take the place of a good checkpoint."""
        # a part of a sharded model is no ground for one process to stop alone
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            for name, value in chain(self.model.named_parameters(), self.model.named_buffers()):
                if not torch.isfinite(value).all():
                    raise self._diverged(f"{name} has values that are not finite")
        super().save_model(*args, **kwargs)

    def _diverged(self, what: str) -> SettingsError:
        return SettingsError(
            f"training diverged: {what} at step {self.state.global_step}. Lower --learning_rate, or set --dtype "
            f"float32. What was saved before is in {self.args.output_dir}."
        )


class TimeLimit(TrainerCallback):
    """Ends training after `seconds`, so that a slow machine gives a worse model rather than a late one."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        over = time.monotonic() - self.began > self.seconds
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # the first process decides: one that stops alone leaves the others waiting for its gradients
            decision = torch.tensor(int(over), device=args.device)
            torch.distributed.broadcast(decision, src=0)
            over = bool(decision)
        if over:
            control.should_training_stop = True

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How experts are used, logged while a model trains and when it is evaluated."""

import sys
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from modeling_peer.analysis.expert_usage import ExpertUsage, find_retrievals
from modeling_peer.query_norms_peer import is_recomputation


class ExpertUsageCallback(TrainerCallback):
    """Logs how the tokens used the experts of each sparse layer, to whatever Trainer reports to.

        Trainer(model, arguments, callbacks=[ExpertUsageCallback()], ...)

    adds to each log `expert_usage_layer_5`, `top_1_usage_layer_5`, `unevenness_layer_5` and `dead_experts_layer_5`
    (see `ExpertUsage.measure`), after `eval_` in evaluation, where they are in what `evaluate` returns, too. All
    processes' tokens count, padding and forwards recomputed by gradient checkpointing do not; what else runs in
    evaluation mode, as generation does, counts with the next evaluation. A resumed run counts from where it resumed.
    A model without sparse layers logs nothing.
    It takes 16 bytes an expert and, on two CPU cores, 0.1 % of a training step of `peer_mini`, 0.5 % with a million
    experts (`peer bench-usage`).

    Args:
        window_steps: optimizer steps that a figure of training covers at least. It covers those since the last one,
            and in few steps a large pool cannot be used up: 10 steps of 2,048 tokens with 128 experts each retrieve
            2.6 million experts, which of a million leave 8 % out even if chosen evenly.
    """

    def __init__(self, window_steps: int = 1):
        if window_steps < 1:
            raise ValueError(f"window_steps must be at least 1, got {window_steps}: figures cover whole steps.")
        self.window_steps = window_steps
        self.window_began = 0  # step
        self.usage: dict[tuple[str, bool], ExpertUsage] = {}  # by name of the layer, and whether in training
        self.hooks = []

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._step_before_the_reporters()
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.usage = [], {}
        for name, retrieval in find_retrievals(model):
            self.hooks.append(retrieval.register_forward_hook(self._counter(name)))
            for training in (True, False):  # both now: a compiled forward cannot make them
                self.usage[name, training] = ExpertUsage(retrieval.config.num_peer_experts, args.device)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Again: a trial of a search has a model of its own, and a callback may have been added to a finished Trainer.
        self.on_init_end(args, state, control, model)
        self.window_began = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        runtime = next((key for key in logs if key.endswith("_runtime")), "")  # an evaluation's has its prefix
        if not runtime:
            if "loss" not in logs or state.global_step - self.window_began < self.window_steps:
                return
            self.window_began = state.global_step
        elif runtime == "train_runtime":  # the last words on a run
            return
        prefix = runtime.removesuffix("runtime")
        figures = {prefix + name: value for name, value in self._take_figures(training=not runtime).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # a copy of the logs, made before anybody was told

    def on_predict(self, args, state, control, **kwargs):
        self._take_figures(training=False)  # predictions are not logged

    def _counter(self, name: str) -> Callable:
        def count(retrieval, args, output):
            if not is_recomputation():
                gates, expert_ids = output
                token_mask = args[1] if len(args) > 1 else None
                self.usage[name, retrieval.training].add(gates, expert_ids, token_mask)

        return count

    def _take_figures(self, training: bool) -> dict[str, float]:
        """Figures of every layer, by the keys they are logged under; counting begins anew."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        figures = {}
        for (name, in_training), usage in self.usage.items():
            if in_training != training:
                continue
            if distributed:
                torch.distributed.all_reduce(usage.sums)
            figures |= {f"{figure}_{name}": value for figure, value in usage.measure().items()}
            usage.reset()
        return figures

    def _step_before_the_reporters(self):
        # Trainer tells its report integrations before the user's callbacks, whose additions to a log come too late,
        # and hands the list of them to nobody. But the handler that calls us is on the stack.
        frame = sys._getframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks.remove(self)
                handler.callbacks.insert(0, self)
                return
            frame = frame.f_back

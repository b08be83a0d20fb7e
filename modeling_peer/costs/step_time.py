# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time of a training step of one model, relative to that of another."""

import copy

import torch

from modeling_peer import PeerConfig
from modeling_peer.costs.timing import Clock, interleave
from modeling_peer.costs.training_steps import make_token_ids, make_training_step
from modeling_peer.hub.loading import language_model_class


def step_time_ratio(
    config: PeerConfig,
    reference: PeerConfig,
    sequence_length: int,
    batch_size: int = 4,
    device: str | None = None,
    repeats: int = 9,
    max_seconds: float = 20.0,
) -> float:
    """Median seconds of a training step of `config`, divided by those of `reference`.

    Both models have new weights and PyTorch's AdamW, or the AdamW for row-sparse gradients if the configuration has
    them. Their steps are measured alternately. A study measures the steps of its own recipes instead
    (`modeling_peer.training.measured_steps`).

    Args:
        device: device of both models. Default: CUDA if available, else the CPU.
        repeats, max_seconds: as in `interleave`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps = {}
    for name, one in (("candidate", config), ("reference", reference)):
        with torch.device(device):
            model = language_model_class(one).from_config(copy.deepcopy(one))
        steps[name] = make_training_step(model, one.row_sparse_gradients)
    vocab_size = min(config.vocab_size, reference.vocab_size)

    def new_input(number):
        return make_token_ids(vocab_size, (batch_size, sequence_length), seed=0, number=number, device=device)

    measured = interleave(steps, new_input, Clock(torch.device(device)), repeats, max_seconds)
    return measured["candidate"].median_ms / measured["reference"].median_ms

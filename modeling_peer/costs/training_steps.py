# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training steps of a language model, to measure time and memory."""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from modeling_peer.optim import RowSparseAdamW

# so small that the steps of a benchmark do not change the routing
LEARNING_RATE = 1e-7


def build_optimizer(parameters: Iterable[torch.nn.Parameter], row_sparse_gradients: bool) -> torch.optim.Optimizer:
    """PyTorch's AdamW with its usual settings, or the AdamW for row-sparse gradients."""
    options = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return (RowSparseAdamW if row_sparse_gradients else torch.optim.AdamW)(parameters, **options)


def make_training_step(model: PreTrainedModel, row_sparse_gradients: bool) -> Callable[[torch.Tensor], None]:
    """A training step as a function of token ids: forward, backward, update, and freeing the gradients."""
    optimizer = build_optimizer(model.parameters(), row_sparse_gradients)

    def train(input_ids):
        model.train()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def make_token_ids(vocab_size: int, shape: tuple[int, int], seed: int, number: int, device: str) -> torch.Tensor:
    """Random token ids `(batch_size, length)`, different for each `number`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return torch.randint(vocab_size, shape, generator=generator, device=generator.device).to(device)

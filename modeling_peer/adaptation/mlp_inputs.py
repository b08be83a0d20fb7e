# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What MLPs read on a sample of text: its covariance, from which the readers of new experts can be drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a call of an MLP.

    Raises:
        TypeError: there are none.
    """
    for value in (*args, *(kwargs.get(name) for name in ("hidden_states", "x", "hidden_state"))):
        if torch.is_tensor(value):
            return value
    raise TypeError("the MLP was called without hidden states: they must be its first argument.")


@torch.no_grad()
def input_covariances(model: PreTrainedModel, mlps: Sequence[nn.Module], tokens: torch.Tensor) -> list[torch.Tensor]:
    """The covariance of what each of some MLPs of `model` reads, in evaluation, over all tokens of a sample.

    Sequences pass one by one. Memory holds a matrix for each MLP, and not the inputs.

    Args:
        tokens: `(num_sequences, sequence_length)`, without padding.

    Returns:
        `(hidden_size, hidden_size)` for each MLP, float64, on the CPU.

    Raises:
        ValueError: the sample is no batch of token ids of this model, has fewer tokens than the width of the model,
            or the inputs are not finite.
    """
    width = _check_sample(model, tokens)
    sums = [torch.zeros(width, dtype=torch.float64) for _ in mlps]
    products = [torch.zeros(width, width, dtype=torch.float64) for _ in mlps]

    def add(number):
        def hook(module, args, kwargs):
            inputs = hidden_states_of(args, kwargs).reshape(-1, width).to("cpu", torch.float64)
            sums[number] += inputs.sum(0)
            products[number] += inputs.T @ inputs

        return hook

    handles = [mlp.register_forward_pre_hook(add(i), with_kwargs=True) for i, mlp in enumerate(mlps)]
    was_training = model.training
    model.eval()
    try:
        for sequence in tokens.to(model.device).split(1):
            model(input_ids=sequence, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    means = [total / tokens.numel() for total in sums]
    covariances = [
        product / tokens.numel() - torch.outer(mean, mean) for product, mean in zip(products, means, strict=True)
    ]
    if not all(one.isfinite().all() for one in covariances):
        raise ValueError("readers='inputs': on the sample, an MLP reads NaN or infinity. Use readers='random'.")
    return covariances


def _check_sample(model: PreTrainedModel, tokens: torch.Tensor) -> int:
    """The width of the model; ValueError if the sample does not fit."""
    config = model.config.get_text_config()
    if not torch.is_tensor(tokens) or tokens.dim() != 2 or tokens.is_floating_point():
        shown = tuple(tokens.shape) if torch.is_tensor(tokens) else type(tokens).__name__
        raise ValueError(f"the sample must be token ids (num_sequences, sequence_length); got {shown}.")
    if tokens.numel() < config.hidden_size:
        raise ValueError(
            f"readers='inputs': the sample has {tokens.numel()} tokens, and the covariance of {config.hidden_size} "
            f"features needs at least {config.hidden_size}. Use a longer text, or readers='random'."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokens.shape[1] > longest:
        raise ValueError(
            f"the sample has sequences of {tokens.shape[1]} tokens, and the model reads {longest} at most."
        )
    lowest, highest = (int(one) for one in tokens.aminmax())
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(f"the sample has token ids {lowest} to {highest}; the model has {config.vocab_size} tokens.")
    return config.hidden_size


def root_of_covariance(covariance: torch.Tensor) -> torch.Tensor:
    """A matrix R with `R @ R.T` equal to a covariance, `(hidden_size, hidden_size)`; singular ones have one too."""
    variances, directions = torch.linalg.eigh(covariance)
    return directions * variances.clamp(min=0).sqrt()

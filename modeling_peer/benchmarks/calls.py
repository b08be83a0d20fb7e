# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What is measured of a contender: on which tokens, doing what."""

from collections.abc import Callable

import torch

from modeling_peer.benchmarks.contenders import Contender, row_sparse, state_owner
from modeling_peer.benchmarks.settings import Case, LayerArguments
from modeling_peer.costs.training_steps import build_optimizer


def make_tokens(case: Case, settings: LayerArguments, number: int) -> torch.Tensor:
    """Tokens of unit variance, as a layer gets them behind RMSNorm: `(1, num_tokens, hidden_size)`."""
    generator = torch.Generator(settings.device).manual_seed(1_000_003 * settings.seed + number)
    shape = (1, case.num_tokens, case.hidden_size)
    return torch.randn(shape, generator=generator, device=settings.device, dtype=settings.torch_dtype)


def make_call(
    contender: Contender, case: Case, settings: LayerArguments, optimizers: dict
) -> Callable[[torch.Tensor], None]:
    """What is measured: a function of the tokens.

    decode, forward: evaluation, without gradients. forward_backward: gradients of tokens and of all parameters, and
    freeing them, as every step of a training does. step: with the optimizer's update.

    Args:
        optimizers: those made so far; contenders that share weights and kind of gradient share one; by `state_owner`.
    """
    module = contender.module
    step = None
    if case.task == "step":
        owner = state_owner(contender.name)
        if owner not in optimizers:
            optimizers[owner] = build_optimizer(module.parameters(), contender.name == row_sparse(settings.device))
        step = optimizers[owner].step

    def call(tokens):
        if module.training != case.trains:  # a program switches once, not at every token: 0.02 of 0.4 ms
            module.train(case.trains)
        if not case.trains:
            with torch.no_grad():
                module(tokens)
            return
        hidden_states = tokens.detach().requires_grad_()
        module(hidden_states).backward(tokens)
        if step is not None:
            step()
        for parameter in module.parameters():
            parameter.grad = None

    return call

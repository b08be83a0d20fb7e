# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The inputs and the calls that a benchmark times."""

from collections.abc import Callable

import torch

from modeling_peer.benchmarks.contenders import Contender, row_sparse, state_owner
from modeling_peer.benchmarks.settings import Case, LayerArguments
from modeling_peer.costs.training_steps import build_optimizer


def make_tokens(case: Case, settings: LayerArguments, number: int) -> torch.Tensor:
    """Random tokens of unit variance, as RMSNorm gives them to a layer: `(1, num_tokens, hidden_size)`."""
    generator = torch.Generator(settings.device).manual_seed(1_000_003 * settings.seed + number)
    shape = (1, case.num_tokens, case.hidden_size)
    return torch.randn(shape, generator=generator, device=settings.device, dtype=settings.torch_dtype)


def make_call(
    contender: Contender, case: Case, settings: LayerArguments, optimizers: dict
) -> Callable[[torch.Tensor], None]:
    """The timed call: a function of the tokens.

    - `decode` and `forward` evaluate without gradients.
    - `forward_backward` computes the gradients of tokens and of all parameters, and frees them.
    - `step` also runs the optimizer's update.

    Args:
        optimizers: the optimizers made so far, by `state_owner`. Contenders that share weights and kind of gradient
            share an optimizer. A new one is added.
    """
    module = contender.module
    step = None
    if case.task == "step":
        owner = state_owner(contender.name)
        if owner not in optimizers:
            optimizers[owner] = build_optimizer(module.parameters(), contender.name == row_sparse(settings.device))
        step = optimizers[owner].step

    def call(tokens):
        if module.training != case.trains:  # only if needed: a switch at every token would cost 0.02 of 0.4 ms
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

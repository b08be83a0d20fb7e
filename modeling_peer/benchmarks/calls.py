"""What is measured of a contestant: on which tokens, doing what."""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from modeling_peer.benchmarks.contestants import Contestant, row_sparse, state_owner
from modeling_peer.benchmarks.settings import Case, LayerArguments
from modeling_peer.training import RowSparseAdamW

# so small that a benchmark's steps leave the routing as it is
LEARNING_RATE = 1e-7


def make_tokens(case: Case, settings: LayerArguments, number: int) -> torch.Tensor:
    """Tokens of unit variance, as a layer gets them behind RMSNorm: `(1, num_tokens, hidden_size)`."""
    generator = torch.Generator(settings.device).manual_seed(1_000_003 * settings.seed + number)
    shape = (1, case.num_tokens, case.hidden_size)
    return torch.randn(shape, generator=generator, device=settings.device, dtype=settings.torch_dtype)


def make_call(
    contestant: Contestant, case: Case, settings: LayerArguments, optimizers: dict
) -> Callable[[torch.Tensor], None]:
    """What is measured: a function of the tokens.

    decode, forward: evaluation, without gradients. forward_backward: gradients of tokens and of all parameters, and
    freeing them, as every step of a training does. step: with the optimizer's update.

    Args:
        optimizers: those made so far; contestants that share weights and kind of gradient share one; by `state_owner`.
    """
    module = contestant.module
    step = None
    if case.task == "step":
        owner = state_owner(contestant.name)
        if owner not in optimizers:
            optimizers[owner] = build_optimizer(module.parameters(), contestant.name == row_sparse(settings.device))
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


def build_optimizer(parameters: Iterable[torch.nn.Parameter], row_sparse_gradients: bool) -> torch.optim.Optimizer:
    """AdamW as anyone would use it, or the one that takes row-sparse gradients."""
    options = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return (RowSparseAdamW if row_sparse_gradients else torch.optim.AdamW)(parameters, **options)


def make_training_step(model: PreTrainedModel, row_sparse_gradients: bool) -> Callable[[torch.Tensor], None]:
    """A whole step of training a language model, its update included, as a function of token ids."""
    optimizer = build_optimizer(model.parameters(), row_sparse_gradients)

    def train(input_ids):
        model.train()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def make_token_ids(vocab_size: int, shape: tuple[int, int], seed: int, number: int, device: str) -> torch.Tensor:
    """Random token ids `(batch_size, length)`, others for each number."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return torch.randint(vocab_size, shape, generator=generator, device=generator.device).to(device)

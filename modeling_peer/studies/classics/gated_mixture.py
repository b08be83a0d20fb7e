# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Mixtures of logistic experts under a softmax gate, and networks with one hidden layer; many runs at once.

The models of Jacobs, Jordan, Nowlan & Hinton 1991, "Adaptive Mixtures of Local Experts" (Neural Computation 3, 79-87),
with one output unit. All runs of a system train in one batch: a run is a slice of every parameter. Parameters are
float64, so that results do not depend on the processor by more than rounding.

Shapes: r runs, m experts or hidden units, t cases, i inputs. The last input is the constant 1, for the bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The error functions of the paper, by number of its equation.
COOPERATIVE, COMPETITIVE, LIKELIHOOD = "1.1 cooperative", "1.2 competitive", "1.3 likelihood"
ERRORS = (COOPERATIVE, COMPETITIVE, LIKELIHOOD)


@dataclass(frozen=True)
class GatedMixture:
    """Experts with one logistic output each, and a gate that is linear in the input.

    The gate starts at 0, so that all experts have equal proportions in all cases, as in the paper. The experts start
    different: uniform in `[-scale, scale]`, our choice.

    Args:
        num_experts: experts.
        error: one of `ERRORS`.
    """

    num_experts: int
    error: str = LIKELIHOOD
    scale: float = 0.5

    def initialize(self, num_runs: int, num_inputs: int, generator: torch.Generator) -> list[Tensor]:
        """Weights of the experts and of the gate, both `(r, m, i)`."""
        experts = _uniform((num_runs, self.num_experts, num_inputs), self.scale, generator)
        return [experts, torch.zeros_like(experts)]

    def proportions(self, parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """The gate's mixing proportions, `(r, m, t)`; they sum to 1 over the experts."""
        return _linear(parameters[1], inputs).softmax(1)

    def expert_outputs(self, parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Each expert's probability of class 1, `(r, m, t)`."""
        return _linear(parameters[0], inputs).sigmoid()

    def outputs_and_error(
        self, parameters: Sequence[Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the mixture, and the error that training reduces.

        Args:
            inputs: `(t, i)`.
            targets: `(t,)`, 0 or 1.

        Returns:
            outputs: the experts' outputs, weighted by their proportions, `(r, t)`.
            error: mean over the cases, `(r,)`.
        """
        gate = _linear(parameters[1], inputs)
        experts, proportions = self.expert_outputs(parameters, inputs), gate.softmax(1)
        outputs = (proportions * experts).sum(1)
        if self.error == COOPERATIVE:
            return outputs, (targets - outputs).square().mean(1)
        squared_errors = (targets - experts).square()
        if self.error == COMPETITIVE:
            return outputs, (proportions * squared_errors).sum(1).mean(1)
        # -log of the sum of p exp(-e/2), without forming either factor
        return outputs, -(gate.log_softmax(1) - squared_errors / 2).logsumexp(1).mean(1)


@dataclass(frozen=True)
class HiddenLayerNetwork:
    """A network with one layer of logistic hidden units and one logistic output: the paper's back-propagation nets.

    Weights start uniform in `[-scale, scale]`, our choice.
    """

    num_hidden: int
    scale: float = 0.5

    def initialize(self, num_runs: int, num_inputs: int, generator: torch.Generator) -> list[Tensor]:
        """Weights of the hidden units, `(r, m, i)`, and of the output, `(r, 1, m + 1)` with its bias."""
        hidden = _uniform((num_runs, self.num_hidden, num_inputs), self.scale, generator)
        return [hidden, _uniform((num_runs, 1, self.num_hidden + 1), self.scale, generator)]

    def outputs_and_error(
        self, parameters: Sequence[Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedMixture.outputs_and_error`; the error is the mean squared error."""
        hidden = _linear(parameters[0], inputs).sigmoid()  # (r, m, t)
        weights, bias = parameters[1][..., :-1], parameters[1][..., -1]
        outputs = ((weights @ hidden)[:, 0] + bias).sigmoid()
        return outputs, (targets - outputs).square().mean(1)


def train_to_criterion(
    model: GatedMixture | HiddenLayerNetwork,
    parameters: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    learning_rates: Tensor,
    criterion: float,
    max_epochs: int,
    after_each: Callable[[int, int], None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gradient descent with a fixed step size, one update per pass through all cases, for each run by itself.

    Args:
        parameters: the start, as by `model.initialize`; they are not changed.
        learning_rates: `(r,)`, the step sizes. The gradient is that of the mean error over the cases.
        criterion: a run ends when the mean squared error of its outputs is at most this.
        max_epochs: a run ends after this many updates.
        after_each: called with the number of updates and the number of runs that go on.

    Returns:
        parameters: those with which each run ended.
        epochs: `(r,)`, int64, the updates until the criterion was met; -1 where it was not.
    """
    final = [values.clone() for values in parameters]
    epochs = torch.full((len(learning_rates),), -1)
    going = torch.arange(len(learning_rates))  # runs that finished leave the batch
    current = [values.clone().requires_grad_() for values in parameters]
    for epoch in range(max_epochs + 1):
        outputs, errors = model.outputs_and_error(current, inputs, targets)
        met = (outputs.detach() - targets).square().mean(1) <= criterion
        if met.any():
            epochs[going[met]] = epoch
            for kept, values in zip(final, current, strict=True):
                kept[going[met]] = values.detach()[met]
            going = going[~met]
            current = [values.detach()[~met].requires_grad_() for values in current]
            if len(going) == 0:
                break
            _, errors = model.outputs_and_error(current, inputs, targets)
        if epoch == max_epochs:
            break
        gradients = torch.autograd.grad(errors.sum(), current)
        with torch.no_grad():
            steps = learning_rates[going, None, None]
            for values, gradient in zip(current, gradients, strict=True):
                values -= steps * gradient
        if after_each:
            after_each(epoch + 1, len(going))
    for kept, values in zip(final, current, strict=True):
        kept[going] = values.detach()
    return final, epochs


def num_used_experts(model: GatedMixture, parameters: Sequence[Tensor], inputs: Tensor, share: float = 0.05) -> Tensor:
    """How many experts have a proportion above `share` in at least one case, `(r,)`."""
    return (model.proportions(parameters, inputs).amax(2) > share).sum(1)


def _linear(weights: Tensor, inputs: Tensor) -> Tensor:
    """`(r, m, i)` times `(t, i)`: `(r, m, t)`, as one product of matrices."""
    return (weights.flatten(0, 1) @ inputs.T).unflatten(0, weights.shape[:2])


def _uniform(shape: Sequence[int], scale: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * scale

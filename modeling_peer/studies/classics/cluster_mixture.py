# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Data and models of Chen, Deng, Wu, Gu & Li 2022: clusters of patches, and experts of linear or cubic filters.

"Towards Understanding the Mixture-of-Experts Layer in Deep Learning" (arXiv:2208.02813), definition 3.1. Sizes and
ranges are those of the authors' notebooks (github.com/uclaml/MoE, synthetic_demo_s1.ipynb to s4). Each example has
four patches, in any order: a feature of its cluster, whose sign is the label; the center of its cluster; a feature of
another cluster, with a random sign; noise.

Shapes: n examples, d numbers per patch, k clusters, m experts, j filters per class and expert.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

NUM_CLUSTERS, PATCH_SIZE, NUM_PATCHES, NUM_CLASSES = 4, 50, 4, 2
# The authors multiply all inputs by this.
INPUT_SCALE = 10
# Ranges of the uniform strengths of feature and center.
FEATURE_STRENGTH, CENTER_STRENGTH = (0.5, 2.0), (1.0, 2.0)


class Setting(NamedTuple):
    """What the four settings differ in."""

    max_distractor: float  # strength of the other cluster's feature: uniform from 0.5 to this
    noise: float  # norm of the noise patch, on average


class Examples(NamedTuple):
    """Examples as what their patches are made of. All models sum over patches, so that the order does not matter."""

    noise: Tensor  # (n, d), the noise patch
    strengths: Tensor  # (n, 3), signed strengths of the other patches
    directions: Tensor  # (n, 3), int64, their rows in `basis`
    basis: Tensor  # (2 k, d), orthonormal: features of the clusters, then centers
    labels: Tensor  # (n,), int64, 0 or 1
    clusters: Tensor  # (n,), int64

    def patches(self) -> Tensor:
        """All patches, `(n, 4, d)`."""
        return torch.cat([self.strengths[..., None] * self.basis[self.directions], self.noise[:, None]], 1)


def draw_examples(setting: Setting, num_examples: int, basis: Tensor, generator: torch.Generator) -> Examples:
    """Draw examples of one setting: definition 3.1 of the paper, times 10.

    Args:
        basis: as by `draw_basis`.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_examples, generator=generator, dtype=torch.float64)

    def draw(count: int) -> Tensor:
        return torch.randint(count, (num_examples,), generator=generator)

    labels, signs = draw(2), 2 * draw(2) - 1
    clusters = draw(NUM_CLUSTERS)
    others = (clusters + 1 + draw(NUM_CLUSTERS - 1)) % NUM_CLUSTERS
    strengths = torch.stack(
        [
            (2 * labels - 1) * uniform(*FEATURE_STRENGTH),
            uniform(*CENTER_STRENGTH),
            signs * uniform(0.5, setting.max_distractor),
        ],
        1,
    )
    noise = torch.randn(num_examples, PATCH_SIZE, generator=generator, dtype=torch.float64)
    noise *= INPUT_SCALE * setting.noise / math.sqrt(PATCH_SIZE)
    directions = torch.stack([clusters, NUM_CLUSTERS + clusters, others], 1)
    return Examples(noise, INPUT_SCALE * strengths, directions, basis, labels, clusters)


def draw_basis(generator: torch.Generator) -> Tensor:
    """Features and centers of the clusters: `(2 k, d)`, orthonormal rows."""
    matrix = torch.randn(PATCH_SIZE, 2 * NUM_CLUSTERS, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.T.contiguous()


class Model(NamedTuple):
    """Experts, and the router of a mixture."""

    weights: Tensor  # (m, 2, j, d)
    biases: Tensor  # (m, 2, j)
    router: Tensor | None  # (m, d); None: one expert


def new_model(num_experts: int, filters_per_class: int, scale: float, generator: torch.Generator) -> Model:
    """Filters start uniform, as in PyTorch's convolution, times `scale`; the router starts at 0."""

    def uniform(*shape: int) -> Tensor:
        bound = scale / math.sqrt(PATCH_SIZE)
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * bound

    weights = uniform(num_experts, NUM_CLASSES, filters_per_class, PATCH_SIZE)
    biases = uniform(num_experts, NUM_CLASSES, filters_per_class)
    router = torch.zeros(num_experts, PATCH_SIZE, dtype=torch.float64) if num_experts > 1 else None
    return Model(weights, biases, router)


def expert_outputs(model: Model, examples: Examples, sums: Tensor, experts: Tensor, cubic: bool) -> Tensor:
    """Output of one expert for each example: the sum over its filters and all patches of σ(w·x + b), for each class.

    σ is the cube or the identity. For the identity, filters are summed before the product. For the cube, a patch that
    is s times a vector v needs only (s w·v + b)³, a polynomial in s whose coefficients are sums over the filters.

    Args:
        sums: sum of the patches, `(n, d)`.
        experts: `(n,)`, int64.

    Returns:
        `(n, 2)`.
    """
    if not cubic:
        outputs = sums @ model.weights.sum(2).flatten(0, 1).T + NUM_PATCHES * model.biases.sum(2).flatten()
        return outputs.unflatten(1, (-1, NUM_CLASSES))[torch.arange(len(experts)), experts]
    along = (model.weights @ examples.basis.T).transpose(2, 3)  # (m, 2, 2 k, j)
    biases = model.biases[:, :, None]
    parts = [biases**3 + 0 * along, 3 * along * biases**2, 3 * along**2 * biases, along**3]
    table = torch.stack([part.sum(3) for part in parts], 3).transpose(1, 2)  # (m, 2 k, 2, 4)
    rows = experts[:, None] * len(examples.basis) + examples.directions
    coefficients = embedding(rows, table.reshape(-1, NUM_CLASSES * 4)).unflatten(2, (NUM_CLASSES, 4))
    s = examples.strengths
    powers = torch.stack([torch.ones_like(s), s, s * s, s * s * s], 2)
    outputs = torch.einsum("npcq,npq->nc", coefficients, powers)
    # each expert computes on the noise of its own examples
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=len(model.weights)).tolist()
    of_noise = [
        ((own @ weights.flatten(0, 1).T + bias.flatten()) ** 3).unflatten(1, weights.shape[:2]).sum(2)
        for own, weights, bias in zip(examples.noise[order].split(counts), model.weights, model.biases, strict=True)
    ]
    return outputs + torch.cat(of_noise)[order.argsort()]


def route(model: Model, sums: Tensor, noise: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Send each example to the expert with the highest score plus noise.

    Args:
        noise: `(n, m)`.
        gate: `logit` or `softmax`, see `ClusterArguments`.

    Returns:
        gates, `(n,)`, and experts, `(n,)`, int64.
    """
    scores = sums @ model.router.T
    noisy = scores + noise
    experts = noisy.detach().argmax(1)
    gates = noisy if gate == "logit" else scores.softmax(1)
    return gates[torch.arange(len(experts)), experts], experts


def count_dispatched(clusters: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Examples of each cluster that each expert is sent, `(k, m)`, int64."""
    return (clusters * num_experts + experts).bincount(minlength=NUM_CLUSTERS * num_experts).view(NUM_CLUSTERS, -1)


def dispatch_entropy(clusters: Tensor, experts: Tensor, num_experts: int) -> float:
    """Entropy of the clusters that an expert is sent, in nats, averaged over the examples.

    0: each expert is sent one cluster. ln(clusters), 1.386 for four: the router ignores clusters.
    """
    counts = count_dispatched(clusters, experts, num_experts).double()
    shares = counts / counts.sum(0).clamp(min=1)
    entropies = -torch.special.xlogy(shares, shares).sum(0)
    return float((counts.sum(0) / counts.sum() * entropies).sum())


@torch.no_grad()
def accuracy(
    model: Model, examples: Examples, cubic: bool, gate: str = "softmax", noise: Tensor | None = None
) -> float:
    """Correct examples, in %. `noise`: routing noise, `(n, m)`; None: without."""
    sums = examples.patches().sum(1)
    if model.router is None:
        gates, experts = sums.new_ones(len(sums)), torch.zeros_like(examples.labels)
    else:
        gates, experts = route(model, sums, sums.new_zeros(()) if noise is None else noise, gate)
    outputs = gates[:, None] * expert_outputs(model, examples, sums, experts, cubic)
    return 100 * float((outputs.argmax(1) == examples.labels).double().mean())


def routing_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)

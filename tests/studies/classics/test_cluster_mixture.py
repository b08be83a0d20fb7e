# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The cluster data of 2022 by their definition, experts against convolutions, routing and its entropy."""

import math

import pytest
import torch
from torch.nn.functional import conv1d

from modeling_peer.studies.classics.cluster_mixture import (
    INPUT_SCALE,
    NUM_CLUSTERS,
    PATCH_SIZE,
    Model,
    dispatch_entropy,
    draw_basis,
    draw_examples,
    expert_outputs,
    new_model,
    route,
)
from modeling_peer.studies.classics.clusters_2022 import SETTINGS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def examples_of(setting=1, num_examples=50, seed=0):
    source = generator(seed)
    basis = draw_basis(source)
    return draw_examples(SETTINGS[setting], num_examples, basis, source), draw_examples(
        SETTINGS[setting], num_examples, basis, source
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_examples_are_those_of_the_definition(setting):
    examples, _ = examples_of(setting, num_examples=2000)
    basis = examples.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    feature, center, distractor, noise = (examples.patches() / INPUT_SCALE).unbind(1)
    rows = torch.arange(2000)
    along = (feature @ basis.T)[rows, examples.clusters]
    assert torch.equal(along > 0, examples.labels == 1)  # the sign of the feature is the label
    # (patch, its direction, range of its strength)
    cases = [
        (feature, examples.clusters, 0.5, 2),
        (center, NUM_CLUSTERS + examples.clusters, 1, 2),
        (distractor, examples.directions[:, 2], 0.5, SETTINGS[setting].max_distractor),
    ]
    for patch, direction, low, high in cases:
        strength = (patch @ basis.T)[rows, direction].abs()
        torch.testing.assert_close(patch.norm(dim=1), strength)  # along that direction alone
        assert low <= strength.min() < low + 0.05
        assert high - 0.05 < strength.max() <= high
    assert (examples.directions[:, 2] < NUM_CLUSTERS).all()
    assert (examples.directions[:, 2] != examples.clusters).all()
    # a chi-squared sum of 2000 x 50 squares: 1 ± 0.0045
    spread = noise.square().sum(1).mean() / SETTINGS[setting].noise ** 2
    assert abs(spread - 1) < 0.03
    for counts in (examples.clusters.bincount(), examples.directions[:, 2].bincount()):
        assert (abs(counts - 500) < 100).all()  # five standard deviations
    assert abs(examples.labels.sum() - 1000) < 120


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_experts_compute_what_a_convolution_over_the_patches_computes(cubic, num_experts):
    examples, _ = examples_of(num_examples=20)
    model = new_model(num_experts, 5, 1.0, generator(1))
    experts = torch.arange(20) % num_experts
    experts[experts == 1] = 0  # an expert without examples
    outputs = expert_outputs(model, examples, examples.patches().sum(1), experts, cubic)
    text = examples.patches().flatten(1)[:, None]  # as the authors have it: patches beside each other
    for n, expert in enumerate(experts.tolist()):
        weights, biases = model.weights[expert].flatten(0, 1)[:, None], model.biases[expert].flatten()
        filtered = conv1d(text[n : n + 1], weights, biases, stride=PATCH_SIZE)[0]  # (filters, patches)
        summed = (filtered**3 if cubic else filtered).sum(1).view(2, 5).sum(1)
        magnitude = (filtered.abs() ** 3 if cubic else filtered.abs()).sum()
        torch.testing.assert_close(outputs[n], summed, rtol=0, atol=float(magnitude) * 1e-12)


def test_an_example_goes_to_its_highest_noisy_score_and_the_gate_is_that_score_or_its_probability():
    sums = torch.randn(9, PATCH_SIZE, generator=generator(), dtype=torch.float64)
    model = new_model(4, 1, 1.0, generator(1))
    model = Model(*model[:2], torch.randn(4, PATCH_SIZE, generator=generator(2), dtype=torch.float64) / 10)
    noise = torch.rand(9, 4, generator=generator(3), dtype=torch.float64)
    scores = sums @ model.router.T
    for gate in ("logit", "softmax"):
        gates, experts = route(model, sums, noise, gate)
        for n in range(9):
            noisy = [float(score + extra) for score, extra in zip(scores[n], noise[n], strict=True)]
            assert int(experts[n]) == noisy.index(max(noisy))
            exponents = [math.exp(score) for score in scores[n].tolist()]
            expected = max(noisy) if gate == "logit" else exponents[experts[n]] / sum(exponents)
            assert float(gates[n]) == pytest.approx(expected)


def test_dispatch_entropy_is_zero_for_an_expert_per_cluster_and_ln_4_for_a_blind_router():
    clusters = torch.arange(40) % 4
    assert dispatch_entropy(clusters, clusters + 2, 8) == 0
    assert dispatch_entropy(clusters, torch.zeros_like(clusters), 8) == pytest.approx(math.log(4))
    # expert 0: two clusters of ten; expert 1: the other two, of which one is split over experts 1 and 2
    experts = torch.where(clusters < 2, 0, 1)
    experts[(clusters == 3) & (torch.arange(40) < 20)] = 2
    third = -(10 / 15 * math.log(10 / 15) + 5 / 15 * math.log(5 / 15))
    assert dispatch_entropy(clusters, experts, 8) == pytest.approx((20 * math.log(2) + 15 * third + 0) / 40)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training on the cluster data of 2022, its refusals, and the paper's claims."""

from statistics import mean

import pytest
from test_cluster_mixture import examples_of

from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.classics.cluster_mixture import accuracy
from modeling_peer.studies.classics.clusters_2022 import (
    EXPERT_RATE,
    ClusterArguments,
    run_clusters,
    train_mixture,
    train_single,
)


def test_a_step_moves_each_expert_by_the_same_length():
    train, _ = examples_of(num_examples=200)
    begun, moved = (
        train_mixture("cubic", train, ClusterArguments(num_experts=3, num_epochs=epochs), 5, lambda *_: None)[0]
        for epochs in (1, 2)
    )
    for expert in range(3):
        step = sum(
            float((after[expert] - before[expert]).norm()) for after, before in zip(moved[:2], begun[:2], strict=True)
        )
        assert step == pytest.approx(EXPERT_RATE, rel=1e-6)


def test_what_cannot_work_is_refused_with_the_known_names():
    cases = {
        r"--settings 5 must be one of 1, 2, 3, 4": {"settings": [5]},
        r"--mixtures 'quadratic' must be one of linear, cubic,": {"mixtures": ["quadratic"]},
        r"--single_filters \(7\) must be even": {"single_filters": [7]},
        r"--num_experts \(1\) must be at least 2": {"num_experts": 1},
        r"--gate 'hard' must be one of logit, softmax": {"gate": "hard"},
        r"--num_runs \(0\) must be at least 1": {"num_runs": 0},
        r"--num_epochs \(0\) must be at least 1": {"num_epochs": 0},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_clusters(ClusterArguments(**wrong))


@pytest.mark.slow
def test_cubic_experts_find_the_clusters_linear_ones_do_not_and_one_network_errs():
    """The paper's claims about setting 1, with an eighth of the examples and three runs."""
    train, test = examples_of(setting=1, num_examples=2000)
    arguments = ClusterArguments(num_epochs=150)
    entropies, accuracies = {}, {}
    for kind in ("linear", "cubic"):
        runs = [train_mixture(kind, train, arguments, seed, lambda *_: None) for seed in range(3)]
        assert min(curve[0] for _, curve, _ in runs) > 1.35  # the start is blind: ln 4 = 1.386
        entropies[kind] = mean(curve[-1] for _, curve, _ in runs)
        accuracies[kind] = mean(accuracy(model, test, kind == "cubic") for model, _, _ in runs)
    # measured: 0.3 and 1.27 nats
    assert entropies["cubic"] < 0.7
    assert entropies["linear"] > 1.0
    single = train_single("linear", 16, train, 300, 0, lambda *_: None)
    # the paper's bound for one expert
    assert accuracy(single, test, False) < 87.5 < accuracies["cubic"]

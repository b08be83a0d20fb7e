# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The models of 1991: error functions against loops and the paper's derivatives, and training of many runs at once."""

import math

import pytest
import torch

from modeling_peer.studies.classics.gated_mixture import (
    COMPETITIVE,
    COOPERATIVE,
    ERRORS,
    LIKELIHOOD,
    GatedMixture,
    HiddenLayerNetwork,
    num_used_experts,
    train_to_criterion,
)


def some_cases(num_cases=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_cases, 3, generator=generator, dtype=torch.float64)
    inputs[:, 2] = 1
    return inputs, (torch.rand(num_cases, generator=generator) > 0.5).double()


def start(model, num_runs=3, seed=1):
    """Random parameters of all kinds, the gate's too."""
    generator = torch.Generator().manual_seed(seed)
    parameters = model.initialize(num_runs, 3, generator)
    return [values + torch.randn(values.shape, generator=generator, dtype=torch.float64) for values in parameters]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dot(weights, values):
    return sum(float(w) * float(v) for w, v in zip(weights, values, strict=True))


def error_of_one_case(error, experts, gate, case, target):
    """The equations of the paper, for one case of one run. Returns also the proportions and the experts' outputs."""
    outputs = [sigmoid(dot(weights, case)) for weights in experts]
    scores = [math.exp(dot(weights, case)) for weights in gate]
    proportions = [score / sum(scores) for score in scores]
    pairs = list(zip(proportions, outputs, strict=True))
    if error == COOPERATIVE:
        value = (target - sum(p * o for p, o in pairs)) ** 2
    elif error == COMPETITIVE:
        value = sum(p * (target - o) ** 2 for p, o in pairs)
    else:
        value = -math.log(sum(p * math.exp(-0.5 * (target - o) ** 2) for p, o in pairs))
    return value, proportions, outputs


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_those_of_the_paper(error):
    model = GatedMixture(4, error)
    (inputs, targets), parameters = some_cases(), start(model)
    outputs, errors = model.outputs_and_error(parameters, inputs, targets)
    for run in range(3):
        by_case = [
            error_of_one_case(error, parameters[0][run], parameters[1][run], case, float(target))
            for case, target in zip(inputs, targets, strict=True)
        ]
        assert float(errors[run]) == pytest.approx(sum(value for value, _, _ in by_case) / len(by_case))
        blends = [sum(p * o for p, o in zip(*both, strict=True)) for _, *both in by_case]
        assert outputs[run].tolist() == pytest.approx(blends)


@pytest.mark.parametrize("error", [COMPETITIVE, LIKELIHOOD])
def test_derivatives_by_an_experts_output_are_those_of_equations_4_and_5(error):
    model = GatedMixture(3, error)
    inputs, targets = some_cases(1)
    parameters = [values.requires_grad_() for values in start(model, num_runs=1)]
    _, errors = model.outputs_and_error(parameters, inputs, targets)
    (gradient,) = torch.autograd.grad(errors.sum(), parameters[:1])
    target = float(targets[0])
    with torch.no_grad():
        _, proportions, outputs = error_of_one_case(error, *(values[0] for values in parameters), inputs[0], target)
    likelihoods = [p * math.exp(-0.5 * (target - o) ** 2) for p, o in zip(proportions, outputs, strict=True)]
    for expert, (p, o) in enumerate(zip(proportions, outputs, strict=True)):
        share = -2 * p if error == COMPETITIVE else -likelihoods[expert] / sum(likelihoods)
        by_bias = share * (target - o) * o * (1 - o)  # through the logistic unit, to its bias
        assert float(gradient[0, expert, 2]) == pytest.approx(by_bias)


def test_a_hidden_layer_network_computes_what_a_loop_computes():
    model = HiddenLayerNetwork(2)
    (inputs, targets), parameters = some_cases(), start(model)
    outputs, errors = model.outputs_and_error(parameters, inputs, targets)
    for run in range(3):
        expected = []
        for case in inputs:
            hidden = [sigmoid(dot(weights, case)) for weights in parameters[0][run]]
            expected.append(sigmoid(dot(parameters[1][run, 0], [*hidden, 1.0])))
        assert outputs[run].tolist() == pytest.approx(expected)
        squares = [(float(d) - o) ** 2 for d, o in zip(targets, expected, strict=True)]
        assert float(errors[run]) == pytest.approx(sum(squares) / len(squares))


def test_a_run_in_a_batch_trains_as_it_does_alone():
    inputs, targets = some_cases(40)
    model = GatedMixture(3)
    parameters = start(model)
    targets = (inputs[:, 0] > 0).double()  # easy, so that runs end, and at different epochs
    rates = torch.tensor([1.0, 16.0, 4.0], dtype=torch.float64)
    together, epochs = train_to_criterion(model, parameters, inputs, targets, rates, 0.1, 200)
    assert len(set(epochs.tolist())) == 3
    for run in range(3):
        own = [values[run : run + 1] for values in parameters]
        alone, own_epochs = train_to_criterion(model, own, inputs, targets, rates[run : run + 1], 0.1, 200)
        assert own_epochs.tolist() == [epochs[run]]
        for values, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(values[run : run + 1], expected, rtol=1e-9, atol=1e-9)


def test_epochs_are_minus_one_where_the_criterion_is_not_met_and_zero_where_it_holds_at_the_start():
    (inputs, targets), model = some_cases(), GatedMixture(2)
    parameters, rates = start(model, num_runs=1), torch.ones(1, dtype=torch.float64)
    counted = []
    _, epochs = train_to_criterion(
        model, parameters, inputs, targets, rates, 1e-9, 3, lambda epoch, going: counted.append((epoch, going))
    )
    assert epochs.tolist() == [-1]
    assert counted == [(1, 1), (2, 1), (3, 1)]
    final, epochs = train_to_criterion(model, parameters, inputs, targets, rates, 1.0, 3)
    assert epochs.tolist() == [0]
    assert torch.equal(final[0], parameters[0])


@pytest.mark.parametrize("error", ERRORS)
def test_experts_that_start_equal_stay_equal(error):
    """What keeps experts from becoming identical is that they do not start so: the gradient cannot separate them."""
    (inputs, targets), model = some_cases(40), GatedMixture(4, error)
    parameters = model.initialize(1, 3, torch.Generator().manual_seed(0))
    parameters[0] = parameters[0][:, :1].expand_as(parameters[0]).clone()
    rates = torch.full((1,), 4.0, dtype=torch.float64)
    (experts, gate), _ = train_to_criterion(model, parameters, inputs, targets, rates, 1e-9, 100)
    torch.testing.assert_close(experts, experts[:, :1].expand_as(experts), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gate, gate[:, :1].expand_as(gate), rtol=1e-9, atol=1e-9)
    assert num_used_experts(model, [experts, gate], inputs).tolist() == [4]  # each with a proportion of 1/4
    assert (experts - parameters[0]).abs().max() > 0.1  # it did train

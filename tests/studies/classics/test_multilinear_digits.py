# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Multilinear mixtures on digits: measures of specialism against loops, removal of experts, and the paper's claims."""

import math

import pytest
import torch

from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.classics.digit_images import Digits, is_correct, read_digits, split_digits
from modeling_peer.studies.classics.multilinear_digits import (
    FORMS,
    MultilinearDigitsArguments,
    MultilinearNetwork,
    choose_rank,
    class_changes,
    class_share,
    polysemanticity,
    remove_experts,
    run_multilinear_digits,
    train_network,
)

QUICK = MultilinearDigitsArguments(num_epochs=8)


def new_network(form, num_experts, arguments=QUICK, seed=0):
    torch.manual_seed(seed)
    return MultilinearNetwork(form, num_experts, arguments.num_features, choose_rank(form, num_experts, arguments))


def some_digits(num_images=40):
    generator = torch.Generator().manual_seed(0)
    return Digits(torch.rand(num_images, 64, generator=generator), torch.arange(num_images) % 10)


def test_a_split_has_every_image_once_and_depends_on_the_seed():
    pytest.importorskip("sklearn", reason="extra bench")
    digits = read_digits()
    assert digits.images.shape == (1797, 64)
    assert (float(digits.images.min()), float(digits.images.max())) == (0, 1)
    train, test = split_digits(digits, 3)
    assert len(train.labels) == 1200
    together = torch.cat([train.images, test.images])
    assert torch.equal(together.sum(0), digits.images.sum(0))  # sixteenths: exact in any order
    assert torch.equal(split_digits(digits, 3)[0].images, train.images)
    assert not torch.equal(split_digits(digits, 4)[0].images, train.images)


def test_a_tie_of_logits_is_wrong():
    logits = torch.tensor([[0.0, 0, 0], [1, 3, 2], [2, 2, 1]])
    assert is_correct(logits, torch.tensor([0, 1, 0])).tolist() == [False, True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_experts", [4, 128])
def test_networks_have_about_the_parameters_asked_for(form, num_experts):
    network = new_network(form, num_experts)
    # one more rank is at most 172 parameters
    assert abs(sum(values.numel() for values in network.parameters()) - QUICK.num_parameters) <= 86


@pytest.mark.parametrize("form", FORMS)
def test_removing_an_expert_is_setting_its_weights_to_zero(form):
    network, digits = new_network(form, 5).eval(), some_digits()
    with torch.no_grad():
        network.gating.normal_()
    correct, without = remove_experts(network, digits)
    assert without.shape == (5, 40)
    assert torch.equal(correct, is_correct(network(digits.images), digits.labels))
    for expert in range(5):
        changed = new_network(form, 5).eval()
        changed.load_state_dict(network.state_dict())
        with torch.no_grad():
            if form == "cp":
                changed.last.expert_factor[expert] = 0
            else:
                changed.last.expert_core[:, expert] = 0
        assert torch.equal(without[expert], is_correct(changed(digits.images), digits.labels))


def test_changes_are_differences_of_the_accuracies_of_each_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 9])
    correct = torch.tensor([True, True, True, False, True, False])
    without = torch.tensor([[False, True, True, True, True, False]])
    changes = class_changes(correct, without, labels)
    expected = [-1 / 2, 1 / 3, *[0] * 8]  # one of two is lost, one of three is won
    torch.testing.assert_close(changes, torch.tensor([expected]))


def test_polysemanticity_is_zero_for_one_class_and_grows_with_the_number_of_classes():
    changes = torch.zeros(4, 10)
    changes[1, 3] = -0.02  # one class, however little
    changes[2, :2] = torch.tensor([-0.5, 0.5])
    changes[3] = 0.1
    # the first expert changes nothing and is left out
    expected = [0, math.sqrt(2 - 2 / math.sqrt(2)), math.sqrt(2 - 2 / math.sqrt(10))]
    torch.testing.assert_close(polysemanticity(changes), torch.tensor(expected), atol=1e-3, rtol=0)


def test_class_share_is_one_for_experts_of_one_class_and_a_tenth_for_equal_coefficients():
    labels = torch.arange(40) % 10
    assert class_share(torch.nn.functional.one_hot(labels, 10).float(), labels) == pytest.approx(1)
    assert class_share(torch.full((40, 7), 1 / 7), labels) == pytest.approx(0.1)


def test_what_cannot_work_is_refused():
    cases = {
        r"--num_parameters \(2500\) are too few for 128 experts, form cp": {
            "num_parameters": 2500,
            "expert_counts": [128],
        },
        r"--forms 'tucker' must be one of cp, tensor_ring": {"forms": ["tucker"]},
        r"--expert_counts \(1\) must be at least 2": {"expert_counts": [1]},
        r"--batch_size \(1\) must be at least 2, for BatchNorm": {"batch_size": 1},
        r"--num_runs \(0\) must be at least 1": {"num_runs": 0},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_multilinear_digits(MultilinearDigitsArguments(**wrong))


def test_more_experts_specialise_more_and_the_loss_of_one_costs_its_class():
    """The paper's claims, with 8 epochs in place of 30."""
    pytest.importorskip("sklearn", reason="extra bench")
    train, test = split_digits(read_digits(), 0)
    own, share = {}, {}
    for num_experts in (4, 16):
        network = new_network("cp", num_experts)
        train_network(network, train, QUICK, 0, lambda epoch: None)
        correct, without = remove_experts(network, test)
        assert correct.float().mean() > 0.94  # measured: 96 to 97 %
        changes = class_changes(correct, without, test.labels)
        own[num_experts] = float(polysemanticity(changes).mean())
        with torch.no_grad():
            share[num_experts] = class_share(network.gate(test.images)[1], test.labels)
    # measured after 10 epochs: 0.52 and 0.14, 0.34 and 0.79
    assert own[16] < 0.3 < own[4]
    assert share[4] < 0.5 < share[16]
    # one of 16 experts: a class loses much, all others little
    worst = changes[changes.amin(1).argmin()].abs().sort(descending=True).values
    assert worst[0] > 0.3
    assert worst[1:].mean() < 0.05

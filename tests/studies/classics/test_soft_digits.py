# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Soft mixtures on digits: routings against loops, training in turns, equal seconds."""

import pytest
import torch

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.console.errors import SettingsError
from modeling_peer.soft_moe_peer import PeerSoftMoe
from modeling_peer.studies.classics.digit_images import Digits, read_digits, split_digits
from modeling_peer.studies.classics.soft_digits import Run, SoftDigitsArguments, at_seconds, run_soft_digits
from modeling_peer.studies.classics.tiny_vit import (
    NUM_TOKENS,
    ROUTINGS,
    PartlySoftMoe,
    Routing,
    TinyViT,
    new_mlp,
)

QUICK = SoftDigitsArguments(width=8, inner_width=8, images_per_step=20, warm_up_steps=2)


def some_digits(num_images=60):
    generator = torch.Generator().manual_seed(0)
    return Digits(torch.rand(num_images, 64, generator=generator), torch.arange(num_images) % 10)


def mlp_of(routing, seed=0):
    torch.manual_seed(seed)
    return new_mlp(routing, 8, 8)


def one_expert(mlp, expert, token):
    """The MLP of one expert for one token."""
    gate, up = (mlp.experts.gate_up_proj[expert] @ token).chunk(2)
    return mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dispatch", ["soft", "uniform", "identity"])
@pytest.mark.parametrize("combine", ["soft", "uniform", "identity"])
@pytest.mark.parametrize("num_experts", [4, 16])  # four slots each, and one
def test_routings_are_those_of_the_ablation(dispatch, combine, num_experts):
    mlp = mlp_of(Routing("soft", num_experts, dispatch, combine))
    tokens = torch.randn(2, NUM_TOKENS, 8)
    output = mlp(tokens)
    per_expert = NUM_TOKENS // num_experts
    for image in range(2):
        # what slots take from tokens, and tokens from slots
        fixed = {"uniform": torch.full((NUM_TOKENS, NUM_TOKENS), 1 / NUM_TOKENS), "identity": torch.eye(NUM_TOKENS)}
        take = give = fixed
        if "soft" in (dispatch, combine):
            logits = mlp._logits(tokens[image])
            take, give = {**fixed, "soft": logits.softmax(0).T}, {**fixed, "soft": logits.softmax(1)}
        slots = take[dispatch] @ tokens[image]
        written = torch.stack([one_expert(mlp, i // per_expert, slots[i]) for i in range(NUM_TOKENS)])
        torch.testing.assert_close(output[image], give[combine] @ written)


def test_soft_contenders_are_the_packages_layer_and_ablations_have_no_router_that_they_do_not_use():
    assert type(mlp_of(ROUTINGS["soft, 16 experts"])) is PeerSoftMoe
    uniform = mlp_of(ROUTINGS["uniform"])
    assert isinstance(uniform, PartlySoftMoe)
    assert {name for name, _ in uniform.named_parameters()} == {"experts.gate_up_proj", "experts.down_proj"}
    learned = mlp_of(ROUTINGS["uniform / soft"])
    learned(torch.randn(1, NUM_TOKENS, 8)).square().sum().backward()
    assert all(values.grad.abs().max() > 0 for values in learned.parameters())


def test_every_expert_of_a_soft_mixture_learns_from_every_image_and_top_1_drops_tokens():
    tokens = torch.randn(1, NUM_TOKENS, 8).expand(20, -1, -1) * 0 + torch.randn(8)  # all tokens equal
    soft = mlp_of(ROUTINGS["soft, 16 experts"]).train()
    soft(tokens).square().sum().backward()
    assert (soft.experts.down_proj.grad.flatten(1).norm(dim=1) > 0).all()
    top_1 = mlp_of(ROUTINGS["top-1 of 16"]).train()
    outputs = top_1(tokens, None, AuxiliaryLosses())
    # a capacity of 1.25 / 16 of the tokens for the one expert that all choose, or two because of the jitter
    assert (outputs.abs().sum(-1) == 0).float().mean() > 0.7


@pytest.mark.parametrize("name", ROUTINGS)
def test_patches_are_squares_and_only_the_last_half_of_the_blocks_has_the_mixture(name):
    torch.manual_seed(0)
    network = TinyViT(ROUTINGS[name], 3, 8, 8).eval()
    kinds = [type(block.mlp).__name__ for block in network.blocks]
    assert kinds[0] == "DenseMlp"
    assert kinds[1] == kinds[2] == type(mlp_of(ROUTINGS[name])).__name__
    image = torch.zeros(8, 8)
    image[2:4, 4:6] = torch.tensor([[1.0, 2], [3, 4]])  # row 1, column 2 of the patches
    seen = []
    network.patches.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert network(image.view(1, 64)).shape == (1, 10)
    expected = torch.zeros(NUM_TOKENS, 4)
    expected[6] = torch.tensor([1.0, 2, 3, 4])
    assert torch.equal(seen[0][0], expected)


@pytest.mark.parametrize("name", ["top-1 of 4", "soft, 16 experts"])
def test_turns_do_not_change_what_is_learned(name):
    """Ten steps at once, or in turns with another contender between: bit for bit the same."""
    digits = some_digits()
    alone, in_turns = Run(name, QUICK, 3), Run(name, QUICK, 3)
    alone.train(digits, 10)
    other = Run("dense", QUICK, 4)
    for num_steps in (4, 1, 5):
        in_turns.train(digits, num_steps)
        other.train(digits, 2)
        in_turns.test(digits)
    assert alone.step == in_turns.step == 10
    for one, two in zip(alone.network.parameters(), in_turns.network.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [point["step"] for point in in_turns.curve] == [4, 5, 10]
    assert in_turns.curve[-1]["seconds"] == in_turns.seconds > 0


def test_sparse_and_soft_mixtures_learn_which_row_is_brightest():
    """The label is where the brightest row is: 0 to 7."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (200,), generator=generator)
    images = 0.1 * torch.rand(200, 8, 8, generator=generator)
    images[torch.arange(200), labels] += 1
    digits = Digits(images.flatten(1), labels)
    arguments = SoftDigitsArguments(width=16, inner_width=16, images_per_step=50, warm_up_steps=10, top_rate=1e-2)
    for name in ("top-1 of 4", "soft, 16 experts"):
        run = Run(name, arguments, 0)
        run.train(digits, 60)
        run.test(digits)
        assert run.curve[-1]["correct"] > 90, name


def test_a_curve_is_read_between_two_tests_and_ends_with_its_last():
    curve = [{"seconds": 0.0, "loss": 3.0}, {"seconds": 2.0, "loss": 1.0}, {"seconds": 4.0, "loss": 0.5}]
    assert at_seconds(curve, 1.0, "loss") == 2.0
    assert at_seconds(curve, 3.0, "loss") == 0.75
    assert at_seconds(curve, 4.0, "loss") == at_seconds(curve, 9.0, "loss") == 0.5


def test_what_cannot_work_is_refused():
    cases = {
        r"--contenders 'soft, 61 experts' must be one of dense; .* Did you mean 'soft, 16 experts'\?": {
            "contenders": ["soft, 61 experts"]
        },
        "--contenders needs at least one of dense;": {"contenders": []},
        r"--width \(30\) must be a multiple of 4": {"width": 30},
        r"--num_steps \(0\) must be at least 1": {"num_steps": 0},
        r"--top_rate \(0\) must be more than 0": {"top_rate": 0},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_soft_digits(SoftDigitsArguments(**wrong))


@pytest.mark.slow
def test_an_expert_for_each_patch_learns_faster_than_one_dense_mlp():
    """As in the paper, identity routing is better than a dense MLP, here with 150 steps in place of 600."""
    pytest.importorskip("sklearn", reason="extra bench")
    train, test = split_digits(read_digits(), 0)
    losses = {}
    for name in ("dense", "identity"):
        run = Run(name, SoftDigitsArguments(), 0)
        run.train(train, 150)
        run.test(test)
        losses[name] = run.curve[-1]["loss"]
    # means of three runs: 0.32 and 0.14
    assert losses["identity"] < 0.7 * losses["dense"]

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The expert mixture against a loop: output, every gradient, memory."""

import pytest
import reference
import torch
from torch import nn

from modeling_peer import experts_peer
from modeling_peer.experts_peer import PeerExperts, expert_mixture


def mixture_inputs(num_tokens=5, num_active=6, hidden_size=7, num_experts=9, gated=False, dtype=torch.float64):
    tensors = {
        "hidden_states": torch.randn(num_tokens, hidden_size),
        "gates": torch.rand(num_tokens, num_active),
        "down_embed": torch.randn(num_experts, hidden_size),
        "up_embed": torch.randn(num_experts, hidden_size),
    }
    if gated:
        tensors["gate_embed"] = torch.randn(num_experts, hidden_size)
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    inputs["expert_ids"] = torch.randint(num_experts, (num_tokens, num_active))
    return inputs


def output_and_gradients(function, inputs, **options):
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = function(**inputs, **options)
    upstream = (torch.arange(output.numel()) % 5 - 2).to(output.dtype).view_as(output)  # exact in every dtype
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream, allow_unused=True)
    return output, {name: 0 if g is None else g for name, g in zip(leaves, gradients, strict=True)}


def assert_equals_reference(inputs, **options):
    output, gradients = output_and_gradients(expert_mixture, inputs, **options)
    expected_output, expected = output_and_gradients(reference.expert_mixture, inputs, **options)
    torch.testing.assert_close(output, expected_output)
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.Identity(), nn.ReLU()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("tokens_per_tile", [1, 2, 100])
def test_expert_mixture_and_gradients_equal_the_loop(monkeypatch, gated, activation, tokens_per_tile):
    monkeypatch.setitem(experts_peer.MAX_TILE_ELEMENTS, "cpu", tokens_per_tile * 6 * 7)
    assert_equals_reference(mixture_inputs(gated=gated), activation=activation)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 1},  # one-token decoding
        {"num_active": 1},  # k = h = 1
        {"num_experts": 1},  # all tokens on one expert: every gradient lands on one row
        {"hidden_size": 1},
        {"num_tokens": 13, "hidden_size": 33, "num_experts": 17},  # nothing a power of two
    ],
    ids=str,
)
def test_expert_mixture_at_the_edges(sizes):
    assert_equals_reference(mixture_inputs(**sizes))


def test_expert_mixture_when_every_assignment_is_a_different_expert():
    inputs = mixture_inputs(num_tokens=4, num_active=3, num_experts=12)
    inputs["expert_ids"] = torch.randperm(12).view(4, 3)
    assert_equals_reference(inputs)


def test_expert_mixture_adds_an_expert_as_often_as_it_was_retrieved():
    inputs = mixture_inputs(num_active=4)
    inputs["expert_ids"] = torch.full_like(inputs["expert_ids"], 2)
    assert_equals_reference(inputs)


def test_expert_mixture_with_no_token():
    inputs = mixture_inputs(num_tokens=0)
    output, gradients = output_and_gradients(expert_mixture, inputs)
    assert output.shape == (0, 7)
    assert not gradients["up_embed"].any()


def test_expert_mixture_of_non_contiguous_inputs():
    inputs = mixture_inputs(num_tokens=6, num_active=7, hidden_size=6)
    for name in ("hidden_states", "gates"):
        inputs[name] = inputs[name].detach().T.contiguous().T.requires_grad_()
    inputs["expert_ids"] = inputs["expert_ids"].T.contiguous().T
    assert_equals_reference(inputs)


def test_expert_mixture_passes_gradcheck():
    inputs = mixture_inputs(num_tokens=2, num_active=3, hidden_size=4, num_experts=5, gated=True)
    ids = inputs.pop("expert_ids")
    names = list(inputs)

    def function(*tensors):
        return expert_mixture(expert_ids=ids, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_expert_mixture_under_torch_func():
    inputs = mixture_inputs(gated=True)
    ids, table = inputs.pop("expert_ids"), inputs["up_embed"]

    def loss(up_embed):
        return expert_mixture(expert_ids=ids, **{**inputs, "up_embed": up_embed}).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(table), torch.autograd.grad(loss(table), table)[0])


@pytest.mark.parametrize("frozen", ["hidden_states", "gates", "down_embed", "up_embed", "gate_embed"])
def test_expert_mixture_with_one_input_frozen(frozen):
    inputs = mixture_inputs(gated=True)
    inputs[frozen] = inputs[frozen].detach()
    assert_equals_reference(inputs)


def test_expert_mixture_in_bfloat16_sums_in_float32():
    inputs = mixture_inputs(num_active=64, hidden_size=32, dtype=torch.bfloat16)
    output, gradients = output_and_gradients(expert_mixture, inputs)
    assert output.dtype == torch.bfloat16
    double = {name: t.detach().double().requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    expected_output, expected = output_and_gradients(reference.expert_mixture, double)
    # 2**-8 is one rounding to bfloat16; sums rounded at every step would be off by several.
    torch.testing.assert_close(output.double(), expected_output, rtol=2**-8, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        # Gradients sum terms of size 10 that nearly cancel; each input was rounded to 2**-9 of itself.
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2**-8, atol=1e-2)


def test_compiled_expert_mixture_equals_eager():
    inputs = mixture_inputs(gated=True, dtype=torch.float32)
    output, gradients = output_and_gradients(expert_mixture, inputs)
    compiled = torch.compile(expert_mixture, fullgraph=True, backend="aot_eager")
    compiled_output, compiled_gradients = output_and_gradients(compiled, inputs)
    torch.testing.assert_close(compiled_output, output)
    for name in gradients:
        torch.testing.assert_close(compiled_gradients[name], gradients[name])


def test_expert_mixture_never_holds_more_than_a_tile_of_gathered_rows():
    """The bound of the docstring: extra memory does not grow with the tokens' rows, forward or backward."""
    hidden_size, num_active, num_experts = 64, 128, 256

    def peak(num_tokens):
        inputs = mixture_inputs(num_tokens, num_active, hidden_size, num_experts, dtype=torch.float32)
        return reference.peak_memory(lambda: expert_mixture(**inputs).sum().backward())

    few, many = peak(256), peak(2048)
    rows_of_one_token = num_active * hidden_size * 4  # bytes
    # What does grow: output and gradients (hidden_size each), pre-activations and gates (num_active each).
    assert (many - few) / (2048 - 256) < rows_of_one_token / 10
    tables = 4 * num_experts * hidden_size * 4  # gradients, and autograd's copies of them
    tile = experts_peer.MAX_TILE_ELEMENTS["cpu"] * 4
    assert few < 4 * tile + tables + 256 * 8 * (hidden_size + num_active) * 4


def test_experts_hold_the_tables_that_the_design_names(tiny_config):
    assert {n: tuple(p.shape) for n, p in PeerExperts(tiny_config(gated_experts=True)).named_parameters()} == {
        "down_embed": (64, 32),
        "up_embed": (64, 32),
        "gate_embed": (64, 32),
    }
    assert [n for n, _ in PeerExperts(tiny_config()).named_parameters()] == ["down_embed", "up_embed"]

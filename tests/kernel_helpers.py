# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Inputs of an expert mixture, its output with every gradient, and how far float32 sums may be from exact ones."""

import torch

# Rounding errors of a float32 sum, in units of eps times the sum of its terms' magnitudes. At most 2.3 were seen
# (NUMBA_CPU_NAME=generic, two threads, an AVX2 machine; sums of up to 700 terms), whatever cancels in the sum itself.
ROUNDINGS = 16


def assert_sums_close(actual, expected, magnitudes, rtol=0.0, message=""):
    """Compare float32 sums with exact ones: what a sum loses is relative to its terms, not to what they leave.

    Args:
        magnitudes: what the sums would be if every term were positive; same shape, or one that broadcasts.
        rtol: of the result itself, such as one rounding to bfloat16.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, message
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps * magnitudes.double().cpu() + rtol * expected.abs()
    error = (actual - expected).abs()
    # not `error > allowed`: NaN is no number within the tolerance
    assert (error <= allowed).all(), f"{message}: {(error / allowed).max():.3g} times what rounding explains"


def assert_close_in_scale(actual, expected, rtol=1e-5):
    """Compare results of many sums, whose own terms are not at hand: errors are relative to the largest result."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    allowed = rtol * expected.abs().max() if expected.numel() else 0.0
    error = (actual - expected).abs()
    assert (error <= allowed).all(), f"off by {error.max():.3g}, where {allowed:.3g} is allowed"


def mixture_inputs(device, num_tokens=5, num_active=6, width=7, num_experts=9, gated=False, dtype=torch.float32):
    sizes = {"hidden_states": num_tokens, "down_embed": num_experts, "up_embed": num_experts}
    if gated:
        sizes["gate_embed"] = num_experts
    inputs = {name: torch.randn(size, width, device=device, dtype=dtype) for name, size in sizes.items()}
    inputs["gates"] = torch.rand(num_tokens, num_active, device=device)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    return {"expert_ids": torch.randint(num_experts, (num_tokens, num_active), device=device), **inputs}


def positive(inputs):
    """The same inputs without their signs: nothing cancels in what is made of them."""
    return {
        name: tensor.detach().abs().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def output_and_gradients(function, inputs, all_positive=False, **options):
    """Gradients come dense: of row-sparse ones the rows that are not there are zero.

    Args:
        all_positive: give the upstream gradient no signs.
    """
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = function(**inputs, **options)
    upstream = (torch.arange(output.numel(), device=output.device) % 5 - 2).to(output.dtype).view_as(output)
    upstream = upstream.abs() if all_positive else upstream
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return output, {name: g.to_dense() if g.is_sparse else g for name, g in zip(leaves, gradients, strict=True)}

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What tests of several layers and models share: comparing with an oracle, and a few steps of training."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from modeling_peer.token_context_peer import TokenContext

# Where torch's grouped products do not take the sizes, Transformers computes them one by one, and before 5.23 the
# compiler could not trace that gradient.
grouped_gradients_compile = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23"
)


def load_weights(folder):
    """All tensors of the safetensors files in `folder`."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_single_file(folder, tensors):
    """Replace the weights in `folder` by one file, as another program would write it: no checksum, no index."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equals_oracle(layer, hidden, output, expected_output):
    """The outputs of a layer and of its oracle for `hidden`, and the gradients of every leaf, are equal."""
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"hidden_states": hidden}

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), list(leaves.values()))

    torch.testing.assert_close(output, expected_output)
    for name, gradient, expected in zip(leaves, gradients(output), gradients(expected_output), strict=True):
        assert expected.any(), f"{name} gets no gradient: the case shows nothing"
        torch.testing.assert_close(gradient, expected, msg=lambda m, name=name: f"{name}: {m}")


def context(input_ids, **fields):
    """The tokens of a forward without a cache, as a model gives them to a hashed memory."""
    return TokenContext(input_ids, torch.arange(input_ids.shape[1]).unsqueeze(0), **fields)


def learn(model, tokens, steps=20):
    """Train on the one batch; the losses, and the names of the parameters that got a gradient other than zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, touched = [], set()
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        touched |= {name for name, p in model.named_parameters() if p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, touched

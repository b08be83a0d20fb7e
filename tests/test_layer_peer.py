# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerLayer against the loop over all experts, against PEER-pytorch, and its truths."""

import math

import PEER_pytorch
import pytest
import reference
import torch
from model_helpers import assert_equals_oracle

from modeling_peer import PeerLayer

OPTIONS = {
    "paper": {},
    "per-head codebooks": {"share_sub_keys": False},
    "sigmoid gate": {"gate_activation": "sigmoid"},
    "gated experts": {"gated_experts": True},
    "identity activation": {"expert_act": "identity"},
    "relu": {"expert_act": "relu"},
    "rms_norm": {"query_norm": "rms_norm"},
    "layer_norm": {"query_norm": "layer_norm"},
    "no norm": {"query_norm": "none"},
    "one head": {"num_retrieval_heads": 1},
    "k = n": {"num_experts_per_head": 8},
    "width not a power of two": {"hidden_size": 24},
}


def layer_with_statistics(config):
    """A float64 layer whose parameters and running statistics are not the trivial initial ones."""
    layer = PeerLayer(config).double()
    norm = layer.retrieval.query_norm
    with torch.no_grad():
        layer.retrieval.query_proj.weight.normal_()
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
        for buffer in norm.buffers():
            buffer.uniform_(0.5, 1.5)
    return layer.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_layer_and_every_gradient_equal_the_exhaustive_loop(tiny_config, options):
    layer = layer_with_statistics(tiny_config(**options))
    hidden = torch.randn(5, layer.experts.down_embed.shape[1], dtype=torch.float64, requires_grad=True)
    assert_equals_oracle(layer, hidden, layer(hidden), reference.peer_layer(layer, hidden))


def test_one_expert_per_head_is_the_mlp_of_the_retrieved_neurons(tiny_config):
    """k = 1: a softmax over one score is 1 (He 2024, eq. 8)."""
    layer = PeerLayer(tiny_config(num_experts_per_head=1)).eval()
    x = torch.randn(32)
    gates, expert_ids = layer.retrieval(x)
    assert torch.equal(gates, torch.ones(2, 1))
    neurons = expert_ids.flatten()
    mlp = layer.experts.up_embed[neurons].T @ layer.experts.activation(layer.experts.down_embed[neurons] @ x)
    torch.testing.assert_close(layer(x), mlp)


def test_layer_agrees_with_peer_pytorch_on_copied_weights(tiny_config):
    """The independent implementation, in the paper's mode: per-head codebooks, no query norm and no query bias."""
    config = tiny_config(share_sub_keys=False, query_norm="none", num_sub_keys=8)
    layer = PeerLayer(config)
    theirs = PEER_pytorch.PEER(
        dim=32,
        heads=2,
        num_experts=64,
        num_experts_per_head=4,
        dim_key=8,
        non_competing_scores=False,  # its default is a ReLU gate and one expert per head
    )
    with torch.no_grad():
        torch.nn.init.normal_(layer.retrieval.query_proj.weight)
        theirs.weight_down_embed.weight.copy_(layer.experts.down_embed)
        theirs.weight_up_embed.weight.copy_(layer.experts.up_embed)
        theirs.keys.copy_(layer.retrieval.sub_keys.transpose(1, 2))  # (h, 2, n, d) -> (h, n, 2, d)
        # Its queries are laid out (half, head, dim), ours (head, half, dim).
        weight = layer.retrieval.query_proj.weight.view(2, 2, 8, 32)
        theirs.to_queries[0].weight.copy_(weight.transpose(0, 1).reshape(32, 32))
    x = torch.randn(2, 6, 32)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_y, theirs_y = layer(ours_x), theirs(theirs_x)
    torch.testing.assert_close(ours_y, theirs_y)
    ours_y.square().sum().backward()
    theirs_y.square().sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    torch.testing.assert_close(layer.experts.down_embed.grad, theirs.weight_down_embed.weight.grad)
    torch.testing.assert_close(layer.experts.up_embed.grad, theirs.weight_up_embed.weight.grad)
    torch.testing.assert_close(layer.retrieval.sub_keys.grad, theirs.keys.grad.transpose(1, 2))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 1, 32), (3, 0, 32), (2, 5, 32), (2, 3, 4, 32)], ids=str)
def test_layer_keeps_any_leading_shape(tiny_config, shape):
    layer = PeerLayer(tiny_config())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == shape
    assert torch.isfinite(y).all()
    assert x.grad.shape == shape


def test_one_training_step_on_one_token_leaves_everything_finite(tiny_config):
    layer = PeerLayer(tiny_config())
    layer(torch.randn(1, 1, 32)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert all(torch.isfinite(b).all() for b in layer.buffers())


@pytest.mark.parametrize("gain", [1.0, 4.0])
@pytest.mark.parametrize("hidden_size", [64, 512])
def test_layer_starts_with_the_promised_pre_activations_and_a_small_output(tiny_config, gain, hidden_size):
    """On unit-variance tokens, as RMSNorm gives them: PEER-pytorch's N(0, 1) tables would put out 11 to 45."""
    config = tiny_config(hidden_size=hidden_size, num_sub_keys=32, num_experts_per_head=16, expert_init_gain=gain)
    layer, x = PeerLayer(config), torch.randn(64, hidden_size)
    pre_activations = x @ layer.experts.down_embed.T
    assert math.isclose(pre_activations.std().item(), gain, rel_tol=0.1)
    assert 1e-3 < layer(x).square().mean().sqrt() < 0.1


def test_expert_dropout_drops_that_share_of_the_gates_and_scales_the_rest(tiny_config):
    layer = PeerLayer(tiny_config(expert_dropout=0.25, query_norm="none", gate_activation="sigmoid"))
    x, seen = torch.randn(500, 32), []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    layer(x)
    layer.eval()(x)
    in_training, in_evaluation = seen
    kept = in_training != 0
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(in_training[kept], in_evaluation[kept] / 0.75)


def test_a_million_experts_answer_one_token(tiny_config):
    """The paper's pool at a narrow width: ids reach the last row, and int64 carries them."""
    config = tiny_config(
        hidden_size=8,
        num_sub_keys=1024,
        num_retrieval_heads=8,
        num_experts_per_head=16,
        query_norm="none",
    )
    layer = PeerLayer(config)
    with torch.no_grad():  # the last product key wins for this token
        layer.retrieval.sub_keys.zero_()
        layer.retrieval.sub_keys[:, -1] = 1
        layer.retrieval.query_proj.bias.fill_(1)
    gates, expert_ids = layer.retrieval(torch.zeros(1, 8))
    assert expert_ids[..., 0].eq(1024**2 - 1).all()
    assert config.num_peer_experts == 1024**2
    assert config.num_active_experts == 128
    assert layer(torch.randn(1, 8)).shape == (1, 8)
    assert math.isclose(gates.sum().item(), 8, rel_tol=1e-5)

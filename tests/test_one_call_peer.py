# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A layer in one call passes over nothing that replaced its parts, and gives the answer of many calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

pytest.importorskip("numba")

from modeling_peer import PeerLayer, backends_peer, one_call_peer
from modeling_peer.experts_peer import PeerExperts
from modeling_peer.one_call_peer import run_in_one_call
from modeling_peer.product_key_memory_peer import PeerMemoryValues, PeerProductKeyMemory
from modeling_peer.query_norms_peer import PeerBatchNorm, PeerLayerNorm, PeerRMSNorm
from modeling_peer.retrieval_peer import PeerRetrieval


def runs_in_one_call(layer):
    with torch.no_grad():
        return run_in_one_call(layer.retrieval, layer.experts, torch.randn(1, 32)) is not None


def double(cls, monkeypatch, name="forward"):
    """Replace a method of the class by one that returns twice as much."""
    original = getattr(cls, name)
    if cls is PeerRetrieval:
        replaced = lambda *args, **kwargs: (lambda gates, ids: (2 * gates, ids))(*original(*args, **kwargs))  # noqa: E731
    else:
        replaced = lambda *args, **kwargs: 2 * original(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(cls, name, replaced)


@torch.no_grad()
def test_forward_mode_differentiation_goes_through_every_part(tiny_config):
    layer = PeerLayer(tiny_config(query_norm="rms_norm")).eval()
    token, tangent = torch.randn(1, 32), torch.randn(1, 32)
    assert runs_in_one_call(layer)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(layer(forward_ad.make_dual(token, tangent))).tangent
        assert not runs_in_one_call(layer)
    _, expected = torch.func.jvp(layer, (token,), (tangent,))
    assert (output - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (PeerRetrieval, {}),
        (PeerExperts, {}),
        (PeerBatchNorm, {}),
        (PeerLayerNorm, {"query_norm": "layer_norm"}),
        (nn.LayerNorm, {"query_norm": "layer_norm"}),  # the class that it inherits from
        (PeerRMSNorm, {"query_norm": "rms_norm"}),
        (nn.Identity, {"query_norm": "none"}),
        (nn.Linear, {}),
        (nn.ReLU, {"expert_act": "relu"}),
        (nn.Identity, {"expert_act": "identity"}),
        (nn.SiLU, {"expert_act": "silu"}),
    ],
)
def test_a_forward_that_was_replaced_on_a_class_is_called(tiny_config, monkeypatch, cls, settings):
    layer = PeerLayer(tiny_config(**settings)).eval()
    eager = PeerLayer(tiny_config(**settings, experts_implementation="eager")).eval()
    eager.load_state_dict(layer.state_dict())
    assert runs_in_one_call(layer)
    token, before = torch.randn(1, 32), layer(torch.zeros(1, 32) + 0.5)
    with monkeypatch.context() as patches:
        if cls is nn.SiLU:
            cls = type(layer.experts.activation)
        double(cls, patches)
        torch.testing.assert_close(layer(token), eager(token))
        assert not runs_in_one_call(layer)
    assert runs_in_one_call(layer)
    torch.testing.assert_close(layer(torch.zeros(1, 32) + 0.5), before)


def test_a_call_that_was_replaced_on_all_modules_is_made(tiny_config, monkeypatch):
    layer = PeerLayer(tiny_config()).eval()
    called, original = [], nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *args: (called.append(type(self)), original(self, *args))[1]
    )
    with torch.no_grad():
        layer(torch.randn(1, 32))
    assert {PeerRetrieval, PeerExperts, PeerBatchNorm, nn.Linear} <= set(called)


def test_a_function_that_was_registered_in_the_place_of_ours_is_called(tiny_config, monkeypatch):
    layer = PeerLayer(tiny_config()).eval()
    for functions in (backends_peer.RETRIEVAL_FUNCTIONS, backends_peer.EXPERT_MIXTURE_FUNCTIONS):
        original = functions["cpu"]
        functions["cpu"] = lambda *args, original=original: original(*args)
        try:
            assert not runs_in_one_call(layer)
        finally:
            functions["cpu"] = original
    assert runs_in_one_call(layer)


def test_an_activation_function_that_was_replaced_is_called(tiny_config, monkeypatch):
    layer = PeerLayer(tiny_config(expert_act="gelu")).eval()
    assert runs_in_one_call(layer)
    layer.experts.activation.act = F.relu
    assert not runs_in_one_call(layer)
    replaced = lambda values: 2 * values  # noqa: E731
    monkeypatch.setattr(F, "gelu", replaced)
    assert not runs_in_one_call(PeerLayer(tiny_config(expert_act="gelu")).eval())


def test_parts_that_are_compiled_normalised_or_of_another_class_are_called(tiny_config):
    class DoubledExperts(PeerExperts):
        def forward(self, *args):
            return 2 * super().forward(*args)

    def compiled(layer):
        layer.retrieval.compile(backend="eager")

    def normalised(layer):
        nn.utils.parametrizations.weight_norm(layer.retrieval.query_proj)

    def hooked(layer):
        layer.experts.activation.register_forward_hook(lambda module, args, output: 2 * output)

    def of_another_class(layer):
        layer.experts.__class__ = DoubledExperts

    for change in (compiled, normalised, hooked, of_another_class):
        layer = PeerLayer(tiny_config()).eval()
        assert runs_in_one_call(layer)
        change(layer)
        assert not runs_in_one_call(layer), change.__name__


def test_a_memory_runs_in_one_call_until_its_forward_is_replaced(tiny_config, monkeypatch):
    layer = PeerProductKeyMemory(tiny_config()).eval()
    before = runs_in_one_call(layer)
    double(PeerMemoryValues, monkeypatch)
    assert not runs_in_one_call(layer)
    assert before == (layer.experts._modules.get("activation") is not None)


def test_a_forward_that_was_replaced_before_it_was_noted_counts_as_observed():
    class Wrapped(nn.Module):
        def forward(self, x):
            return x

    one_call_peer.remember_forwards(Wrapped)
    assert one_call_peer.is_unobserved(Wrapped())
    replaced = lambda self, x: 2 * x  # noqa: E731
    replaced.__module__ = "a.tool.that.looks"
    Wrapped.forward = replaced
    one_call_peer.remember_forwards(Wrapped)
    assert not one_call_peer.is_unobserved(Wrapped())

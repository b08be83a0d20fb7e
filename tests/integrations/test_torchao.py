# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables as tensors that compute their values: a subclass of our own, and torchao's int8."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from modeling_peer import PeerLayer

NUM_TOKENS = [1, 300]  # through a layer in one call, and part by part


class Halves(torch.Tensor):
    """Stands for twice what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        return func(*tree_map_only(cls, lambda tensor: 2 * tensor.held, args), **(kwargs or {}))


def halve(layer):
    for name in ("down_embed", "up_embed"):
        table = getattr(layer.experts, name).detach()
        setattr(layer.experts, name, nn.Parameter(Halves(table / 2), requires_grad=False))


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_tables_that_compute_their_values_go_to_eager(tiny_config, num_tokens):
    layer, tokens = PeerLayer(tiny_config()).eval(), torch.randn(num_tokens, 32)
    expected = layer(tokens)
    halve(layer)
    torch.testing.assert_close(layer(tokens), expected)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_tables_that_compute_their_values_are_refused_by_an_implementation_asked_for(tiny_config, num_tokens):
    layer = PeerLayer(tiny_config(experts_implementation="cpu")).eval()
    halve(layer)
    with pytest.raises(ValueError, match=r'"cpu" needs plain tensors as tables; got Halves.*"eager"'):
        layer(torch.randn(num_tokens, 32))


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_int8_tables_of_torchao_compute_what_their_values_do(tiny_config, num_tokens):
    quantization = pytest.importorskip("torchao.quantization")
    layer = PeerLayer(tiny_config()).eval()
    config = quantization.FqnToConfig(
        {f"experts.{name}": quantization.Int8WeightOnlyConfig() for name in ("down_embed", "up_embed")}
    )
    quantization.quantize_(layer, config, filter_fn=None)
    assert type(layer.experts.up_embed) not in (nn.Parameter, torch.Tensor)
    tokens = torch.randn(num_tokens, 32)
    plain = PeerLayer(tiny_config(experts_implementation="eager")).eval()
    plain.load_state_dict({**layer.state_dict(), **_values(layer)})
    torch.testing.assert_close(layer(tokens), plain(tokens))


def _values(layer):
    names = ("down_embed", "up_embed")
    return {f"experts.{name}": getattr(layer.experts, name).dequantize() for name in names}

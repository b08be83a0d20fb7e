# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables as tensors that compute their values: a subclass of our own, and torchao's int8."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import TorchAoConfig

from modeling_peer import PeerForCausalLM, PeerLayer

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


@torch.no_grad()
@pytest.mark.parametrize("table_format", [None, "int8"])
def test_a_torchao_config_quantises_the_dense_part_and_leaves_tables_alone(tiny_config, tmp_path, table_format):
    """Saved and loaded again too. Tables are parameters of their own, and it replaces weights of `nn.Linear`."""
    quantization = pytest.importorskip("torchao.quantization")
    config = tiny_config(mlp_layer_types=["dense", "sparse", "dense"], expert_table_format=table_format)
    plain = PeerForCausalLM(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = PeerForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    model.save_pretrained(tmp_path / "quantised")
    again = PeerForCausalLM.from_pretrained(tmp_path / "quantised")
    for one in (model, again):
        layer = one.model.layers[1].mlp
        for table, saved in zip(layer.experts.tables(), plain.model.layers[1].mlp.experts.tables(), strict=True):
            assert type(table) in (nn.Parameter, type(None))
            assert table is None or torch.equal(table, saved)
        dense = (one.model.layers[0].mlp.up_proj, one.model.layers[1].self_attn.q_proj, layer.retrieval.query_proj)
        assert all(type(linear.weight) is not nn.Parameter for linear in dense)
        for num_tokens in NUM_TOKENS:
            tokens = torch.arange(num_tokens).remainder(98).add(1).view(1, -1)
            logits, expected = one(tokens).logits, plain(tokens).logits
            assert torch.isfinite(logits).all()
            assert (logits - expected).norm() < 0.2 * expected.norm()
            assert torch.equal(logits, model(tokens).logits)

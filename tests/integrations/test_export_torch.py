# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Exported, traced and transformed models hold PyTorch's operators only, and compute what eager does."""

import pytest
import torch
from export_helpers import KINDS, build, export_and_compare, exporters, inputs_of

from modeling_peer import PeerLayer


def own_operators(graph):
    return {str(node.target) for node in graph.nodes if "modeling_peer" in str(node.target)}


@pytest.mark.slow_but_first
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_needs_no_operator_of_this_package(tiny_config, kind, strict):
    model, inputs = build(kind, tiny_config), {**inputs_of(), "return_dict": True}
    with torch.no_grad():
        model(**inputs)  # which implementation runs otherwise was settled before
        program = torch.export.export(model, (), inputs, strict=strict)
        assert not own_operators(program.graph)
        others = {**inputs_of(), "return_dict": True}
        torch.testing.assert_close(program.module()(**others).logits, model(**others).logits, rtol=0, atol=1e-5)


def test_an_implementation_that_was_asked_for_by_name_is_exported(tiny_config):
    model = build("peer", tiny_config, experts_implementation="cpu")
    program = torch.export.export(model, (), {**inputs_of(), "return_dict": True})
    assert "modeling_peer.write_experts.default" in own_operators(program.graph)


def test_a_compiled_model_takes_the_operators_of_this_package(tiny_config):
    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module.graph)
        return graph_module

    layer = PeerLayer(tiny_config()).eval()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(3, 32))
    (graph,) = graphs
    assert any("write_experts" in operator for operator in own_operators(graph))


def test_transformers_exporter_for_torch(tiny_config):
    package = exporters()
    export_and_compare(package.DynamoExporter(), package.DynamoConfig(), build("peer", tiny_config), 1e-5)


def test_a_traced_layer_computes_what_eager_does_for_other_numbers_of_tokens(tiny_config):
    layer = PeerLayer(tiny_config()).eval()
    eager = PeerLayer(tiny_config(experts_implementation="eager")).eval()
    eager.load_state_dict(layer.state_dict())
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(5, 32))
        assert "modeling_peer::" not in str(traced.inlined_graph)
        for num_tokens in (1, 5, 9):
            tokens = torch.randn(num_tokens, 32)
            torch.testing.assert_close(traced(tokens), eager(tokens))


def test_functional_gradients_and_vmap_are_those_of_eager(tiny_config):
    layer = PeerLayer(tiny_config()).eval()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    tokens = torch.randn(4, 3, 32)

    def loss(parameters, tokens):
        return torch.func.functional_call(layer, parameters, (tokens,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for i, sample in enumerate(tokens):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad, msg=name)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A token or a few on CPU, a layer in one call: the results of many calls, and these where somebody looks."""

import copy

import accelerate
import pytest
import torch
from kernel_helpers import assert_close_in_scale
from torch import nn

from modeling_peer import PeerConfig, PeerLayer
from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.backends_peer import LAYER_OF_FEW_FUNCTIONS
from modeling_peer.experts_peer import PeerExperts
from modeling_peer.product_key_memory_peer import PeerProductKeyMemory
from modeling_peer.query_norms_peer import PeerBatchNorm, PeerLayerNorm

pytest.importorskip("numba")

from modeling_peer.kernels.cpu import few_tokens as cpu_few_tokens
from modeling_peer.kernels.cpu import threads as cpu_threads

SIZES = {
    "vocab_size": 16,
    "hidden_size": 20,
    "num_attention_heads": 2,
    "num_sub_keys": 45,  # no multiple of anything that sub-keys are scored in
    "num_retrieval_heads": 3,
    "num_experts_per_head": 13,  # 39 assignments: a part of experts that is not full
    "query_dim": 10,
}


def build(kind=PeerLayer, **changes):
    """A layer in evaluation whose norm has learned something."""
    layer = kind(PeerConfig(**{**SIZES, **changes}))
    norm = layer.retrieval.query_norm
    with torch.no_grad():
        nn.init.normal_(layer.retrieval.query_proj.bias)
        for values in [*norm.parameters(), *norm.buffers()]:
            values.uniform_(0.5, 1.5)
    return layer.eval()


def run(layer, tokens, implementation):
    """Output, without gradients."""
    layer.retrieval.config._experts_implementation = implementation
    with torch.no_grad():
        return layer(tokens)


@pytest.fixture
def calls(monkeypatch):
    """How many tokens went through a layer in each of its calls."""
    numbers, run_layer = [], cpu_few_tokens.run_layer

    def noted(tokens, *args):
        numbers.append(len(tokens))
        return run_layer(tokens, *args)

    monkeypatch.setattr(cpu_few_tokens, "run_layer", noted)
    return numbers


@pytest.mark.parametrize("num_tokens", [1, 3, 20])  # 60 queries: all but too many
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_sub_keys": False},
        {"query_norm": "rms_norm"},
        {"query_norm": "layer_norm"},
        {"query_norm": "none"},
        {"gate_activation": "sigmoid"},
        {"gated_experts": True, "expert_act": "silu"},
        {"expert_act": "relu"},
        {"expert_act": "identity"},
        {"expert_act": "swish"},
        {"num_retrieval_heads": 1, "num_experts_per_head": 1},
        {"kind": PeerProductKeyMemory, "sparse_mlp": "product_key_memory"},
    ],
    ids=str,
)
def test_one_call_gives_what_many_give(calls, num_tokens, changes):
    layer, tokens = build(**changes), torch.randn(num_tokens, SIZES["hidden_size"])
    output = run(layer, tokens, "cpu")
    assert calls == [num_tokens]
    # float32 sums in another order: at most 2e-6 of the outputs
    assert_close_in_scale(output, run(layer, tokens, "eager"))


def test_one_call_in_bfloat16_rounds_queries_as_many_do(calls):
    layer = build(query_norm="none").bfloat16()
    tokens = torch.randn(4, SIZES["hidden_size"]).bfloat16()
    output = run(layer, tokens, "cpu")
    assert calls == [4]
    assert output.dtype == torch.bfloat16
    # A query's sum in another order is now and then rounded to the other side; near a tie another sub-key wins then.
    torch.testing.assert_close(output, run(layer, tokens, "eager"), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("name", ["tanh", "gelu_pytorch_tanh"])
def test_activations_that_one_call_has_not_are_pytorchs(calls, name):
    layer, tokens = build(expert_act=name), torch.randn(2, SIZES["hidden_size"])
    output = run(layer, tokens, "cpu")
    assert calls == []
    assert_close_in_scale(output, run(layer, tokens, "eager"))


def test_neither_neighbours_nor_threads_change_a_bit():
    layer, tokens = build(num_sub_keys=300, hidden_size=200, query_dim=64), torch.randn(7, 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert (cpu_threads.num_threads_for(2**30) > 1) == (threads > 1)
            results.append(run(layer, tokens, "cpu"))
            one_by_one = [run(layer, token, "cpu") for token in tokens.split(1)]
            results.append(torch.cat(one_by_one))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def modules_within(layer):
    retrieval, experts = layer.retrieval, layer.experts
    return [retrieval, retrieval.query_proj, retrieval.query_norm, experts, experts.activation]


def test_hooks_of_the_modules_within_see_their_module(calls):
    layer, tokens, seen = build(), torch.randn(2, SIZES["hidden_size"]), []
    for module in modules_within(layer):
        hook = module.register_forward_hook(lambda module, _, output: seen.append(module))
        run(layer, tokens, "cpu")
        hook.remove()
        module.forward = lambda *args, module=module, forward=module.forward: seen.append("forward") or forward(*args)
        run(layer, tokens, "cpu")
        del module.forward
        assert seen == [module, "forward"]
        seen.clear()
    assert calls == []
    run(layer, tokens, "cpu")
    assert calls == [2]


def test_experts_with_a_forward_of_their_own_are_called(calls):
    class Silent(PeerExperts):
        def forward(self, hidden_states, expert_ids, gates):
            return torch.zeros_like(hidden_states)

    class Layer(PeerLayer):
        experts_class = Silent

    assert not run(build(Layer), torch.randn(2, SIZES["hidden_size"]), "cpu").any()
    assert calls == []


def test_offloaded_tables_come_when_the_parts_are_called(calls):
    layer, tokens = build(), torch.randn(2, SIZES["hidden_size"])
    expected = run(layer, tokens, "cpu")
    accelerate.cpu_offload(layer, torch.device("cpu"))
    assert_close_in_scale(run(layer, tokens, "cpu"), expected)
    assert calls == [2]  # the first time


def test_an_activation_that_is_no_module_is_called(calls):
    layer, tokens = build(), torch.randn(2, SIZES["hidden_size"])
    del layer.experts.activation
    layer.experts.activation = torch.tanh
    assert_close_in_scale(run(layer, tokens, "cpu"), run(layer, tokens, "eager"))
    assert calls == []


def test_the_balance_loss_of_a_short_input_is_computed_in_evaluation_too(calls):
    layer, tokens = build(balance_loss="switch"), torch.randn(2, SIZES["hidden_size"])
    losses = []
    for implementation in ("cpu", "eager"):
        layer.retrieval.config._experts_implementation = implementation
        collected = AuxiliaryLosses()
        with torch.no_grad():
            layer(tokens, aux_losses=collected)
        losses.append(collected.total)
    assert calls == []
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("query_norm", ["batch_norm", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", ["query_proj", "query_norm"])
def test_weights_that_are_plain_attributes_count(calls, part, query_norm):
    """As FSDP1 leaves them, which registers parameters under other names."""
    layer, tokens = build(query_norm=query_norm), torch.randn(2, SIZES["hidden_size"])
    expected = run(layer, tokens, "cpu")
    module = getattr(layer.retrieval, part)
    for name, values in dict(module.named_parameters()).items():
        delattr(module, name)
        setattr(module, name, values.detach())
    output = run(layer, tokens, "cpu")
    assert calls == [2]  # the first time
    assert_close_in_scale(output, expected)


def test_a_norm_that_still_learns_its_statistics_does(calls):
    layer = build()
    norm = layer.retrieval.query_norm.train()
    before = norm.running_mean.clone()
    run(layer, torch.randn(3, SIZES["hidden_size"]), "cpu")
    assert not torch.equal(norm.running_mean, before)
    assert calls == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"top_k": 46}, "top_k .46. exceeds the 45 sub-keys"),
        ({"query_dim": 12, "query_proj": nn.Linear(20, 36)}, "query has 12 features; sub_keys have two halves of 5"),
        ({"query_proj": nn.Linear(21, 30)}, "shapes cannot be multiplied"),
        ({"query_norm": PeerBatchNorm(20).eval()}, "should contain 30 elements not 20"),
        ({"query_norm": PeerLayerNorm(4)}, "normalized_shape"),
        ({"sub_keys": nn.Parameter(torch.randn(2, 2, 45, 5))}, "query has 3 heads, sub_keys 2"),
    ],
    ids=["k", "query_dim", "hidden_size", "batch norm", "layer norm", "heads"],
)
def test_shapes_that_do_not_fit_are_refused_as_by_the_parts(calls, change, error):
    layer = build(query_norm="none")
    for name, value in change.items():
        setattr(layer.retrieval, name, value)
    layer.retrieval.has_batch_norm = "query_norm" in change and isinstance(change["query_norm"], PeerBatchNorm)
    with pytest.raises((RuntimeError, ValueError), match=error):
        run(layer, torch.randn(2, SIZES["hidden_size"]), "cpu")
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [2, 70])  # in one call, and in parts
def test_results_are_float32_whatever_the_default_is(num_tokens, dtype):
    layer, tokens = build(), torch.randn(num_tokens, SIZES["hidden_size"])
    expected = run(layer, tokens, "cpu")
    torch.set_default_dtype(dtype)
    try:
        results = run(layer, tokens, "cpu")
        layer(tokens).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(results, expected)
    assert results.dtype == torch.float32
    assert layer.retrieval.sub_keys.grad.dtype == torch.float32
    assert layer.retrieval.sub_keys.grad.isfinite().all()


class Doubled(nn.Linear):
    """As an adapter that stands in a module's place."""

    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_a_hook_of_every_module_sees_them_all(calls):
    layer, seen = build(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(layer, torch.randn(2, SIZES["hidden_size"]), "cpu")
    finally:
        hook.remove()
    assert set(modules_within(layer)) <= set(seen)
    assert calls == []


def test_a_query_network_of_another_kind_computes_itself(calls):
    layer, tokens = build(), torch.randn(2, SIZES["hidden_size"])
    layer.retrieval.query_proj.__class__ = Doubled
    output = run(layer, tokens, "cpu")
    assert calls == []
    assert_close_in_scale(output, run(layer, tokens, "eager"))


def test_a_norm_in_another_type_computes_itself(calls):
    layer, tokens = build(query_norm="layer_norm"), torch.randn(2, SIZES["hidden_size"])
    norm = layer.retrieval.query_norm
    with torch.no_grad():
        norm.weight, norm.bias = (nn.Parameter(values.double()) for values in (norm.weight, norm.bias))
        layer.retrieval.config._experts_implementation = "cpu"
        with pytest.raises(RuntimeError, match="type"):  # PyTorch's own word, and not another norm's
            layer(tokens)
    assert calls == []


def test_gradients_training_and_autocast_go_through_the_parts(calls):
    layer, tokens = build(), torch.randn(2, SIZES["hidden_size"])
    layer.retrieval.config._experts_implementation = "cpu"
    layer(tokens).sum().backward()
    assert layer.retrieval.query_proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        before = layer.retrieval.query_norm.running_mean.clone()
        layer.train()(tokens)
        assert not torch.equal(layer.retrieval.query_norm.running_mean, before)
        layer.eval()
        with torch.autocast("cpu"):
            layer(tokens)
    assert calls == []


def test_frozen_tables_and_tokens_of_a_model_that_learns_elsewhere_need_no_gradient(calls):
    layer = build().requires_grad_(False)
    layer.retrieval.config._experts_implementation = "cpu"
    layer(torch.randn(2, SIZES["hidden_size"]))
    assert calls == [2]


def test_nan_stays_with_its_token(calls):
    layer, tokens = build(), torch.randn(3, SIZES["hidden_size"])
    clean = run(layer, tokens, "cpu")
    tokens[1, 4] = torch.nan
    output = run(layer, tokens, "cpu")
    assert output[1].isnan().all()
    assert torch.equal(output[[0, 2]], clean[[0, 2]])
    assert calls == [3, 3]


def test_no_token_and_many_tokens_are_not_few(calls):
    layer = build()
    for num_tokens in (0, 22):  # 66 queries
        output = run(layer, torch.randn(num_tokens, SIZES["hidden_size"]), "cpu")
        assert output.shape == (num_tokens, SIZES["hidden_size"])
    assert calls == []


def test_a_layer_compiled_with_one_token_has_the_same_output():
    layer, tokens = build(), torch.randn(1, SIZES["hidden_size"])
    output = run(layer, tokens, "cpu")
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(tokens)
    assert_close_in_scale(compiled, output)


def test_only_the_cpu_implementation_has_such_calls():
    assert list(LAYER_OF_FEW_FUNCTIONS) == ["cpu"]

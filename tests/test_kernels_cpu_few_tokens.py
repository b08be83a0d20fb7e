"""A token or a few on CPU, a layer in two calls: the results of many calls, and these where somebody looks."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_peer import PeerConfig, PeerLayer
from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, RETRIEVAL_OF_FEW_FUNCTIONS
from modeling_peer.experts_peer import expert_mixture as eager_mixture
from modeling_peer.product_key_memory_peer import PeerProductKeyMemory
from modeling_peer.retrieval_peer import PeerBatchNorm, PeerLayerNorm

pytest.importorskip("numba")

from modeling_peer.kernels import cpu_few_tokens, cpu_threads

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
    """Output, gates and ids, without gradients."""
    layer.retrieval.config._experts_implementation = implementation
    with torch.no_grad():
        return layer(tokens), *layer.retrieval(tokens)


@pytest.fixture
def calls(monkeypatch):
    """Names of the calls that computed something at once."""
    names = []
    for name in ("retrieve", "mix"):
        function = getattr(cpu_few_tokens, name)

        def noted(*args, name=name, function=function):
            names.append(name)
            return function(*args)

        monkeypatch.setattr(cpu_few_tokens, name, noted)
    return names


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
        {"num_retrieval_heads": 1, "num_experts_per_head": 1},
        {"kind": PeerProductKeyMemory, "sparse_mlp": "product_key_memory"},
    ],
    ids=str,
)
def test_one_call_gives_what_many_give(calls, num_tokens, changes):
    layer, tokens = build(**changes), torch.randn(num_tokens, SIZES["hidden_size"])
    output, gates, expert_ids = run(layer, tokens, "cpu")
    assert calls == ["retrieve", "mix", "retrieve"]
    expected_output, expected_gates, expected_ids = run(layer, tokens, "eager")
    assert torch.equal(expert_ids, expected_ids)
    # float32 sums in another order: at most 7e-7 of the gates, 2e-6 of the outputs
    torch.testing.assert_close(gates, expected_gates, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(output, expected_output, atol=1e-5, rtol=1e-5)


def test_one_call_in_bfloat16_rounds_queries_as_many_do(calls):
    layer = build(query_norm="none").bfloat16()
    tokens = torch.randn(4, SIZES["hidden_size"]).bfloat16()
    output, gates, expert_ids = run(layer, tokens, "cpu")
    assert calls == ["retrieve", "mix", "retrieve"]
    expected_output, expected_gates, expected_ids = run(layer, tokens, "eager")
    assert output.dtype == torch.bfloat16
    # A query's sum in another order is now and then rounded to the other side; near a tie another sub-key wins then.
    assert (expert_ids == expected_ids).float().mean() > 0.8
    torch.testing.assert_close(gates.sort().values, expected_gates.sort().values, atol=0.02, rtol=0.05)
    torch.testing.assert_close(output, expected_output, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "swish", "linear", "tanh", "gelu_pytorch_tanh"])
def test_activations_that_one_call_has_not_are_pytorchs(calls, name):
    activation = nn.Identity() if name == "linear" else ACT2FN[name]
    tokens, ids, gates = torch.randn(2, 8), torch.randint(50, (2, 5)), torch.rand(2, 5)
    down, up = torch.randn(50, 8), torch.randn(50, 8)
    inputs = (4 * tokens, ids, gates, down, up, None, activation)
    output = EXPERT_MIXTURE_FUNCTIONS["cpu"](*inputs)
    assert calls == ([] if name in ("tanh", "gelu_pytorch_tanh") else ["mix"])
    torch.testing.assert_close(output, eager_mixture(*inputs), atol=1e-5, rtol=1e-5)


def test_neither_neighbours_nor_threads_change_a_bit():
    layer, tokens = build(num_sub_keys=300, hidden_size=200, query_dim=64), torch.randn(7, 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert (cpu_threads.team_for(2**30) > 1) == (threads > 1)
            results.append(run(layer, tokens, "cpu"))
            one_by_one = [run(layer, token, "cpu") for token in tokens.split(1)]
            results.append([torch.cat(parts) for parts in zip(*one_by_one, strict=True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_hooks_of_the_query_network_and_its_norm_see_their_module(calls):
    layer, tokens, seen = build(), torch.randn(2, SIZES["hidden_size"]), []
    for module in (layer.retrieval.query_proj, layer.retrieval.query_norm):
        hook = module.register_forward_hook(lambda module, _, output: seen.append((module, output)))
        run(layer, tokens, "cpu")
        hook.remove()
        assert [kind for kind, _ in seen] == [module, module]
        seen.clear()
    assert calls == ["mix", "mix"]


def test_the_balance_loss_of_a_short_input_is_computed_in_evaluation_too(calls):
    layer, tokens = build(balance_loss="switch"), torch.randn(2, SIZES["hidden_size"])
    losses = []
    for implementation in ("cpu", "eager"):
        layer.retrieval.config._experts_implementation = implementation
        collected = AuxiliaryLosses()
        with torch.no_grad():
            layer(tokens, aux_losses=collected)
        losses.append(collected.total)
    assert calls == ["mix"]
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("query_norm", ["batch_norm", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", ["query_proj", "query_norm"])
def test_weights_that_are_plain_attributes_count(calls, part, query_norm):
    """As FSDP1 leaves them, which registers parameters under other names."""
    layer, tokens = build(query_norm=query_norm), torch.randn(2, SIZES["hidden_size"])
    expected, _, _ = run(layer, tokens, "cpu")
    module = getattr(layer.retrieval, part)
    for name, values in dict(module.named_parameters()).items():
        delattr(module, name)
        setattr(module, name, values.detach())
    output, _, _ = run(layer, tokens, "cpu")
    assert calls == ["retrieve", "mix", "retrieve", "mix"]  # the parts, the second time
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_a_norm_that_still_learns_its_statistics_does(calls):
    layer = build()
    norm = layer.retrieval.query_norm.train()
    before = norm.running_mean.clone()
    run(layer, torch.randn(3, SIZES["hidden_size"]), "cpu")
    assert not torch.equal(norm.running_mean, before)
    assert calls == ["mix"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"top_k": 46}, "top_k .46. exceeds the 45 sub-keys"),
        ({"query_dim": 12, "query_proj": nn.Linear(20, 36)}, "query has 12 features, sub_keys two halves of 5"),
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
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))
    assert layer.retrieval.sub_keys.grad.dtype == torch.float32
    assert layer.retrieval.sub_keys.grad.isfinite().all()


class Doubled(nn.Linear):
    """As an adapter that stands in a module's place."""

    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_a_hook_of_the_activation_sees_it(calls):
    layer, seen = build(), []
    hook = layer.experts.activation.register_forward_hook(lambda module, *_: seen.append(module))
    run(layer, torch.randn(2, SIZES["hidden_size"]), "cpu")
    assert seen == [layer.experts.activation]
    assert calls == ["retrieve", "retrieve"]
    hook.remove()
    layer.experts.activation.forward = lambda values: seen.append("forward") or values
    run(layer, torch.randn(2, SIZES["hidden_size"]), "cpu")
    assert seen[1:] == ["forward"]
    assert "mix" not in calls


def test_a_hook_of_every_module_sees_them_all(calls):
    layer, seen = build(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(layer, torch.randn(2, SIZES["hidden_size"]), "cpu")
    finally:
        hook.remove()
    assert {layer.retrieval.query_proj, layer.retrieval.query_norm, layer.experts.activation} <= set(seen)
    assert calls == []


def test_a_query_network_of_another_kind_computes_itself(calls):
    layer, tokens = build(), torch.randn(2, SIZES["hidden_size"])
    layer.retrieval.query_proj.__class__ = Doubled
    output, _, _ = run(layer, tokens, "cpu")
    assert calls == ["mix"]
    torch.testing.assert_close(output, run(layer, tokens, "eager")[0], atol=1e-5, rtol=1e-5)


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
        assert calls == ["mix"]  # of the second
        calls.clear()
        layer.eval()
        with torch.autocast("cpu"):
            layer(tokens)
    assert "retrieve" not in calls


def test_frozen_tables_and_tokens_of_a_model_that_learns_elsewhere_need_no_gradient(calls):
    layer = build().requires_grad_(False)
    layer.retrieval.config._experts_implementation = "cpu"
    layer(torch.randn(2, SIZES["hidden_size"]))
    assert calls == ["retrieve", "mix"]


def test_nan_stays_with_its_token(calls):
    layer, tokens = build(), torch.randn(3, SIZES["hidden_size"])
    clean, _, _ = run(layer, tokens, "cpu")
    tokens[1, 4] = torch.nan
    output, gates, expert_ids = run(layer, tokens, "cpu")
    assert output[1].isnan().all()
    assert gates[1].isnan().any()
    assert ((expert_ids >= 0) & (expert_ids < SIZES["num_sub_keys"] ** 2)).all()
    assert torch.equal(output[[0, 2]], clean[[0, 2]])


def test_no_token_and_many_tokens_are_not_few(calls):
    layer = build()
    for num_tokens in (0, 22):  # 66 queries
        output, _, _ = run(layer, torch.randn(num_tokens, SIZES["hidden_size"]), "cpu")
        assert output.shape == (num_tokens, SIZES["hidden_size"])
    assert calls.count("retrieve") == 0


def test_an_expert_that_does_not_exist_is_refused_with_the_numbers():
    table = torch.randn(9, 4)
    inputs = (torch.randn(1, 4), torch.tensor([[0, 9]]), torch.rand(1, 2), table, table)
    with pytest.raises(IndexError, match="expert_ids lie from 0 to 9, but the table has 9 experts"):
        EXPERT_MIXTURE_FUNCTIONS["cpu"](*inputs)


def test_a_layer_compiled_with_one_token_has_the_same_output():
    layer, tokens = build(), torch.randn(1, SIZES["hidden_size"])
    output, _, _ = run(layer, tokens, "cpu")
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(tokens)
    torch.testing.assert_close(compiled, output, atol=1e-5, rtol=1e-5)


def test_only_the_cpu_implementation_has_such_calls():
    assert list(RETRIEVAL_OF_FEW_FUNCTIONS) == ["cpu"]

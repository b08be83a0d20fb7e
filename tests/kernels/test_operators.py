# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Every fast implementation through its operators, against the oracles: results, every gradient, hard cases, errors.

"cpu" runs as it is; "triton" on a GPU, or without one in Triton's interpreter.
"""

from functools import partial

import pytest
import reference
import torch
from kernel_helpers import (
    assert_close_in_scale,
    assert_sums_close,
    mixture_inputs,
    output_and_gradients,
    positive,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modeling_peer import PeerLayer
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, RETRIEVAL_FUNCTIONS
from modeling_peer.experts_peer import expert_mixture as eager_mixture

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["cpu", "triton"])
def implementation(request, poisoned_memory):
    pytest.importorskip("numba" if request.param == "cpu" else "triton")
    return request.param


@pytest.fixture
def device(implementation):
    return TRITON_DEVICE if implementation == "triton" else "cpu"


@pytest.fixture
def retrieve(implementation):
    return RETRIEVAL_FUNCTIONS[implementation]


@pytest.fixture
def mixture(implementation):
    return EXPERT_MIXTURE_FUNCTIONS[implementation]


class TestRetrieval:
    @pytest.mark.parametrize("share_sub_keys", [True, False])
    @pytest.mark.parametrize(
        ("num_tokens", "num_heads", "num_sub_keys", "half", "top_k"),
        [
            (3, 2, 2, 1, 2),  # the smallest codebooks, all pairs retrieved
            (7, 3, 32, 4, 16),  # the paper's k
            (5, 1, 9, 4, 9),  # nothing pruned in the first stage, n no power of two
            (1, 16, 40, 8, 4),  # one token, many heads
            (2, 2, 100, 5, 64),  # many experts per head
            (67, 1, 70, 12, 3),  # enough queries to be scored in blocks, the last one not full
            (100, 2, 65, 6, 16),  # a group of sub-keys with a single member
        ],
    )
    def test_equals_exhaustive_search(
        self, retrieve, device, num_tokens, num_heads, num_sub_keys, half, top_k, share_sub_keys
    ):
        query = torch.randn(num_tokens, num_heads, 2 * half, device=device)
        codebooks = (2, num_sub_keys, half) if share_sub_keys else (num_heads, 2, num_sub_keys, half)
        sub_keys = torch.randn(codebooks, device=device)
        assert_is_exact(query, sub_keys, top_k, retrieve(query, sub_keys, top_k))

    @pytest.mark.slow_in_the_interpreter
    def test_equals_exhaustive_search_in_a_million_experts(self, retrieve, device):
        query, sub_keys = torch.randn(1, 2, 16, device=device), torch.randn(2, 1024, 8, device=device)
        assert_is_exact(query, sub_keys, 16, retrieve(query, sub_keys, 16))

    @pytest.mark.parametrize("num_tokens", [1, 80])  # scored one by one, in blocks
    def test_ties_give_different_experts_with_the_scores_they_have(self, implementation, retrieve, device, num_tokens):
        query = torch.ones(num_tokens, 1, 4, device=device)
        sub_keys = torch.zeros(2, 80, 2, device=device)
        sub_keys[:, ::2] = 1.0  # half of the sub-keys win equally
        assert_is_exact(query, sub_keys, 5, retrieve(query, sub_keys, 5))
        query = query[: 1 if device == "cpu" and implementation == "triton" else None]  # slow in the interpreter
        assert_is_exact(query, sub_keys * 0, 64, retrieve(query, sub_keys * 0, 64))

    def test_of_no_token(self, retrieve, device):
        scores, expert_ids = retrieve(torch.empty(0, 2, 8, device=device), torch.randn(2, 9, 4, device=device), 3)
        assert scores.shape == expert_ids.shape == (0, 2, 3)

    @pytest.mark.parametrize("num_tokens", [3, 80])
    def test_nan_in_a_query_stays_visible_and_with_its_token(self, retrieve, device, num_tokens):
        query, sub_keys = torch.randn(num_tokens, 1, 8, device=device), torch.randn(2, 9, 4, device=device)
        query[1, 0, 2] = torch.nan
        scores, expert_ids = retrieve(query, sub_keys, 3)
        assert scores[1].isnan().any()
        assert ((expert_ids >= 0) & (expert_ids < 81)).all()
        clean = torch.arange(num_tokens) != 1
        assert_is_exact(query[clean], sub_keys, 3, (scores[clean], expert_ids[clean]))

    @pytest.mark.parametrize("num_tokens", [3, 80])
    def test_nan_in_a_sub_key_stays_visible(self, retrieve, device, num_tokens):
        query, sub_keys = torch.randn(num_tokens, 1, 8, device=device), torch.randn(2, 9, 4, device=device)
        sub_keys[1, 5, 2] = torch.nan
        scores, expert_ids = retrieve(query, sub_keys, 3)
        assert scores.isnan().any(dim=-1).all()
        assert ((expert_ids >= 0) & (expert_ids < 81)).all()

    def test_of_non_contiguous_inputs_in_bfloat16(self, retrieve, device):
        query = torch.randn(8, 2, 5, device=device).transpose(0, 2)  # (5, 2, 8)
        sub_keys = torch.randn(4, 9, 2, device=device, dtype=torch.bfloat16).transpose(0, 2)  # (2, 9, 4)
        assert_is_exact(query, sub_keys.float(), 3, retrieve(query, sub_keys, 3))

    @pytest.mark.slow_in_the_interpreter
    @pytest.mark.parametrize("share_sub_keys", [True, False])
    @pytest.mark.parametrize("num_tokens", [1, 70])
    def test_gradients_equal_those_of_exhaustive_search(self, retrieve, device, num_tokens, share_sub_keys):
        query = torch.randn(num_tokens, 2, 12, device=device, requires_grad=True)
        sub_keys = torch.randn(*(() if share_sub_keys else (2,)), 2, 11, 6, device=device, requires_grad=True)
        upstream = torch.randn(num_tokens, 2, 5, device=device)
        scores, _ = retrieve(query, sub_keys, 5)
        gradients = torch.autograd.grad(scores, (query, sub_keys), upstream)
        expected_scores, _ = reference.exhaustive_top_k(query.double(), sub_keys.double(), 5)
        expected = torch.autograd.grad(expected_scores, (query, sub_keys), upstream.double())
        _, expert_ids = retrieve(query, sub_keys, 5)
        positives = [tensor.detach().abs().double().requires_grad_() for tensor in (query, sub_keys)]
        scores = reference.score_of(*positives, expert_ids)
        magnitudes = torch.autograd.grad(scores, positives, upstream.abs().double())
        for actual, exact, magnitude in zip(gradients, expected, magnitudes, strict=True):
            assert_sums_close(actual, exact, magnitude)

    def test_refuses_what_does_not_fit(self, retrieve, device):
        query = torch.randn(3, 2, 8, device=device)
        with pytest.raises(ValueError, match=r"8 features.*halves of 5"):
            retrieve(query, torch.randn(2, 9, 5, device=device), 3)
        with pytest.raises(ValueError, match=r"2 heads.*3"):
            retrieve(query, torch.randn(3, 2, 9, 4, device=device), 3)
        with pytest.raises(ValueError, match=r"top_k \(10\) exceeds the 9"):
            retrieve(query, torch.randn(2, 9, 4, device=device), 10)


def assert_is_exact(query, sub_keys, top_k, result):
    query, sub_keys, scores, expert_ids = (tensor.cpu() for tensor in (query, sub_keys, *result))
    expected_scores, _ = reference.exhaustive_top_k(query.double(), sub_keys.double(), top_k)
    assert scores.dtype == torch.float32
    own_scores = reference.score_of(query.double(), sub_keys.double(), expert_ids)
    # of the retrieved experts; ties may swap ids, never scores
    magnitudes = reference.score_of(query.double().abs(), sub_keys.double().abs(), expert_ids)
    assert_sums_close(scores, own_scores, magnitudes)
    assert_sums_close(scores, expected_scores, magnitudes.amax(-1, keepdim=True))
    assert all(len(set(ids)) == top_k for ids in expert_ids.flatten(0, 1).tolist()), "an expert retrieved twice"


def assert_equals_the_loop(mixture, inputs, activation=nn.functional.gelu, rtol=0.0):
    """`rtol`: of the results themselves, where those are rounded to a narrower type."""
    double = {
        name: tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor.cpu()
        for name, tensor in inputs.items()
    }
    options = {"activation": activation}
    expected_output, expected = output_and_gradients(reference.expert_mixture, double, **options)
    # The slope of GELU is at most 1.13 where that of its mirror image is 1: signs apart, the terms are these.
    largest, magnitudes = output_and_gradients(
        reference.expert_mixture, positive(double), all_positive=True, **options
    )
    for row_sparse in (False, True):
        output, gradients = output_and_gradients(mixture, inputs, row_sparse_gradients=row_sparse, **options)
        assert_sums_close(output, expected_output, largest, rtol, "output")
        for name in gradients:
            message = f"{name}, row-sparse {row_sparse}"
            assert_sums_close(gradients[name], expected[name], magnitudes[name], rtol, message)


class TestMixture:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("activation", [nn.GELU(), nn.Identity()], ids=["gelu", "identity"])
    def test_and_its_gradients_equal_the_loop(self, mixture, device, gated, activation):
        assert_equals_the_loop(mixture, mixture_inputs(device, gated=gated), activation)

    @pytest.mark.parametrize(
        "sizes",
        [
            {"num_tokens": 1},  # one-token decoding
            {"num_active": 1},  # k = h = 1
            {"num_experts": 1},  # all tokens on one expert: every gradient lands on one row
            {"width": 1},
            {"num_tokens": 13, "width": 33, "num_experts": 17},  # nothing a power of two
            {"num_tokens": 3, "num_active": 64, "width": 100, "num_experts": 40},  # many experts, odd width
            {"num_tokens": 2, "width": 520},  # wider than a block
        ],
        ids=str,
    )
    def test_at_the_edges(self, mixture, device, sizes):
        assert_equals_the_loop(mixture, mixture_inputs(device, **sizes))

    def test_when_every_assignment_is_a_different_expert(self, mixture, device):
        inputs = mixture_inputs(device, num_tokens=4, num_active=3, num_experts=12)
        inputs["expert_ids"] = torch.randperm(12, device=device).view(4, 3)
        assert_equals_the_loop(mixture, inputs)

    @pytest.mark.slow_in_the_interpreter
    def test_when_every_token_picks_one_expert_many_times(self, mixture, device):
        inputs = mixture_inputs(device, num_tokens=40, num_active=8, num_experts=5)
        inputs["expert_ids"] = torch.full_like(inputs["expert_ids"], 2)
        assert_equals_the_loop(mixture, inputs)

    def test_with_no_token(self, mixture, device):
        output, gradients = output_and_gradients(mixture, mixture_inputs(device, num_tokens=0))
        assert output.shape == (0, 7)
        assert not gradients["up_embed"].any()
        assert not gradients["down_embed"].any()

    def test_in_bfloat16_sums_in_float32(self, implementation, mixture, device):
        inputs = mixture_inputs(device, num_active=32, width=48, dtype=torch.bfloat16)
        output, gradients = output_and_gradients(mixture, inputs)
        assert output.dtype == gradients["down_embed"].dtype == gradients["hidden_states"].dtype == torch.bfloat16
        # 2**-8 is one rounding to bfloat16, which Triton's interpreter does by truncating; sums rounded at every step
        # would be off by several.
        one_rounding = 2**-7 if device == "cpu" and implementation == "triton" else 2**-8
        assert_equals_the_loop(mixture, inputs, rtol=one_rounding)

    def test_of_non_contiguous_inputs(self, mixture, device):
        inputs = mixture_inputs(device, num_tokens=6, num_active=7, width=6)
        for name in ("hidden_states", "gates", "down_embed"):
            inputs[name] = inputs[name].detach().T.contiguous().T.requires_grad_()
        inputs["expert_ids"] = inputs["expert_ids"].T.contiguous().T
        assert_equals_the_loop(mixture, inputs)

    @pytest.mark.parametrize("frozen", ["hidden_states", "gates", "down_embed", "up_embed", "gate_embed"])
    def test_with_one_input_frozen(self, mixture, device, frozen):
        inputs = mixture_inputs(device, gated=True)
        inputs[frozen] = inputs[frozen].detach()
        assert_equals_the_loop(mixture, inputs)

    @pytest.mark.parametrize("row_sparse", [False, True])
    def test_without_readers_writes_the_values_of_a_memory(self, mixture, device, row_sparse):
        inputs = mixture_inputs(device)
        inputs["hidden_states"] = inputs["hidden_states"].detach()  # only its dtype counts
        del inputs["down_embed"]
        results = [
            output_and_gradients(partial(function, down_embed=None), inputs, row_sparse_gradients=row_sparse)
            for function in (mixture, eager_mixture)
        ]
        torch.testing.assert_close(*results)

    def test_trains_an_activation_that_learns(self, mixture, device):
        inputs = mixture_inputs(device)
        slopes = {}
        for name, function in (("fast", mixture), ("eager", eager_mixture)):
            activation = nn.PReLU().to(device)
            function(**inputs, activation=activation).sum().backward()
            slopes[name] = activation.weight.grad
        assert slopes["eager"].abs() > 0
        torch.testing.assert_close(slopes["fast"], slopes["eager"])

    def test_row_sparse_gradients_hold_the_retrieved_rows_in_order(self, mixture, device):
        inputs = mixture_inputs(device, num_experts=50)
        mixture(**inputs, row_sparse_gradients=True).sum().backward()
        for name in ("down_embed", "up_embed"):
            gradient = inputs[name].grad
            assert gradient.layout == torch.sparse_coo
            assert gradient.shape == (50, 7)
            assert torch.equal(gradient._indices()[0], inputs["expert_ids"].unique())

    @pytest.mark.slow_in_the_interpreter
    def test_is_bit_identical_from_run_to_run(self, mixture, device):
        inputs = mixture_inputs(device, num_tokens=20, width=40, num_experts=15, gated=True)
        first_output, first = output_and_gradients(mixture, inputs)
        for _ in range(3):
            output, gradients = output_and_gradients(mixture, inputs)
            assert torch.equal(output, first_output)
            for name in first:
                assert torch.equal(gradients[name], first[name]), name

    def test_refuses_what_does_not_fit(self, mixture, device):
        inputs = mixture_inputs(device)
        with pytest.raises(ValueError, match=r"\(5, 7\).*\(9, 7\), \(9, 6\) must have one width"):
            mixture(**{**inputs, "up_embed": inputs["up_embed"][:, :6]})
        with pytest.raises(ValueError, match=r"expert_ids \(4, 6\) and gates \(5, 6\)"):
            mixture(**{**inputs, "expert_ids": inputs["expert_ids"][:4]})


class TestOperators:
    """What `torch.compile`, export and checkpointing need of an operator."""

    def test_pass_the_checks_of_pytorch(self, implementation, device):
        if implementation == "triton" and device == "cpu":
            pytest.skip("the checks run operators on fake tensors, which the interpreter would look into")
        query, sub_keys = torch.randn(3, 2, 8, requires_grad=True), torch.randn(2, 9, 4, requires_grad=True)
        tokens, table = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
        ids = torch.randint(9, (3, 4))
        weights = torch.rand(3, 4, requires_grad=True)
        order = ids.flatten().argsort(stable=True)
        for name, args in {
            "product_key_top_k": (query, sub_keys, 3),
            "read_experts": (tokens, ids, table, order, False),
            "write_experts": (weights, ids, table, None, False),
            "group_by_expert": (ids,),
            "row_gradients": (weights.detach(), tokens.detach(), ids, order, 9, torch.float32, False),
            "write_experts_gradients": (tokens.detach(), weights.detach(), ids, order, table.detach(), False),
        }.items():
            # Leaves, on a GPU too: the checks pass over the gradients of others.
            args = [
                arg.detach().to(device).requires_grad_(arg.requires_grad) if isinstance(arg, torch.Tensor) else arg
                for arg in args
            ]
            torch.library.opcheck(getattr(torch.ops.modeling_peer, name).default, (*args, implementation))

    def test_compile_to_one_graph_forward_and_backward(self, mixture, retrieve, device):
        def layer(query, sub_keys, **inputs):
            scores, expert_ids = retrieve(query, sub_keys, 3)
            return mixture(expert_ids=expert_ids.flatten(1), gates=scores.softmax(-1).flatten(1), **inputs)

        inputs = mixture_inputs(device, num_experts=81, gated=True)
        del inputs["expert_ids"], inputs["gates"]
        inputs["query"] = torch.randn(5, 2, 8, device=device, requires_grad=True)
        inputs["sub_keys"] = torch.randn(2, 9, 4, device=device, requires_grad=True)
        output, gradients = output_and_gradients(layer, inputs)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled_output, compiled_gradients = output_and_gradients(compiled, inputs)
        torch.testing.assert_close(compiled_output, output)
        for name in gradients:
            torch.testing.assert_close(compiled_gradients[name], gradients[name])

    def test_a_direct_call_gives_the_bits_of_the_operator(self, implementation, retrieve, device):
        query, sub_keys = torch.randn(3, 2, 8, device=device), torch.randn(2, 9, 4, device=device)
        operator = torch.ops.modeling_peer.product_key_top_k
        for direct, dispatched in zip(
            retrieve(query, sub_keys, 3), operator(query, sub_keys, 3, implementation), strict=True
        ):
            assert torch.equal(direct, dispatched)

    def test_the_result_without_gradients_is_that_with_them(self, mixture, device):
        inputs = mixture_inputs(device)
        expected = mixture(**inputs)
        with torch.no_grad():
            assert torch.equal(mixture(**inputs), expected)

    def test_are_seen_without_gradients_too_by_who_looks_at_operators(self, mixture, retrieve, device):
        inputs = {name: tensor.detach() for name, tensor in mixture_inputs(device, num_experts=81).items()}
        query, sub_keys = torch.randn(5, 2, 8, device=device), torch.randn(2, 9, 4, device=device)
        seen = []

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        class Function(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        for mode in (Dispatch(), Function()):
            seen.clear()
            with mode:
                retrieve(query, sub_keys, 3)
                mixture(**inputs)
            for name in ("product_key_top_k", "read_experts", "write_experts"):
                assert getattr(torch.ops.modeling_peer, name).default in seen, (mode, name)

        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
            assert mixture(**fake).shape == (5, 7)
        negated = dict(inputs, hidden_states=torch._neg_view(-inputs["hidden_states"]))
        torch.testing.assert_close(mixture(**negated), mixture(**inputs))
        meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
        assert mixture(**meta).shape == (5, 7)

    def test_a_batch_of_gradients_is_that_of_each(self, mixture, device):
        inputs = mixture_inputs(device)
        output, gates = mixture(**inputs), inputs["gates"]
        directions = torch.randn(3, *output.shape, device=device)
        grad = partial(torch.autograd.grad, output, gates, retain_graph=True)
        (together,) = grad(grad_outputs=directions, is_grads_batched=True)
        apart = [grad(grad_outputs=direction)[0] for direction in directions]
        torch.testing.assert_close(together, torch.stack(apart))

    @pytest.mark.parametrize("trained", ["hidden_states", "gates", "down_embed", "up_embed"])
    def test_gradients_flow_to_the_only_input_that_needs_one(self, mixture, device, trained):
        inputs = mixture_inputs(device)
        _, expected = output_and_gradients(mixture, inputs)
        inputs = {name: tensor.detach().requires_grad_(name == trained) for name, tensor in inputs.items()}
        _, gradients = output_and_gradients(mixture, inputs)
        assert list(gradients) == [trained]
        torch.testing.assert_close(gradients[trained], expected[trained])

    def test_under_gradient_checkpointing(self, mixture, device):
        inputs = mixture_inputs(device)
        names = list(inputs)

        def checkpointed(**inputs):
            function = lambda *values: mixture(**dict(zip(names, values, strict=True)))  # noqa: E731
            return checkpoint(function, *inputs.values(), use_reentrant=False)

        output, gradients = output_and_gradients(checkpointed, inputs)
        expected_output, expected = output_and_gradients(mixture, inputs)
        assert torch.equal(output, expected_output)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


class TestLayer:
    @pytest.mark.slow_in_the_interpreter
    def test_a_layer_gives_the_same_with_any_implementation(self, implementation, device, tiny_config):
        config = tiny_config(query_norm="rms_norm", gated_experts=True)
        config._experts_implementation = "eager"
        layer = PeerLayer(config).to(device)
        hidden_states = torch.randn(2, 9, 32, device=device, requires_grad=True)
        results = {}
        for name in ("eager", implementation):
            config._experts_implementation = name
            layer.zero_grad()
            output = layer(hidden_states)
            (gradient,) = torch.autograd.grad(output.square().sum(), hidden_states, retain_graph=True)
            output.square().sum().backward()
            results[name] = [output, gradient, *(parameter.grad for parameter in layer.parameters())]
            hidden_states.grad = None
        for fast, eager in zip(results[implementation], results["eager"], strict=True):
            assert_close_in_scale(fast, eager)

    def test_row_sparse_gradients_are_switched_by_the_configuration(self, implementation, device, tiny_config):
        for name in ("eager", implementation):
            config = tiny_config(row_sparse_gradients=True)
            config._experts_implementation = name
            layer = PeerLayer(config).to(device)
            layer(torch.randn(3, 32, device=device)).sum().backward()
            assert layer.experts.down_embed.grad.is_sparse
            assert not layer.retrieval.sub_keys.grad.is_sparse

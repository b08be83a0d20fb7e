# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert choice: the rule of training and the thresholds elsewhere against loops, and where each is causal."""

import copy
import math

import pytest
import reference
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import assert_equals_oracle, grouped_gradients_compile, learn
from transformers import AutoModelForCausalLM

from modeling_peer import PeerForCausalLM
from modeling_peer.expert_choice_moe_peer import PeerExpertChoiceMoe
from modeling_peer.transformers_names_peer import CACHE


@pytest.fixture
def choice_config(tiny_config):
    def build(**options):
        sizes = {"num_moe_experts": 4, "moe_intermediate_size": 24, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        return tiny_config(sparse_mlp="expert_choice_moe", **{**sizes, **options})

    return build


@pytest.fixture
def layer(choice_config):
    """Weights large enough for scores to differ and for every gradient to show."""

    def build(**options):
        layer = PeerExpertChoiceMoe(choice_config(**options))
        with torch.no_grad():
            layer.router.normal_(std=0.3)
            layer.experts.gate_up_proj.normal_()
            layer.experts.down_proj.normal_()
        return layer

    return build


@pytest.fixture
def model(choice_config):
    """Thresholds as training leaves them: each expert takes some of the tokens."""
    model = PeerForCausalLM(choice_config())
    with torch.no_grad():
        for sparse in (model.model.layers[0].mlp, model.model.layers[2].mlp):
            sparse.router.normal_(std=0.3)
            sparse.experts.down_proj.normal_(std=0.2)
    for _ in range(30):
        model(torch.randint(1, 99, (3, 12)))
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


@pytest.mark.parametrize(
    ("num_tokens", "num_padding", "options", "capacity"),
    [
        (12, 0, {}, 6),  # two experts a token unless said otherwise
        (12, 5, {"moe_capacity_factor": 1}, 3),  # padding has no share
        (11, 3, {"moe_capacity_factor": 1.25}, 4),  # 11 · 1.25 / 4 = 3.4
        (1, 0, {"moe_capacity_factor": 0.5}, 1),  # at least one token
        (5, 2, {"moe_capacity_factor": 9}, 5),  # at most all of them
        (80, 0, {"moe_capacity_factor": 1.1, "num_moe_experts": 8}, 11),  # exactly, though 80 · 1.1 / 8 > 11 in floats
    ],
)
def test_training_equals_experts_choosing_their_best_tokens_in_a_loop(
    layer, num_tokens, num_padding, options, capacity
):
    layer = layer(**options).double().train()
    hidden = torch.randn(num_tokens + num_padding, 32, dtype=torch.float64, requires_grad=True)
    token_mask = torch.randperm(len(hidden)) < num_tokens

    def best_real_tokens(expert, scores):
        real = token_mask.nonzero().flatten().tolist()
        return sorted(real, key=lambda t: scores[t, expert].item(), reverse=True)[:capacity]

    before = layer.thresholds.running_mean.clone()
    expected = reference.expert_choice_moe(layer, hidden, best_real_tokens)
    assert_equals_oracle(layer, hidden, layer(hidden, token_mask), expected)
    scores = (hidden @ layer.router.T).softmax(-1)
    lowest = [scores[best_real_tokens(expert, scores)[-1], expert] for expert in range(len(before))]
    expected = 0.9 * before + 0.1 * torch.stack(lowest) if num_tokens > 1 else before
    torch.testing.assert_close(layer.thresholds.running_mean, expected)


def test_evaluation_equals_experts_taking_what_scores_above_their_thresholds_in_a_loop(layer):
    layer = layer().double().eval()
    layer.thresholds.running_mean.copy_(torch.tensor([0.1, 0.4, 0.0, 0.99]))  # some, few, all and no tokens
    hidden = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)

    def above_threshold(expert, scores):
        return [t for t in range(9) if scores[t, expert] > layer.thresholds.running_mean[expert]]

    assert_equals_oracle(layer, hidden, layer(hidden), reference.expert_choice_moe(layer, hidden, above_threshold))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_tokens_that_no_expert_takes_add_nothing(layer, implementation):
    layer = layer().eval()
    layer.experts.config._experts_implementation = implementation
    hidden = torch.randn(5, 32)
    scores = (hidden @ layer.router.T).softmax(-1)
    layer.thresholds.running_mean.fill_(1.0)
    assert not layer(hidden).any()
    layer.thresholds.running_mean.fill_(scores.amax(-1).median().item())
    output = layer(hidden)
    assert output.any(-1).tolist() == (scores.amax(-1) > scores.amax(-1).median()).tolist()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 1, 32), (3, 0, 32), (2, 3, 4, 32)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layer_keeps_any_leading_shape(layer, shape, training):
    x = torch.randn(shape, requires_grad=True)
    y = layer().train(training)(x, torch.ones(shape[:-1], dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.isfinite(y).all()


class TestThresholds:
    def test_they_give_tokens_as_many_experts_as_training_does_on_average(self, layer):
        layer = layer(num_moe_experts=8, moe_capacity_factor=2).train()
        for _ in range(60):
            layer(torch.randn(256, 32))
        scores = (torch.randn(4096, 32) @ layer.router.T).softmax(-1)
        assert math.isclose((scores > layer.thresholds.running_mean).sum() / 4096, 2, rel_tol=0.05)

    @pytest.mark.parametrize("frozen", ["evaluation", "router without gradient", "only padding", "too few tokens"])
    def test_they_stay_where_nothing_is_to_be_learnt(self, layer, frozen):
        layer = layer().train(frozen != "evaluation")
        layer.router.requires_grad_(frozen != "router without gradient")
        token_mask = torch.full((9,), frozen != "only padding")
        token_mask[1:] &= frozen != "too few tokens"
        before = layer.thresholds.running_mean.clone()
        layer(torch.randn(9, 32), token_mask)
        assert torch.equal(layer.thresholds.running_mean, before)

    def test_a_frozen_router_chooses_as_in_evaluation(self, layer):
        layer, hidden = layer(), torch.randn(9, 32)
        layer.router.requires_grad_(False)
        assert torch.equal(layer.train()(hidden), layer.eval()(hidden))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_counts_a_batch_once(self, choice_config, tokens, use_reentrant):
        model = PeerForCausalLM(choice_config())
        checkpointed = copy.deepcopy(model)
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for m in (model, checkpointed):
            m.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        for (name, a), (_, b) in zip(model.named_buffers(), checkpointed.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        for (name, a), (_, b) in zip(model.named_parameters(), checkpointed.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")

    def test_they_stay_float32_in_a_half_precision_model(self, model, tokens, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        built = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        for other in (loaded, built, copy.deepcopy(model).bfloat16()):
            assert other.model.layers[0].mlp.router.dtype == torch.bfloat16
            assert other.model.layers[0].mlp.thresholds.running_mean.dtype == torch.float32
        assert torch.equal(loaded.model.layers[0].mlp.thresholds.running_mean, mean_of(model))
        assert built.train()(tokens, labels=tokens).logits.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(tokens, labels=tokens).loss.backward()
        assert model.model.layers[0].mlp.router.grad.dtype == torch.float32


def mean_of(model):
    return model.model.layers[0].mlp.thresholds.running_mean


class TestCausality:
    def test_later_tokens_change_earlier_outputs_in_training_only(self, model, tokens):
        """The published rule looks ahead; evaluation must not."""
        changed = tokens.clone()
        changed[:, 8:] = torch.randint(1, 99, (3, 4))
        before, after = (model(ids).logits[:, :8] for ids in (tokens, changed))
        torch.testing.assert_close(after, before)
        before, after = (model.train()(ids).logits[:, :8] for ids in (tokens, changed))
        assert not torch.isclose(after, before, rtol=1e-3, atol=1e-3).all()

    def test_evaluation_does_not_depend_on_padding_or_batch_neighbours(self, model, tokens):
        alone = model(tokens[:1]).logits
        torch.testing.assert_close(model(tokens).logits[:1], alone)
        left = torch.nn.functional.pad(tokens[:1], (5, 0))
        padded = model(left, attention_mask=(left != 0).long()).logits[:, 5:]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)

    def test_decoding_with_a_cache_equals_the_whole_forward(self, model, tokens):
        taken = []
        for layer in (model.model.layers[0], model.model.layers[2]):
            layer.mlp.experts.register_forward_pre_hook(lambda module, args: taken.append(len(args[0])))
        whole = model(tokens).logits
        assert all(0 < num < 36 * 4 for num in taken), f"the thresholds separate nothing: {taken} pairs"
        out = model(tokens[:, :5], use_cache=True)
        steps = [out.logits]
        for i in range(5, 12):
            out = model(tokens[:, i : i + 1], use_cache=True, **{CACHE: out[CACHE]})
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        generated = model.generate(tokens, **options)
        assert torch.equal(generated, model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=grouped_gradients_compile)])
def test_layer_compiles_to_one_graph(layer, training):
    """In evaluation the compiled form computes every expert: its result must be the same."""
    layer, hidden = layer().train(training), torch.randn(2, 6, 32)
    layer.experts.config._experts_implementation = "grouped_mm"
    token_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    expected = layer(hidden, token_mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, token_mask), expected)


def test_what_training_learned_holds_by_thresholds_and_in_a_checkpoint(choice_config, tokens, tmp_path):
    model = PeerForCausalLM(choice_config())
    losses, _ = learn(model, tokens)
    assert model.eval()(tokens, labels=tokens).loss < losses[0] / 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_impossible_capacities_are_refused(choice_config):
    with pytest.raises(StrictDataclassError, match=r"moe_capacity_factor must be above 0, got 0"):
        choice_config(moe_capacity_factor=0)

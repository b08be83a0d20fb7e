# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What every feed-forward that may stand in a sparse layer must do, PEER and its rivals alike."""

import copy

import pytest
import torch
from model_helpers import context, grouped_gradients_compile, learn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from modeling_peer import PeerForCausalLM, PeerForTokenClassification
from modeling_peer.configuration_peer import SPARSE_MLPS, TABLE_MLPS
from modeling_peer.sparse_mlps_peer import sparse_mlp_class

FIELDS = {
    "peer": {"sparse_mlp": "peer"},
    "product_key_memory": {"sparse_mlp": "product_key_memory"},
    "product_key_memory, gated": {"sparse_mlp": "product_key_memory", "gated_memory": True},
    "hashed_memory": {"sparse_mlp": "hashed_memory"},
    "peer and hashed_memory": {"parallel_hashed_memory": True},
    "top_k_moe, noisy_top_k": {"sparse_mlp": "top_k_moe"},
    "top_k_moe, switch": {"sparse_mlp": "top_k_moe", "moe_router": "switch"},
    "expert_choice_moe": {"sparse_mlp": "expert_choice_moe"},
    "soft_moe": {"sparse_mlp": "soft_moe", "is_causal": False},
    "multilinear_moe, cp": {"sparse_mlp": "multilinear_moe"},
    "multilinear_moe, tensor_ring": {"sparse_mlp": "multilinear_moe", "multilinear_form": "tensor_ring"},
}
EVERY = pytest.mark.parametrize("name", FIELDS)
EVERY_CAUSAL = pytest.mark.parametrize("name", [name for name in FIELDS if name != "soft_moe"])


@pytest.fixture
def new_config(tiny_config):
    """Builds a configuration in which every layer is the sparse MLP called `name`; keywords override."""

    def build(name, num_hidden_layers=2, **overrides):
        sizes = {"num_moe_experts": 4, "moe_intermediate_size": 16, "num_labels": 99}
        layers = {"num_hidden_layers": num_hidden_layers, "mlp_layer_types": ["sparse"] * num_hidden_layers}
        return tiny_config(**{**sizes, **layers, **FIELDS[name], **overrides})

    return build


@pytest.fixture
def new_model(new_config):
    """Builds a language model, or, of what can't be causal, a classifier of tokens."""

    def build(name, **overrides):
        config = new_config(name, **overrides)
        return (PeerForCausalLM if config.is_causal else PeerForTokenClassification)(config)

    return build


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


def trained(model, tokens, steps=3):
    """In evaluation, after a few steps: nothing stands at its initial value any more."""
    learn(model.train(), tokens, steps)
    return model.eval()


def step(model, **inputs):
    """Loss, gradients and buffers after one forward and backward, with the same random numbers each time."""
    torch.manual_seed(1)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_every_name_of_the_configuration_is_built_and_tested():
    assert set(SPARSE_MLPS) == {fields.get("sparse_mlp", "peer") for fields in FIELDS.values()}


@EVERY
@pytest.mark.usefixtures("poisoned_memory")
def test_every_weight_of_a_new_model_and_of_a_layer_alone_is_initialised(new_config, new_model, name):
    model = new_model(name)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    layer = sparse_mlp_class(FIELDS[name].get("sparse_mlp", "peer"))(new_config(name))
    in_model = model.model.layers[0].mlp.state_dict()
    for key, value in layer.state_dict().items():
        assert value.shape == in_model[key].shape
        if value.numel() > 1000:
            torch.testing.assert_close(value.std(), in_model[key].std(), rtol=0.15, atol=0, msg=key)


@EVERY
@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (1, 1, 32), (2, 5, 32)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_alone_keeps_the_shape_of_its_input_one_token_and_none(new_config, name, shape, training):
    layer = sparse_mlp_class(FIELDS[name].get("sparse_mlp", "peer"))(new_config(name)).train(training)
    x = torch.randn(shape, requires_grad=True)
    is_hashed = FIELDS[name].get("sparse_mlp") == "hashed_memory"
    if is_hashed and x.dim() != 3:
        pytest.skip("it reads sequences of tokens")
    output = layer(x, tokens=context(torch.randint(99, shape[:2]))) if is_hashed else layer(x)
    output.square().sum().backward()
    assert output.shape == shape
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@EVERY
def test_it_learns_a_sentence_and_every_parameter_gets_a_gradient(new_model, tokens, name):
    model = new_model(name).train()
    losses, touched = learn(model, tokens)
    assert losses[-1] < losses[0] / 2
    assert touched == {key for key, _ in model.named_parameters()}


@EVERY
def test_auxiliary_losses_reach_the_loss_by_their_weight(new_model, tokens, name):
    model = new_model(name, router_aux_loss_coef=0.5).train()
    outputs = model(tokens, labels=tokens)
    if not model.config.has_aux_losses:
        assert outputs.aux_loss is None
        return
    model.config.router_aux_loss_coef = 0.0
    torch.manual_seed(1)
    without = model(tokens, labels=tokens)
    model.config.router_aux_loss_coef = 0.5
    torch.manual_seed(1)
    outputs = model(tokens, labels=tokens)
    assert outputs.aux_loss > 0
    torch.testing.assert_close(outputs.loss, without.loss + 0.5 * outputs.aux_loss)


@EVERY
def test_round_trip_keeps_every_value(new_model, tokens, tmp_path, name):
    model = trained(new_model(name), tokens)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if model.config.is_causal else AutoModelForTokenClassification
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    # not bit by bit: matrix products round by where in memory their operands lie
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@EVERY
def test_half_precision_is_near_single(new_model, tokens, tmp_path, name):
    model = trained(new_model(name), tokens)
    model.save_pretrained(tmp_path)
    expected = model(tokens, labels=tokens).loss
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    outputs = half(tokens, labels=tokens)
    assert outputs.logits.dtype == torch.bfloat16
    # What a rival keeps in float32 is what it has, as Transformers asks.
    kept = {key.split(".")[-2] for key, value in half.state_dict().items() if value.dtype == torch.float32}
    assert kept == half._keep_in_fp32_modules_strict
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected, rtol=0.03, atol=0)
    torch.testing.assert_close(outputs.loss.float(), expected, rtol=0.03, atol=0)
    half.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@EVERY
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(new_model, tokens, name, use_reentrant):
    model = trained(new_model(name), tokens).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = step(model, input_ids=tokens, labels=tokens)
    torch.testing.assert_close(step(checkpointed, input_ids=tokens, labels=tokens), expected)


@EVERY
def test_what_stands_in_padding_changes_nothing_in_training(new_model, tokens, name):
    model = trained(new_model(name), tokens).train()
    mask = torch.ones_like(tokens)
    mask[0, 7:] = mask[1, :4] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # padding would predict it
    results = []
    for padding in (0, 98):
        padded = tokens.masked_fill(mask == 0, padding)
        results.append(step(copy.deepcopy(model), input_ids=padded, attention_mask=mask, labels=labels))
    torch.testing.assert_close(results[1], results[0])


@EVERY
def test_a_sequence_does_not_depend_on_its_batch_neighbours_or_padding(new_model, tokens, name):
    model = trained(new_model(name), tokens)
    alone = model(tokens[:1]).logits
    torch.testing.assert_close(model(tokens).logits[:1], alone)
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[:1]], dim=1)
    mask = (left != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(left, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@EVERY_CAUSAL
def test_later_tokens_never_change_earlier_outputs_in_evaluation(new_model, tokens, name):
    model = trained(new_model(name), tokens)
    changed = tokens.clone()
    changed[:, 8:] = 1
    torch.testing.assert_close(model(changed).logits[:, :8], model(tokens).logits[:, :8])


@EVERY_CAUSAL
def test_generation_with_a_cache_gives_the_argmax_of_growing_prompts(new_model, tokens, name):
    model = trained(new_model(name), tokens)
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected)


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=grouped_gradients_compile) if n.startswith("top_k_moe") else n for n in FIELDS]
)
def test_training_compiles_to_one_graph(new_model, tokens, name):
    torch._dynamo.reset()
    model = trained(new_model(name, num_hidden_layers=1), tokens).train()
    expected = step(copy.deepcopy(model), input_ids=tokens, labels=tokens)
    loss, gradients, buffers = step(
        torch.compile(model, fullgraph=True, backend="aot_eager"), input_ids=tokens, labels=tokens
    )
    gradients, buffers = ({key.removeprefix("_orig_mod."): v for key, v in d.items()} for d in (gradients, buffers))
    torch.testing.assert_close((loss, gradients, buffers), expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_parallel_plans_shard_large_tables_and_replicate_other_experts(new_model, name):
    model = new_model(name, num_key_value_heads=4)
    own = {key: style for plan in (model._tp_plan, model._ep_plan) for key, style in plan.items() if ".mlp" in key}
    assert bool(own) == (model.config.sparse_mlp in TABLE_MLPS), own
    beside = [key for plan in (model._tp_plan, model._ep_plan) for key in plan if ".hashed_memory" in key]
    assert bool(beside) == model.config.parallel_hashed_memory, beside
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"

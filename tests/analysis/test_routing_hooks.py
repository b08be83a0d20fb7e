# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Hooks on routing: which layers have it, what an observer sees, and that changed gates act and are restored."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_peer import PeerForCausalLM
from modeling_peer.analysis.routing_hooks import change_gates, find_routed_layers, observe_routing, scale_experts
from modeling_peer.one_call_peer import is_unobserved

TOKENS = torch.arange(1, 13).view(2, 6)


def tiny_mixtral():
    """Mixtral with two layers of three experts, random."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2)).eval()


def observed(model, tokens=TOKENS):
    seen = {}
    with torch.no_grad(), observe_routing(model, lambda layer, routing: seen.update({layer.name: routing})):
        model(input_ids=tokens)
    return seen


def test_an_observer_sees_what_the_model_returns(tiny_config):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "sparse"])).eval()
    seen = observed(model)
    outputs = model(TOKENS, output_expert_ids=True, output_expert_gates=True)
    assert list(seen) == ["layer_0", "layer_2"]
    for routing, ids, gates in zip(seen.values(), outputs.expert_ids, outputs.expert_gates, strict=True):
        assert torch.equal(routing.expert_ids, ids.flatten(0, 1))
        torch.testing.assert_close(routing.gates, gates.flatten(0, 1))
        assert routing.hidden_states.shape == (12, 32)


@pytest.mark.parametrize("kind", ["product_key_memory", "top_k_moe", "expert_choice_moe"])
def test_rivals_are_observed_too(tiny_config, kind):
    model = PeerForCausalLM(tiny_config(sparse_mlp=kind, num_moe_experts=5)).eval()
    (layer,), (routing,) = find_routed_layers(model), observed(model).values()
    assert layer.num_experts == (64 if kind == "product_key_memory" else 5)
    assert routing.expert_ids.shape[:2] == (12, layer.num_heads)
    assert routing.expert_ids.max() < layer.num_experts
    if kind == "expert_choice_moe":  # those above their thresholds, 1/5 in a new model
        assert torch.equal(routing.gates > 0, routing.gates > 0.2)


def test_mixtral_is_observed_and_models_without_routing_are_refused(tiny_config):
    seen = observed(tiny_mixtral())
    assert list(seen) == ["layer_0", "layer_1"]
    assert seen["layer_0"].gates.shape == (12, 1, 2)
    torch.testing.assert_close(seen["layer_0"].gates.sum(-1), torch.ones(12, 1))
    for changes in ({"mlp_layer_types": ["dense"] * 3}, {"sparse_mlp": "multilinear_moe"}):
        with pytest.raises(ValueError, match="no layer that routes tokens"):
            find_routed_layers(PeerForCausalLM(tiny_config(**changes)))


@pytest.mark.parametrize("target", ["query_proj", "q_proj"])
def test_a_model_with_adapters_is_observed_under_the_same_names(tiny_config, target):
    model = PeerForCausalLM(tiny_config()).eval()
    before = observed(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=[target], modules_to_save=["experts"])).eval()
    after = observed(adapted)
    assert after.keys() == before.keys() == {"layer_1"}
    assert torch.equal(after["layer_1"].expert_ids, before["layer_1"].expert_ids)  # new adapters change nothing


@pytest.mark.parametrize("factor", [0.0, 2.5])
def test_a_scaled_expert_acts_as_if_its_row_were_scaled_and_is_restored(tiny_config, factor):
    model = PeerForCausalLM(tiny_config()).eval()
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.experts.up_embed.mul_(50)  # so that one expert matters
        before = model(TOKENS).logits
        expert = int(observed(model)["layer_1"].expert_ids[3, 0, 0])
        with scale_experts(model, 1, [expert], factor) as layer:
            changed = model(TOKENS).logits
        row = layer.experts.up_embed[expert]
        kept = row.clone()
        row.mul_(factor)
        expected = model(TOKENS).logits
        row.copy_(kept)
        restored = model(TOKENS).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(restored, before)


def test_a_hook_is_seen_where_one_call_would_replace_the_modules(tiny_config):
    """A token to decode takes one call that skips the modules, unless one of them is observed."""
    model = PeerForCausalLM(tiny_config()).eval()
    experts = find_routed_layers(model)[0].experts
    assert is_unobserved(experts)
    called = []
    with (
        torch.no_grad(),
        change_gates(model, "layer_1", lambda ids, gates: called.append(ids) or torch.zeros_like(gates)),
    ):
        assert not is_unobserved(experts)
        silenced = model(TOKENS[:1, :1]).logits
        experts_output = model.get_decoder().layers[1].mlp(torch.randn(1, 1, 32))
    assert len(called) == 2
    assert not experts_output.any()
    assert is_unobserved(experts)
    with torch.no_grad():
        assert not torch.equal(model(TOKENS[:1, :1]).logits, silenced)


def test_an_expert_of_a_mixtral_is_switched_off():
    model = tiny_mixtral()
    with torch.no_grad():
        before = model(TOKENS).logits
        with scale_experts(model, 0, [0, 1, 2]) as layer:
            block = layer.parent(torch.randn(1, 4, 32))
        assert not block.any()
        assert torch.equal(model(TOKENS).logits, before)


def test_experts_and_layers_that_do_not_exist_are_refused(tiny_config):
    model = PeerForCausalLM(tiny_config())
    for arguments, words in [
        ((0, [1]), "layer 0 routes no tokens; these do: layer_1"),
        ((1, [3, 64]), r"layer_1 has experts 0 to 63; got \[64\]"),
        ((1, [3], float("nan")), "must be finite"),
    ]:
        with pytest.raises(ValueError, match=words), scale_experts(model, *arguments):
            pass


def test_a_hashed_memory_routes_nothing(tiny_config):
    beside = PeerForCausalLM(tiny_config(parallel_hashed_memory=True))
    assert [layer.path for layer in find_routed_layers(beside)] == ["model.layers.1.mlp.experts"]
    with pytest.raises(ValueError, match="hashed_memory has no router"):
        find_routed_layers(PeerForCausalLM(tiny_config(sparse_mlp="hashed_memory")))

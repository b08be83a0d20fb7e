# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the Transformers backends of vLLM and SGLang ask of a model, as far as it shows without them.

Neither engine is run here. The requirements are those of their documentation (vLLM 0.32: "Supported Models", "Writing
custom models"; SGLang: "Transformers fallback") and of vLLM's `model_executor/models/`.
"""

import json

import pytest
import torch
from model_helpers import load_weights
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_peer import PeerForCausalLM

# By the first of these that a configuration has, vLLM counts the experts of a mixture, and takes it for one.
NAMES_OF_EXPERT_COUNTS = (
    "num_experts",
    "moe_num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
)
ENGINES = {
    "vllm": {"attention_instances": {i: object() for i in range(3)}},
    "sglang": {"attention_instances": {i: object() for i in range(3)}, "forward_batch": object()},
}
SPARSE_MLPS = ("peer", "product_key_memory", "top_k_moe", "expert_choice_moe", "multilinear_moe")


@pytest.fixture(params=SPARSE_MLPS)
def model(request, tiny_config):
    return PeerForCausalLM(tiny_config(sparse_mlp=request.param, initializer_range=0.3)).eval()


@pytest.fixture(params=ENGINES)
def engine(request):
    """An attention under an engine's name that computes what its own does: causal, over the flat row of all tokens."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append((module.layer_idx, attention_mask, kwargs))
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.squeeze(0).transpose(0, 1).flatten(1), None  # (num_tokens, num_heads * head_dim), as engines do

    ALL_ATTENTION_FUNCTIONS.register(request.param, attention)
    yield request.param, calls
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(request.param)


@torch.no_grad()
def test_the_decoder_runs_with_an_engines_attention_and_passes_its_arguments_down(model, engine):
    name, calls = engine
    tokens = torch.randint(1, 99, (1, 9))
    expected = model.model(tokens).last_hidden_state
    config = model.config
    config._attn_implementation = name  # as engines set it
    decoder = AutoModel.from_config(config).eval()
    decoder.load_state_dict(model.model.state_dict())
    arguments = {"position_ids": torch.arange(9)[None], "use_cache": False, "return_dict": False, **ENGINES[name]}
    hidden_states = decoder(input_ids=tokens, **arguments)[0]
    torch.testing.assert_close(hidden_states, expected, rtol=1e-4, atol=1e-5)
    assert [layer for layer, _, _ in calls] == [0, 1, 2]
    for _, mask, kwargs in calls:
        assert mask is None
        assert all(kwargs[key] is value for key, value in ENGINES[name].items())


def test_the_classes_declare_what_engines_look_for(model):
    assert model._supports_attention_backend
    assert model.is_backend_compatible()
    assert model.base_model_prefix == "model"


def test_a_checkpoint_names_the_base_model_and_each_weight_by_its_place(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "AutoModel" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    saved = set(load_weights(tmp_path))
    with torch.device("meta"):  # where vLLM builds the base model
        decoder = AutoModel.from_config(model.config)
    places = {f"model.{name}" for name in decoder.state_dict()} | {"lm_head.weight"}
    assert saved == places


def test_saved_buffers_are_those_of_batch_norm_except_with_expert_choice(model):
    """Older loaders of vLLM know parameters and BatchNorm's statistics; newer ones, every registered buffer."""
    parameters = {name for name, _ in model.named_parameters()}
    buffers = model.state_dict().keys() - parameters
    others = {name for name in buffers if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm1d)}
    assert others <= dict(model.named_buffers()).keys()
    assert bool(others) == (model.config.sparse_mlp == "expert_choice_moe")


def test_nothing_is_taken_for_a_mixture_of_coarse_experts(model):
    assert not [name for name in NAMES_OF_EXPERT_COUNTS if hasattr(model.config, name)]


def test_the_plans_name_modules_that_are_there(tiny_config):
    decoder = AutoModel.from_config(tiny_config(parallel_dense_mlp=True))
    names = {
        name.replace(f".{i}.", ".*.") for i in range(3) for name, _ in decoder.named_modules() if f".{i}." in name
    }
    read = {
        name: style for name, style in decoder.config.base_model_tp_plan.items() if style in ("colwise", "rowwise")
    }
    heads = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {f"layers.*.self_attn.{name}" for name in heads} <= read.keys() & names
    assert decoder.config.base_model_pp_plan.keys() == {"embed_tokens", "layers", "norm"}
    lists = [name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)]
    assert lists == ["layers"]

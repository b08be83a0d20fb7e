# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the Transformers backends of vLLM and SGLang ask of a model, as far as it shows without them.

Neither engine is run here. The requirements are those of their documentation (vLLM 0.32: "Supported Models", "Writing
custom models"; SGLang: "Transformers fallback") and of their code: vLLM's `model_executor/models/transformers/`, and
SGLang's `srt/models/transformers.py`.
"""

import copy
import json

import pytest
import torch
from accelerate import init_empty_weights
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

# The styles of a tensor-parallel plan that SGLang knows. It refuses a plan with any other.
STYLES_OF_SGLANG = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate"}


class EngineLinear(nn.Module):
    """In place of a linear layer. Its weight has another name: an engine may pack or split it, so only calls count."""

    def __init__(self, linear):
        super().__init__()
        self.packed = nn.Parameter(torch.empty_like(linear.weight))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias))

    def forward(self, values):
        return nn.functional.linear(values, self.packed, self.bias)


class Missing(nn.Module):
    """In place of what another stage of a pipeline has."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def build_as_engines_do(config, weights, dtype):
    """The base model without memory for its parameters, then with other linear layers, then filled by name.

    Both engines make parameters on the meta device and buffers on a real one, as accelerate does.
    """
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            decoder = AutoModel.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            decoder.set_submodule(name, EngineLinear(module))
    decoder.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype))
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu")))
    places = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for name, value in weights.items():
        linear = name.removesuffix(".weight")
        places[f"{linear}.packed" if f"{linear}.packed" in places else name].copy_(value)
    return decoder.eval()


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


@pytest.mark.slow_but_first
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_a_decoder_that_is_built_and_filled_as_engines_do_computes_the_same(model, dtype, tolerance):
    tokens = torch.randint(1, 99, (1, 9))
    expected = copy.deepcopy(model.model).to(dtype)(tokens).last_hidden_state.float()
    decoder = build_as_engines_do(copy.deepcopy(model.config), model.model.state_dict(), dtype)
    assert not any(value.is_meta for value in decoder.state_dict().values())
    hidden_states = decoder(input_ids=tokens, use_cache=False, return_dict=False)[0].float()
    assert (hidden_states - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_two_stages_of_a_pipeline_compute_what_one_decoder_does(model):
    decoder, tokens = model.model, torch.randint(1, 99, (1, 9))
    assert decoder.supports_pp_plan
    options = {"position_ids": torch.arange(9)[None], "use_cache": False, "return_dict": False}
    expected = decoder(tokens, **options)[0]
    first, last = copy.deepcopy(decoder), copy.deepcopy(decoder)
    first.layers[2], first.norm = Missing(), Missing()
    last.layers[0], last.layers[1], last.embed_tokens = Missing(), Missing(), Missing()
    between = first(tokens, **options)[0]
    torch.testing.assert_close(last(inputs_embeds=between, **options)[0], expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_attention_says_whether_the_model_is_an_encoder(tiny_config, is_causal):
    """vLLM takes a model for an encoder if any module has `is_causal=False`."""
    decoder = AutoModel.from_config(tiny_config(is_causal=is_causal))
    assert sum(not getattr(module, "is_causal", True) for module in decoder.modules()) == (0 if is_causal else 3)


def test_the_configuration_is_that_of_a_text_model_with_full_attention(tiny_config):
    config = tiny_config()
    assert config.get_text_config() is config  # or it would be taken for multimodal
    assert not hasattr(config, "layer_types")  # vLLM would look for sliding windows there
    assert not hasattr(config, "kv_lora_rank")  # nor is it latent attention
    assert config.rope_parameters["rope_type"] != "dynamic"  # which vLLM does not compile


def test_peer_adds_no_style_to_the_plan_that_sglang_refuses(tiny_config):
    config = tiny_config()
    assert "expert_rows" in AutoModel.from_config(config).tp_plan.values()
    config._attn_implementation = "sglang"
    ALL_ATTENTION_FUNCTIONS.register("sglang", nn.functional.scaled_dot_product_attention)
    try:
        plan = AutoModel.from_config(config).tp_plan
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("sglang")
    # Transformers 5.24 adds this to every model's plan, with a style that SGLang does not know either
    plan.pop("embed_tokens", None)
    assert "layers.*.self_attn.q_proj" in plan
    assert set(plan.values()) <= STYLES_OF_SGLANG


@torch.no_grad()
def test_norms_may_be_replaced_by_what_their_names_say(tiny_config):
    """SGLang replaces each module whose class is called `...RMSNorm`, by its weight and epsilon."""
    decoder = AutoModel.from_config(tiny_config(query_norm="rms_norm", initializer_range=0.3)).eval()
    tokens = torch.randint(1, 99, (1, 9))
    expected = decoder(tokens).last_hidden_state
    for name, module in list(decoder.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            norm = nn.RMSNorm(module.weight.shape[0], eps)
            norm.weight = module.weight
            decoder.set_submodule(name, norm)
    torch.testing.assert_close(decoder(tokens).last_hidden_state, expected)


def test_a_table_that_layers_share_is_saved_once_which_engines_do_not_read(tiny_config, tmp_path):
    """They give each layer a table of its own, and refuse a checkpoint that has not all."""
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3, share_expert_tables=True))
    model.save_pretrained(tmp_path)
    tables = [name for name in load_weights(tmp_path) if name.endswith("_embed")]
    assert tables == ["model.layers.0.mlp.experts.down_embed", "model.layers.0.mlp.experts.up_embed"]

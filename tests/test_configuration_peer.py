# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerConfig: defaults, derived sizes, round trips, and refusals that name the numbers and the way out."""

import dataclasses
import json
import math
import re
import types
import typing
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import logging

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForMaskedLM


def fields_that_hold(kind):
    """Names of the fields whose type is `kind`, or may be, or is a list of it."""
    found = []
    for field in dataclasses.fields(PeerConfig):
        options = field.type
        if isinstance(options, str):  # those of Transformers
            options = [option.strip() for option in options.split("|")]
        elif isinstance(options, types.UnionType) or typing.get_origin(options) is typing.Union:
            options = typing.get_args(options)
        else:
            options = [options]
        if {kind, kind.__name__, list[kind]} & set(options):
            found.append(field.name)
    return found


# -1 is how some checkpoints say that they have no such token; Transformers warns.
TOKEN_IDS = ["pad_token_id", "bos_token_id", "eos_token_id"]
INTEGERS = [name for name in fields_that_hold(int) if name not in fields_that_hold(float)]
REAL_NUMBERS = fields_that_hold(float)


@pytest.fixture
def warned(monkeypatch):
    """What Transformers' loggers warn of, each time."""
    logger, messages = logging.get_logger("modeling_peer.configuration_peer"), []
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message, *args: messages.append(message))
    return messages


def test_defaults_are_the_papers():
    config = PeerConfig()
    assert config.num_peer_experts == 1024**2
    assert config.num_active_experts == 8 * 16
    assert config.share_sub_keys
    assert config.query_norm == "batch_norm"
    assert config.gate_activation == "softmax"
    assert config.mlp_layer_types.index("sparse") == 5  # block 6 of 12
    assert config.mlp_layer_types.count("sparse") == 1


@pytest.mark.parametrize(("num_hidden_layers", "middle"), [(1, 0), (2, 0), (3, 1), (4, 1), (12, 5)])
def test_the_middle_layer_is_sparse_by_default(num_hidden_layers, middle):
    assert PeerConfig(num_hidden_layers=num_hidden_layers).mlp_layer_types.index("sparse") == middle


def test_default_config_warns_of_nothing(caplog):
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeerConfig()
    finally:
        logging.disable_propagation()
    assert not caplog.records


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_head": 9}, r"num_experts_per_head \(9\) exceeds num_sub_keys \(8\)"),
        ({"query_dim": 15}, r"query_dim \(15\) must be even.*Try 16"),
        ({"query_dim": 0}, r"query_dim \(0\).*Try 2"),
        ({"num_sub_keys": 0}, r"num_sub_keys must be at least 1, got 0"),
        ({"num_retrieval_heads": -1}, r"num_retrieval_heads must be at least 1, got -1"),
        ({"sparse_mlp": "pear"}, r"sparse_mlp='pear' is unknown. Did you mean 'peer'"),
        ({"sparse_mlp": "unheard_of"}, r"sparse_mlp='unheard_of' is unknown. Known: peer"),
        ({"mlp_layer_types": ["dense", "peer", "dense"]}, r"\['peer'\].*\"sparse\" or \"dense\".*sparse_mlp"),
        ({"mlp_layer_types": ["sparse"]}, r"names 1 layers, but num_hidden_layers is 3"),
        ({"expert_act": "gellu"}, r"expert_act='gellu' is unknown. Did you mean 'gelu'"),
        ({"query_norm": "group_norm"}, r"query_norm.*group_norm"),
        ({"gate_activation": "relu"}, r"gate_activation.*relu"),
        ({"hidden_size": 33}, r"hidden_size \(33\) is not a multiple of num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
        ({"num_sub_keys": 8.5}, r"num_sub_keys"),
        ({"num_sub_keys": "many"}, r"num_sub_keys"),
        ({"expert_dropout": 1.5}, r"expert_dropout"),
        ({"expert_init_gain": 0}, r"expert_init_gain must be above 0, got 0"),
        ({"balance_loss": "entropy"}, r"balance_loss.*'switch', 'uniformity'.*entropy"),
        ({"router_aux_loss_coef": -1}, r"router_aux_loss_coef must be at least 0, got -1"),
        ({"gated_experts": True, "sparse_mlp": "top_k_moe"}, r"gated_experts=True is for what product keys retrieve"),
        ({"expert_dropout": 0.1, "sparse_mlp": "expert_choice_moe"}, r"expert_dropout=0.1 is for.*Leave it unset"),
        ({"row_sparse_gradients": True, "sparse_mlp": "top_k_moe"}, r"row_sparse_gradients=True is for.*Leave it"),
        ({"share_expert_tables": True, "sparse_mlp": "multilinear_moe"}, r"multilinear_moe has none apart"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
        ({"hidden_act": "swosh"}, r"hidden_act='swosh' is unknown. Did you mean 'swish'"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused_with_the_numbers(tiny_config, overrides, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        tiny_config(**overrides)


def refused(tiny_config, name, value):
    with pytest.raises((StrictDataclassError, ValueError, TypeError), match=name):
        tiny_config(**{name: [value] if name == "multilinear_ranks" else value})


def test_the_numeric_fields_are_found():
    assert {"num_sub_keys", "head_dim", "multilinear_ranks", "eos_token_id"} < set(INTEGERS)
    assert {"rms_norm_eps", "moe_capacity_factor", "attention_dropout"} < set(REAL_NUMBERS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1, True, "1", 1e400], ids=repr)
@pytest.mark.parametrize("name", REAL_NUMBERS)
def test_every_real_number_is_checked_by_name(tiny_config, name, value):
    refused(tiny_config, name, value)


@pytest.mark.parametrize("value", [-(2**31), -(2**63), 2**31, 2**63, 2**200, True, 1.5, math.nan, "1"], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_is_checked_by_name(tiny_config, name, value):
    refused(tiny_config, name, value)


@pytest.mark.parametrize("value", [-1, 0])
@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in [*TOKEN_IDS, "chunk_size_feed_forward"]])
def test_every_size_is_at_least_one(tiny_config, name, value):
    refused(tiny_config, name, value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 3}, r"head_dim \(3\) must be even.*Try 4"),
        ({"hidden_size": 12}, r"head_dim \(3\) must be even.*hidden_size / num_attention_heads"),
        ({"attention_dropout": None}, r"attention_dropout"),
        ({"attention_dropout": 1.5}, r"attention_dropout must be at least 0 and at most 1, got 1.5: try 0"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be above 0, got 0.0: try 1e-6"),  # padding would be NaN
        ({"num_hidden_layers": 2**31 - 1}, r"num_hidden_layers must be at most 65536"),  # and no list of so many
        ({"num_sub_keys": 2**31 - 1}, r"num_sub_keys\*\*2 .* hidden_size \(32\) .* at most 2\*\*63 - 1"),
        (
            {"num_moe_experts": 2**31 - 1, "moe_intermediate_size": 2**31 - 1},
            r"num_moe_experts \* moe_interm.*2\*\*63",
        ),
        ({"pad_token_id": 99}, r"pad_token_id \(99\) must be below vocab_size \(99\).*None"),
        ({"eos_token_id": [1, 2**31]}, r"eos_token_id is 2147483648: no vocabulary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}}, r"rope_parameters\['rope_theta'\]"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            r"rope_parameters\['rope_theta'\].*above 0",
        ),
        ({"sparse_mlp": "expert_choice_moe", "moe_capacity_factor": 1e-4}, r"moe_capacity_factor \(0.0001\).*Try 2"),
        ({"multilinear_ranks": [2**31]}, r"multilinear_ranks .* at most 2147483647"),
    ],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused_with_the_way_out(tiny_config, overrides, message):
    with pytest.raises((StrictDataclassError, ValueError), match=f"(?s){message}"):
        tiny_config(**overrides)


def test_a_negative_padding_id_means_none_as_in_transformers(tiny_config):
    model = PeerForCausalLM(tiny_config(pad_token_id=-1))
    assert model.model.embed_tokens.padding_idx is None
    assert model.model.embed_tokens.weight.any(dim=-1).all()  # torch would count from the end


def test_a_checkpoint_with_an_impossible_override_is_refused_by_name(tiny_config, tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rms_norm_eps must be above 0"):
        PeerForCausalLM.from_pretrained(tmp_path, rms_norm_eps=math.nan)


SINGLE = {"num_experts_per_head": 1}
CHOICE, TOP_K = {"sparse_mlp": "expert_choice_moe"}, {"sparse_mlp": "top_k_moe"}
SOFT, ONE = {"sparse_mlp": "soft_moe", "is_causal": False}, {"num_moe_experts": 1}
ONE_EACH = {**TOP_K, "num_moe_experts_per_token": 1}
CANNOT_LEARN = [
    (SINGLE, r"num_experts_per_head=1 .* do not learn. Set gate_activation='sigmoid'"),
    ({**SINGLE, "sparse_mlp": "product_key_memory"}, r"num_experts_per_head=1 .* do not learn"),
    ({**SINGLE, "num_sub_keys": 1}, r"num_experts_per_head=1"),
    ({**SINGLE, "balance_loss": "switch", "router_aux_loss_coef": 0}, r"num_experts_per_head=1 .* do not learn"),
    ({"expert_dropout": 1.0}, r"expert_dropout=1 drops every expert"),
    ({"attention_dropout": 1.0}, r"attention_dropout=1.0 drops all of it"),
    ({**TOP_K, **ONE, "num_moe_experts_per_token": 1}, r"num_moe_experts=1 .*router does not learn"),
    ({**TOP_K, **ONE, "moe_router": "switch"}, r"num_moe_experts=1 .*router does not learn"),
    ({**CHOICE, **ONE}, r"num_moe_experts=1 .*router does not learn"),
    ({"sparse_mlp": "multilinear_moe", **ONE}, r"num_moe_experts=1 .*router does not learn"),
    ({**ONE_EACH, "router_aux_loss_coef": 0}, r"num_moe_experts_per_token=1 .*router does not learn.*switch"),
    ({"vocab_size": 1, "pad_token_id": None}, r"vocab_size=1: .*nothing to predict"),
]
# Warned of, though everything has some gradient.
LEARNS_LITTLE = [
    ({**SINGLE, "balance_loss": "switch"}, r"num_experts_per_head=1 .*learn of balance_loss only"),
    (ONE_EACH, r"num_moe_experts_per_token=1 .*learns of its load loss only"),
    ({"balance_loss": "uniformity", "router_aux_loss_coef": 0}, r"balance_loss='uniformity' .*weighs nothing"),
    ({"query_norm": "layer_norm", "query_dim": 2}, r"query_dim=2.*hardly learns"),
    ({"sparse_mlp": "multilinear_moe", "num_moe_experts": 2}, r"num_moe_experts=2 .*router hardly learns"),
]
# The neighbours of those: extreme, and sound.
LEARNS = [
    {},
    {**SINGLE, "gate_activation": "sigmoid"},
    {**SINGLE, "num_sub_keys": 1, "gate_activation": "sigmoid"},
    {"initializer_range": 0.0},
    {"gated_experts": True, "expert_act": "identity"},
    {"query_norm": "rms_norm", "query_dim": 2},
    {**TOP_K, "router_aux_loss_coef": 0},
    {**TOP_K, "moe_router": "switch", "moe_capacity_factor": 1e-9},
    {**CHOICE, "moe_capacity_factor": 1e-3},
    {**SOFT, **ONE},
    {"mlp_layer_types": ["dense"] * 3, **SINGLE},
]


def without_gradient(config):
    """Names of the parameters that get no gradient in any of three steps."""
    model = (PeerForCausalLM if config.is_causal else PeerForMaskedLM)(config).train()
    tokens, idle = torch.randint(1, 99, (4, 16)) % config.vocab_size, None
    for _ in range(3):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        now = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        idle = now if idle is None else idle & now
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return idle


@pytest.mark.parametrize(("overrides", "message"), CANNOT_LEARN, ids=str)
def test_what_cannot_learn_is_warned_of_with_the_way_out(tiny_config, warned, overrides, message):
    config = tiny_config(**overrides)
    assert any(re.search(message, text) for text in warned)
    assert without_gradient(config)


@pytest.mark.parametrize(("overrides", "message"), LEARNS_LITTLE, ids=str)
def test_what_learns_little_is_warned_of(tiny_config, warned, overrides, message):
    tiny_config(**overrides)
    assert any(re.search(message, text) for text in warned)


@pytest.mark.parametrize("overrides", LEARNS, ids=str)
def test_what_learns_is_not_warned_of(tiny_config, warned, overrides):
    config = tiny_config(**overrides)
    assert not [text for text in warned if "token_id" not in text]
    assert not without_gradient(config)


def test_a_preset_is_found_by_name_and_its_fields_can_be_overridden():
    config = PeerConfig.from_preset("peer_tiny", num_sub_keys=32)
    assert (config.num_hidden_layers, config.num_peer_experts) == (4, 1024)
    with pytest.raises(ValueError, match=r"preset='peer_tyni' is unknown. Did you mean 'peer_tiny'\?"):
        PeerConfig.from_preset("peer_tyni")


def test_k_equal_to_n_is_allowed(tiny_config):
    assert tiny_config(num_experts_per_head=8).num_active_experts == 16


def test_round_trip_through_a_folder(tiny_config, tmp_path):
    config = tiny_config(mlp_layer_types=["sparse", "dense", "sparse"], gated_experts=True, query_norm="none")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PeerConfig
    assert loaded.to_json_string() == config.to_json_string()


def test_an_edited_config_file_is_refused_on_load(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_experts_per_head": 64}))
    with pytest.raises(StrictDataclassError, match=r"num_experts_per_head \(64\) exceeds num_sub_keys \(8\)"):
        PeerConfig.from_pretrained(tmp_path)


def test_derived_sizes_are_read_only_and_not_saved(tiny_config):
    config = tiny_config()
    with pytest.raises(AttributeError):
        config.num_peer_experts = 3
    assert "num_peer_experts" not in config.to_dict()


def test_no_field_makes_other_tools_take_the_model_for_a_coarse_mixture_or_a_sampler(tiny_config):
    config = tiny_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):  # vLLM's signs of a mixture
        assert not hasattr(config, name)
    assert config._get_generation_parameters() == {}

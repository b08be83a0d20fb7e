"""PeerConfig: defaults, derived sizes, round trips, and refusals that name the numbers and the way out."""

import json
import warnings

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import logging

from modeling_peer import PeerConfig


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

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Costs counted from a configuration, against the modules themselves and PyTorch's counter of FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForMaskedLM
from modeling_peer.configuration_peer import SPARSE_MLPS
from modeling_peer.costs.counting import Cost, model_cost, model_parts

LENGTH, BATCH = 16, 2
MOE = {"num_moe_experts": 4, "moe_intermediate_size": 24}
SHARED = {"mlp_layer_types": ["sparse"] * 3, "share_expert_tables": True}
PARTS_OF_A_SPARSE_MLP = ("routing", "experts", "output gate", "fusion")
SPARSE_MLP_CASES = [
    ("peer", {}),
    ("peer", {"gated_experts": True, "query_norm": "rms_norm"}),
    ("peer", {"share_sub_keys": False, "query_norm": "layer_norm", "balance_loss": "switch"}),
    ("peer", {"num_retrieval_heads": 20, "query_norm": "none"}),  # more choices than experts
    ("product_key_memory", {"share_sub_keys": False}),
    ("product_key_memory", {"gated_memory": True, "balance_loss": "uniformity"}),
    ("hashed_memory", {}),
    ("hashed_memory", {"max_ngram_size": 2, "ngram_dim": 48, "ngram_conv_size": 1}),
    ("top_k_moe", {**MOE, "num_moe_experts_per_token": 3}),
    ("top_k_moe", {**MOE, "moe_router": "switch"}),
    ("expert_choice_moe", MOE),
    ("expert_choice_moe", {**MOE, "moe_capacity_factor": 1.5}),
    ("soft_moe", {**MOE, "is_causal": False}),
    ("soft_moe", {**MOE, "is_causal": False, "num_slots_per_expert": 3}),
    ("multilinear_moe", MOE),
    ("multilinear_moe", {**MOE, "multilinear_ranks": [7]}),
    ("multilinear_moe", {**MOE, "multilinear_form": "tensor_ring"}),
    ("multilinear_moe", {**MOE, "multilinear_form": "tensor_ring", "multilinear_ranks": [2, 3, 5]}),
]


@pytest.fixture(params=SPARSE_MLP_CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def sparse_config(request, tiny_config):
    name, fields = request.param
    return tiny_config(sparse_mlp=name, **fields)


def build(config, device="cpu"):
    with torch.device(device):
        return (PeerForCausalLM if config.is_causal else PeerForMaskedLM)._from_config(
            config, attn_implementation="eager"
        )


def counted_flops(model, config):
    """Those of a training step's forward by module, per token; `""` is the whole model."""
    model.train()
    model.set_experts_implementation("eager")
    input_ids = torch.randint(1, config.vocab_size, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    root = type(model).__name__
    counts = {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) / (BATCH * LENGTH)
        for name, flops in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    # Angles of positions are matrix products in some versions of Transformers.
    counts[""] -= counts.get("model.rotary_emb", 0)
    return counts


def unseen_flops(config):
    """Forward FLOPs per token of the products of a sparse layer with the rows it retrieves, by hand: PyTorch, to which
    they are elementwise, counts none of them."""
    rows = config.num_retrieval_heads * config.num_experts_per_head
    tables = {"peer": 3 if config.gated_experts else 2, "product_key_memory": 1}.get(config.sparse_mlp, 0)
    return 2 * rows * tables * config.hidden_size


def test_parameters_are_those_of_the_model(sparse_config):
    parts = model_parts(sparse_config, LENGTH)
    model = build(sparse_config, "meta")
    assert model_cost(sparse_config, LENGTH).parameters == model.num_parameters()
    sparse = sum(p.numel() for p in model.base_model.layers[1].mlp.parameters())
    assert sum(parts[name].parameters for name in PARTS_OF_A_SPARSE_MLP if name in parts) == sparse


def test_forward_flops_are_those_that_pytorch_counts_and_the_rows_it_does_not_see(sparse_config):
    counted = counted_flops(build(sparse_config), sparse_config)
    parts = model_parts(sparse_config, LENGTH)
    assert parts["attention"].forward_flops == 3 * counted["model.layers.0.self_attn"]
    assert parts["dense MLPs"].forward_flops == 2 * counted["model.layers.0.mlp"]
    sparse = sum(parts[name].forward_flops for name in PARTS_OF_A_SPARSE_MLP if name in parts)
    assert sparse == counted["model.layers.1.mlp"] + unseen_flops(sparse_config)
    assert model_cost(sparse_config, LENGTH).forward_flops == counted[""] + unseen_flops(sparse_config)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 12, "num_key_value_heads": 1},  # heads wider than hidden_size / num_attention_heads
        {"parallel_dense_mlp": True},
        {"mlp_layer_types": ["dense"] * 3},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        {**SHARED, "gated_experts": True},
        {"num_kept_experts": 20},
        # values are shared, output gates are not
        {**SHARED, "sparse_mlp": "product_key_memory", "gated_memory": True},
        {**SHARED, "sparse_mlp": "top_k_moe", **MOE},
    ],
)
def test_whole_models_have_the_parameters_and_flops_counted(tiny_config, fields):
    config = tiny_config(**fields)
    model = build(config)
    cost = model_cost(config, LENGTH)
    counted = counted_flops(model, config)
    unseen = config.mlp_layer_types.count("sparse") * unseen_flops(config)
    assert cost.parameters == model.num_parameters()
    assert cost.forward_flops == counted[""] + unseen
    assert cost.training_flops == 3 * cost.forward_flops


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({}, 2 * (64 - 8) * 32),  # tables, experts that a token does not retrieve, width
        ({"gated_experts": True}, 3 * (64 - 8) * 32),
        ({"num_kept_experts": 20}, 2 * (20 - 8) * 32),
        ({"num_retrieval_heads": 20}, 0),  # 80 choices of 64 experts
        ({"sparse_mlp": "product_key_memory"}, (64 - 8) * 32),
        ({"sparse_mlp": "top_k_moe", **MOE}, (4 - 2) * 3 * 32 * 24),
        ({"sparse_mlp": "top_k_moe", "moe_router": "switch", **MOE}, (4 - 1) * 3 * 32 * 24),
        ({"sparse_mlp": "expert_choice_moe", "moe_capacity_factor": 1.5, **MOE}, 2.5 * 3 * 32 * 24),
        ({"sparse_mlp": "soft_moe", "is_causal": False, **MOE}, (4 - 4 / LENGTH) * 3 * 32 * 24),
        ({"sparse_mlp": "multilinear_moe", **MOE}, 0),
    ],
)
def test_active_parameters_are_all_but_those_of_experts_that_a_token_does_not_use(tiny_config, fields, unused):
    cost = model_cost(tiny_config(**fields), LENGTH)
    assert cost.active_parameters == cost.parameters - unused


def test_layers_that_share_tables_each_use_rows_of_their_own(tiny_config):
    all_sparse = {"mlp_layer_types": ["sparse"] * 3}
    shared = model_parts(tiny_config(share_expert_tables=True, **all_sparse), LENGTH)["experts"]
    own = model_parts(tiny_config(**all_sparse), LENGTH)["experts"]
    assert shared == Cost(own.parameters // 3, own.active_parameters, own.forward_flops)


def test_the_papers_layer_costs_what_its_sizes_say():
    config = PeerConfig(hidden_size=256, num_attention_heads=4, query_dim=128, query_norm="none")
    parts = model_parts(config, LENGTH)
    assert parts["experts"].parameters == 2 * 1024**2 * 256
    assert parts["experts"].forward_flops == 4 * 8 * 16 * 256
    assert parts["routing"].forward_flops == 2 * 256 * 8 * 128 + 2 * 8 * 1024 * 128


def test_every_rival_has_its_costs(tiny_config):
    for name in SPARSE_MLPS:
        assert model_cost(tiny_config(sparse_mlp=name, is_causal=name != "soft_moe"), LENGTH).forward_flops > 0


def test_what_cannot_be_counted_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"sequence_length must be at least 1, got 0"):
        model_cost(tiny_config(), 0)

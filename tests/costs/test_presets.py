# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The model presets: each loads, builds, and has the size that is quoted for it."""

import json

import pytest
import torch
from training_helpers import REPOSITORY
from transformers import AutoModelForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.presets import cost_of_preset, describe_presets, preset_names
from modeling_peer.hub.loading import load_preset

# total, expert and active parameters, and FLOPs per token; whoever changes a preset changes what the README quotes
COSTS = {
    "peer_tiny": (2_017_152, 1_048_576, 976_768, 2_498_560),
    "peer_mini": (14_914_304, 8_388_608, 6_558_464, 16_351_232),
    "peer_small": (99_593_728, 67_108_864, 32_615_936, 82_444_288),
    "peer_medium": (509_174_528, 402_653_184, 106_717_952, 290_717_696),
    "peer_million": (2_328_132_608, 2_147_483_648, 180_911_104, 466_092_032),
}


def test_the_presets_are_those_of_the_table_smallest_first():
    assert preset_names() == list(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_a_preset_is_a_plain_configuration_with_the_costs_quoted(name):
    fields = json.loads((REPOSITORY / "configuration" / "models" / f"{name}.json").read_text())
    assert fields.pop("model_type") == "peer"
    config = PeerConfig(**fields)
    assert set(fields) <= set(config.to_dict())
    assert config.to_dict() == load_preset(name).to_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PeerForCausalLM)
    assert tuple(cost_of_preset(name).values()) == COSTS[name]
    assert model.num_parameters() == COSTS[name][0]


def test_the_largest_preset_is_the_papers_layer():
    config = load_preset("peer_million")
    sizes = (config.num_peer_experts, config.num_retrieval_heads, config.num_experts_per_head)
    assert sizes == (1024**2, 8, 16)
    assert config.mlp_layer_types.count("sparse") == 1
    assert (config.query_norm, config.share_sub_keys) == ("batch_norm", True)


def test_the_table_has_a_row_for_each_preset():
    lines = as_markdown(describe_presets()).splitlines()
    assert len(lines) == 2 + len(COSTS)
    assert (
        "| peer_million | 12 | 1,024 | 1,048,576 | 128 | 2,328,132,608 | 2,147,483,648 | 180,911,104 | 466,092,032 |"
        in lines
    )

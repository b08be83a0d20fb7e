# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The model presets of configuration/models, and their costs."""

from typing import Any

from modeling_peer.console.files import RESOURCES
from modeling_peer.console.names import PRESETS_FOLDER
from modeling_peer.costs.counting import model_parts, sum_of_parts
from modeling_peer.hub.loading import load_preset


def preset_names() -> list[str]:
    """Names for `--model`, sorted by number of parameters."""
    names = [path.stem for path in (RESOURCES / PRESETS_FOLDER).glob("*.json")]
    return sorted(names, key=lambda name: (cost_of_preset(name)["total parameters"], name))


def describe_presets() -> list[dict[str, Any]]:
    """One row per preset: its sizes, parameters, and forward FLOPs per token."""
    rows = []
    for name in preset_names():
        config = load_preset(name)
        rows.append(
            {
                "preset": name,
                "layers": config.num_hidden_layers,
                "hidden size": config.hidden_size,
                "experts": config.num_peer_experts,
                "active experts": config.num_active_experts,
                **cost_of_preset(name),
            }
        )
    return rows


def cost_of_preset(name: str) -> dict[str, int]:
    """Cost of a preset by [`modeling_peer.costs.counting`], with sequences of the model's maximum length."""
    config = load_preset(name)
    parts = model_parts(config, config.max_position_embeddings)
    cost = sum_of_parts(parts)
    return {
        "total parameters": cost.parameters,
        "expert parameters": parts["experts"].parameters,
        "active parameters": cost.active_parameters,
        "FLOPs per token": cost.forward_flops,
    }

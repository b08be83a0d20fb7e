"""The configurations in configuration/models, and how many parameters each has."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from modeling_peer.training.models import PRESETS_FOLDER, load_preset
from modeling_peer.training.recipes import REPOSITORY


def preset_names() -> list[str]:
    """Names to give as `--model`, fewest parameters first."""
    names = [path.stem for path in (REPOSITORY / PRESETS_FOLDER).glob("*.json")]
    return sorted(names, key=lambda name: (count_parameters(load_preset(name))["total"], name))


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Count without allocating: the model is built on the meta device.

    Returns:
        total: all parameters; tied ones once.
        expert: those in expert tables.
        active: all but the experts that a token does not retrieve.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    retrieved = 0
    if experts:
        # with shared tables each layer still retrieves its own rows, of one pool
        tables = 3 if config.gated_experts else 2
        rows = min(config.num_active_experts, config.num_peer_experts)
        retrieved = rows * tables * config.hidden_size * config.mlp_layer_types.count("sparse")
    return {"total": total, "expert": experts, "active": total - experts + retrieved}


def describe_presets() -> list[dict[str, Any]]:
    """One row for each preset: its sizes and parameter counts."""
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
                **{f"{kind} parameters": count for kind, count in count_parameters(config).items()},
            }
        )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A table for the README."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print a table of a model's costs: the function behind `peer costs`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from modeling_peer.console.command_line import Overrides
from modeling_peer.console.errors import SettingsError, require, require_at_least_one
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.budgets import TOLERANCES, fit_to_budget
from modeling_peer.costs.counting import model_parts, sum_of_parts
from modeling_peer.hub.loading import load_preset


@dataclass
class CostArguments:
    """The model, and the budget that it is sized to."""

    model: str = field(default="peer_mini", metadata={"help": "A configuration, or its name in configuration/models."})
    model_overrides: Overrides = field(
        default_factory=Overrides,
        metadata={"nargs": "+", "help": "Configuration fields to change, as key=value pairs or a JSON object."},
    )
    sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Unset: the model's max_position_embeddings."}
    )
    fit: str | None = field(
        default=None,
        metadata={
            "help": "First size the model to its dense twin: 'flops', 'parameters' or 'time' (see costs/budgets.py)."
        },
    )
    knobs: list[str] = field(default_factory=list, metadata={"help": "Fields to change for --fit, in this order."})

    def __post_init__(self):
        require_at_least_one(self, "sequence_length")
        require(self.fit in (None, *TOLERANCES), "fit", self.fit, f"one of {', '.join(TOLERANCES)}")
        require(self.fit is not None or not self.knobs, "knobs", self.knobs, "given with --fit")


def show_costs(arguments: CostArguments) -> dict[str, Any]:
    """Print parameters and FLOPs of each part.

    Returns:
        `parts` and `total`, each a `Cost`, and `training_flops` per token. After a fit also `fields` and `ratio`.
    """
    overrides = arguments.model_overrides
    config = load_preset(arguments.model, overrides)
    length = arguments.sequence_length or config.max_position_embeddings
    result = {"model": arguments.model, "sequence_length": length}
    try:
        if arguments.fit is not None:
            twin = load_preset(arguments.model, {**overrides, "mlp_layer_types": ["dense"] * config.num_hidden_layers})
            fit = fit_to_budget(config, twin, arguments.fit, arguments.knobs or None, length)
            print(f"{fit.ratio:.4f} of its dense twin's {arguments.fit} with {fit.fields}\n")
            config, result["fields"], result["ratio"] = fit.config, fit.fields, round(fit.ratio, 6)
        parts = model_parts(config, length)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    total = sum_of_parts(parts)
    rows = [
        {"part": name, **asdict(cost), "% of FLOPs": round(100 * cost.forward_flops / total.forward_flops, 1)}
        for name, cost in {**parts, "all": total}.items()
    ]
    print(as_markdown([{name.replace("_", " "): value for name, value in row.items()} for row in rows]))
    result["parts"] = {name: asdict(cost) for name, cost in parts.items()}
    return {**result, "total": asdict(total), "training_flops": total.training_flops}

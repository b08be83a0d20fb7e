# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Size a model to the budget of another one, to compare them at equal compute, equal size or equal time.

    fit = fit_to_budget(peer, reference=dense, budget="flops")
    fit.config, fit.fields, fit.ratio       # {"intermediate_size": 416}, 0.9965

| budget | made equal | largest distance of the ratio from 1 |
|---|---|---|
| `"flops"` | forward FLOPs per token, and thus those of training | 1 % |
| `"parameters"` | all parameters | 1 % |
| `"time"` | median seconds of a training step, measured in alternation | 5 % |

A knob is a field that is changed to meet the budget. The defaults are:

| sparse layers | `"flops"` and `"time"` | `"parameters"` |
|---|---|---|
| nothing: a dense model | intermediate_size | the same |
| peer, product_key_memory | intermediate_size, of the dense layers | num_sub_keys, then intermediate_size |
| hashed_memory | intermediate_size, of the dense layers | num_rows_per_hash_head, then intermediate_size |
| top_k_moe, expert_choice_moe | moe_intermediate_size | num_moe_experts, then moe_intermediate_size |
| soft_moe | num_slots_per_expert, then moe_intermediate_size | num_moe_experts, then moe_intermediate_size |
| multilinear_moe | the last of multilinear_ranks | the same |

The knob for FLOPs is not num_sub_keys, unless no layer is dense. To cost as much as the MLP it replaces, the layer of
`peer_million` would need nine million experts. The paper has one million.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from modeling_peer import PeerConfig
from modeling_peer.configuration_peer import TABLE_MLPS
from modeling_peer.costs.counting import model_cost

TOLERANCES = {"flops": 0.01, "parameters": 0.01, "time": 0.05}
# Knobs and their steps. The last knob uses the second step if multiples of the first are too coarse.
KNOBS = {
    "intermediate_size": (8, 1),
    "num_sub_keys": (8, 1),
    "num_retrieval_heads": (1,),
    "query_dim": (2,),
    "moe_intermediate_size": (8, 1),
    "num_moe_experts": (1,),
    "num_slots_per_expert": (1,),
    "num_rows_per_hash_head": (8, 1),
    "multilinear_ranks": (1,),
}
# Fields that are a knob's lower bound.
LOWER_BOUNDS = {"num_sub_keys": "num_experts_per_head", "num_moe_experts": "num_moe_experts_per_token"}


@dataclass(frozen=True)
class Fit:
    """A configuration sized to a budget.

    Args:
        config: the sized configuration.
        fields: overrides that turn the given configuration into it.
        ratio: its cost divided by the reference's.
    """

    config: PeerConfig
    fields: dict[str, Any]
    ratio: float


def fit_to_budget(
    config: PeerConfig,
    reference: PeerConfig,
    budget: str = "flops",
    knobs: Sequence[str] | None = None,
    sequence_length: int | None = None,
    tolerance: float | None = None,
    time_ratio: Callable[[PeerConfig, PeerConfig], float] | None = None,
) -> Fit:
    """Change the knobs of `config` until it costs as much as `reference`.

    Each knob before the last takes its largest value within the budget while the others stay unchanged, or its
    smallest value. The last knob takes the value with the nearest cost.

    Args:
        config: the configuration to size; it is not changed.
        reference: the configuration whose budget is met: usually the dense twin, or a PEER model for a dense one of
            the same size.
        budget: `"flops"`, `"parameters"` or `"time"`.
        knobs: fields to change, in this order; default: see above.
        sequence_length: tokens of a sequence; default: the reference's max_position_embeddings.
        tolerance: largest distance of the ratio from 1; default: see above.
        time_ratio: function that returns seconds of a training step of its first argument over those of its second.
            Default: `modeling_peer.costs.step_time.step_time_ratio` with sequences of `sequence_length`.

    Raises:
        ValueError: the budget is not met within `tolerance`; the message has the nearest ratio. Or a knob does not
            exist, or does not change the cost.
    """
    if budget not in TOLERANCES:
        raise ValueError(f"budget must be one of {', '.join(TOLERANCES)}; got {budget!r}.")
    tolerance = TOLERANCES[budget] if tolerance is None else tolerance
    knobs = tuple(default_knobs(config, budget) if knobs is None else knobs)
    length = reference.max_position_embeddings if sequence_length is None else sequence_length

    def counted_ratio(candidate: PeerConfig) -> float:
        cost, wanted = model_cost(candidate, length), model_cost(reference, length)
        if budget == "parameters":
            return cost.parameters / wanted.parameters
        return cost.forward_flops / wanted.forward_flops

    def measured_ratio(candidate: PeerConfig) -> float:
        return time_ratio(candidate, reference)

    if budget == "time" and time_ratio is None:
        from modeling_peer.costs.step_time import step_time_ratio  # needs the packages of training

        time_ratio = partial(step_time_ratio, sequence_length=length)
    _require_knobs(config, knobs, budget, counted_ratio)
    # The search ends early for measured ratios, because noise limits how near they can come to 1.
    ratio, near_enough = (measured_ratio, tolerance) if budget == "time" else (counted_ratio, 0.0)
    for knob in knobs:
        is_last = knob == knobs[-1]
        for step in KNOBS[knob] if is_last else KNOBS[knob][:1]:
            value, achieved = _search(config, knob, step, ratio, is_last, near_enough)
            if abs(achieved - 1) <= tolerance:
                break
        config = _with_knob(config, knob, value)
    fields = {knob: getattr(config, knob) for knob in knobs}
    if abs(achieved - 1) > tolerance:
        raise ValueError(
            f"sparse_mlp={config.sparse_mlp!r} can't be sized to the reference's {budget} within {tolerance:.1%}: the "
            f"nearest, with {fields}, has {achieved:.3f} times as much. Name other knobs ({', '.join(KNOBS)}), change "
            "other fields, or allow a larger tolerance."
        )
    return Fit(config, fields, achieved)


def default_knobs(config: PeerConfig, budget: str) -> tuple[str, ...]:
    """The fields that [`fit_to_budget`] changes by default."""
    has_dense = config.parallel_dense_mlp or "dense" in config.mlp_layer_types
    if "sparse" not in config.mlp_layer_types:
        return ("intermediate_size",)
    if config.sparse_mlp == "multilinear_moe":
        return ("multilinear_ranks",)
    if config.sparse_mlp in TABLE_MLPS:
        pool = "num_rows_per_hash_head" if config.sparse_mlp == "hashed_memory" else "num_sub_keys"
        if budget == "parameters" and has_dense:
            return (pool, "intermediate_size")
        return ("intermediate_size",) if has_dense else (pool,)
    if budget == "parameters":
        return ("num_moe_experts", "moe_intermediate_size")
    if config.sparse_mlp == "soft_moe":
        return ("num_slots_per_expert", "moe_intermediate_size")
    return ("moe_intermediate_size",)


def _search(
    config: PeerConfig,
    knob: str,
    step: int,
    ratio: Callable[[PeerConfig], float],
    to_nearest: bool,
    near_enough: float,
) -> tuple[int, float]:
    """The largest value of the knob with a `ratio` of at most 1, and that ratio.

    With `to_nearest` it is the value whose ratio is nearest to 1. Costs increase with every knob.
    """

    @cache
    def ratio_at(value):
        return ratio(_with_knob(config, knob, value))

    def is_near(value):
        return abs(ratio_at(value) - 1) <= near_enough

    below = _lowest(config, knob, step)
    above = max(below + step, _current(config, knob) // step * step)
    if ratio_at(below) >= 1 or is_near(below):
        return below, ratio_at(below)
    while ratio_at(above) < 1 and not is_near(above):
        below, above = above, 2 * above
    while above - below > step and not is_near(above) and not is_near(below):
        middle = (below + above) // 2 // step * step
        below, above = (middle, above) if ratio_at(middle) < 1 else (below, middle)
    if is_near(above) or (to_nearest and abs(ratio_at(above) - 1) < abs(ratio_at(below) - 1)):
        below = above
    return below, ratio_at(below)


def _lowest(config: PeerConfig, knob: str, step: int) -> int:
    bound = getattr(config, LOWER_BOUNDS[knob]) if knob in LOWER_BOUNDS else 1
    return math.ceil(bound / step) * step


def _current(config: PeerConfig, knob: str) -> int:
    return config.multilinear_factor_ranks[-1] if knob == "multilinear_ranks" else getattr(config, knob)


def _with_knob(config: PeerConfig, knob: str, value: int) -> PeerConfig:
    """A copy with the knob at `value`; of several ranks, the last one is changed."""
    config = copy.deepcopy(config)
    if knob == "multilinear_ranks":
        config.multilinear_ranks = [*config.multilinear_factor_ranks[:-1], value]
    else:
        setattr(config, knob, value)
    config.validate_architecture()
    return config


def _require_knobs(config: PeerConfig, knobs: tuple[str, ...], budget: str, ratio: Callable[[PeerConfig], float]):
    """Raise ValueError for a knob that does not exist, or that changes nothing in this model."""
    if not knobs:
        raise ValueError(f"knobs is empty: name at least one of {', '.join(KNOBS)}.")
    for knob in knobs:
        if knob not in KNOBS:
            raise ValueError(f"{knob!r} is no knob. Known: {', '.join(KNOBS)}.")
        lowest = _lowest(config, knob, KNOBS[knob][0])
        if ratio(_with_knob(config, knob, lowest)) == ratio(_with_knob(config, knob, 4 * lowest)):
            raise ValueError(
                f"{knob} does not change the {budget} of a model with sparse_mlp={config.sparse_mlp!r} and "
                f"mlp_layer_types={config.mlp_layer_types}. Name another knob: {', '.join(KNOBS)}."
            )

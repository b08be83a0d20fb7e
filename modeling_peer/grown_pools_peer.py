# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Grown pools: more experts beside the pool of a trained layer, with queries and sub-keys of their own.

    y = PEER(x) + Σ_pools PEER_pool(x)

The writers of a new pool are zero, so the model computes what it did. Appending sub-keys to the old codebooks would
not do so: new experts would take places and gates from old ones.
"""

from typing import Any

from .part_config_peer import PartConfig

# Fields of PeerConfig that an entry of `grown_pools` has, beside `layers`: the sizes and kind of the new retrieval.
POOL_FIELDS = ("num_sub_keys", "num_retrieval_heads", "num_experts_per_head", "query_dim", "query_norm")
POOL_SIZES = POOL_FIELDS[:4]
QUERY_NORMS = ("batch_norm", "rms_norm", "layer_norm", "none")
# What a grown pool never has: rows that a slice left out, and tables of another layer.
_FIXED = {"num_kept_experts": None, "share_expert_tables": False, "grown_pools": None, "has_zero_writers": True}


class PoolConfig(PartConfig):
    """The configuration of one grown pool, for the entry of `grown_pools` with these fields."""

    def __init__(self, model_config, fields: dict[str, Any]):
        super().__init__(model_config, **_FIXED, **{name: fields[name] for name in POOL_FIELDS})

    @property
    def num_peer_experts(self) -> int:
        """Experts in the pool, `num_sub_keys**2`."""
        return self.num_sub_keys**2

    @property
    def num_expert_rows(self) -> int:
        """Rows of each expert table: every expert has one."""
        return self.num_peer_experts

    @property
    def num_active_experts(self) -> int:
        """Experts of the pool that one token uses, all heads together."""
        return self.num_retrieval_heads * self.num_experts_per_head


def grown_pools_of(config, layer: int) -> list[PoolConfig]:
    """The configurations of the pools that stand beside the first one in this decoder layer, oldest first."""
    return [PoolConfig(config, fields) for fields in config.grown_pools or () if layer in fields["layers"]]


def check_grown_pools(config) -> None:
    """Raise ValueError if an entry of `grown_pools` cannot work."""
    if not config.grown_pools:
        return
    if config.sparse_mlp != "peer":
        raise ValueError(
            f"grown_pools stand beside PEER layers, and sparse_mlp is {config.sparse_mlp!r}. Leave grown_pools unset."
        )
    if config.num_kept_experts is not None:
        raise ValueError(
            f"grown_pools with num_kept_experts={config.num_kept_experts}: a slice does not grow. Grow the whole "
            "model."
        )
    for number, fields in enumerate(config.grown_pools):
        _check_pool(config, f"grown_pools[{number}]", fields)


def check_retrieval(sizes, place: str = "") -> None:
    """Raise ValueError if the sizes of a retrieval, of the first pool or of a grown one, do not fit together.

    Args:
        sizes: with the fields `query_dim`, `num_experts_per_head` and `num_sub_keys`.
        place: how the message begins.
    """
    if sizes.query_dim < 2 or sizes.query_dim % 2 != 0:
        raise ValueError(
            f"{place}query_dim ({sizes.query_dim}) must be even and at least 2: a query is split into two halves, "
            f"one per codebook. Try {max(2, sizes.query_dim + sizes.query_dim % 2)}."
        )
    if sizes.num_experts_per_head > sizes.num_sub_keys:
        raise ValueError(
            f"{place}num_experts_per_head ({sizes.num_experts_per_head}) exceeds num_sub_keys ({sizes.num_sub_keys}): "
            f"a head cannot retrieve more than {sizes.num_sub_keys} per codebook. Lower one or raise the other."
        )


def _check_pool(config, place: str, fields: dict[str, Any]) -> None:
    if not isinstance(fields, dict) or set(fields) != {"layers", *POOL_FIELDS}:
        raise ValueError(f"{place} must be a mapping with the keys layers, {', '.join(POOL_FIELDS)}; got {fields!r}.")
    layers = fields["layers"]
    sparse = [number for number, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    if not isinstance(layers, list | tuple) or not layers or any(layer not in sparse for layer in layers):
        raise ValueError(f"{place}: layers must name one or more of the PEER layers {sparse}; got {layers!r}.")
    for name in POOL_SIZES:
        size = fields[name]
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
            raise ValueError(f"{place}: {name} must be an integer from 1 to 2**31 - 1; got {size!r}.")
    check_retrieval(PoolConfig(config, fields), f"{place}: ")
    if fields["query_norm"] not in QUERY_NORMS:
        raise ValueError(f"{place}: query_norm must be one of {', '.join(QUERY_NORMS)}; got {fields['query_norm']!r}.")
    if fields["num_sub_keys"] ** 2 * config.hidden_size >= 2**63:
        raise ValueError(f"{place}: num_sub_keys ({fields['num_sub_keys']}) makes a table of 2**63 elements or more.")

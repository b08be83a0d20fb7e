# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Statistics of recorded routing: usage, overlap of heads, co-activation, entropy, and consistency for a token.

All of them take tensors and return tensors or tables, so that they serve any source of expert ids and gates. In a
sample, `expert_ids` and `gates` are `(num_tokens, num_heads, num_active)`. An expert with a gate of 0 was not
retrieved.
"""

import math
from typing import Any

import torch

from modeling_peer.analysis.expert_usage import expert_usage, unevenness
from modeling_peer.analysis.routing_trace import LayerTrace

# Pairs of experts of a token that are compared at a time: 32 MiB of booleans.
TILE_PAIRS = 2**25


def usage_table(layer: LayerTrace) -> list[dict[str, Any]]:
    """Usage by the paper's definitions (He 2024, section 3.3): a row for all heads, then one for each.

    Returns:
        head: `"all"`, or the head's number.
        expert_usage: share of the experts that were retrieved.
        unevenness: KL divergence of the gate sums from the uniform distribution, in nats.
        top_1_usage: share of the experts that were the best of the head (of some head).
        dead_experts: number of experts that were not retrieved.
    """
    heads = [("all", layer.gate_sums.sum(0), layer.best_counts.sum(0))]
    if layer.num_heads > 1:
        heads += [(str(head), layer.gate_sums[head], layer.best_counts[head]) for head in range(layer.num_heads)]
    return [
        {
            "head": head,
            "expert_usage": expert_usage(sums).item(),
            "unevenness": unevenness(sums).item() if sums.any() else None,
            "top_1_usage": expert_usage(best).item(),
            "dead_experts": int((sums == 0).sum()),
        }
        for head, sums, best in heads
    ]


def heat_map(values: torch.Tensor, max_size: int = 128) -> torch.Tensor:
    """The pool as a grid, one cell per pair of sub-keys, or per block of them if the grid is larger than `max_size`.

    Args:
        values: `(num_experts,)`; expert `row · n + column` belongs to sub-keys `row` and `column`. A pool whose size
            is no square is laid out in rows of `ceil(sqrt(num_experts))`.

    Returns:
        `(size, size)`, float32, `size` at most `max_size`: the mean of each block. Cells without experts are NaN.
    """
    side = math.isqrt(len(values) - 1) + 1
    grid = torch.full((side * side,), math.nan)
    grid[: len(values)] = values.float().cpu()
    grid = grid.view(side, side)
    if side <= max_size:
        return grid
    block = -(-side // max_size)
    size = -(-side // block)
    padded = torch.full((size * block, size * block), math.nan)
    padded[:side, :side] = grid
    return padded.view(size, block, size, block).nanmean(dim=(1, 3))


def head_overlap(expert_ids: torch.Tensor) -> torch.Tensor:
    """How much of what a head retrieves another head retrieves too.

    Returns:
        `(num_heads, num_heads)`: entry `[a, b]` is the share of head a's experts that head b retrieved for the same
        token, averaged over tokens. The diagonal is 1.
    """
    num_tokens, heads, active = expert_ids.shape
    shared = torch.zeros(heads, heads, dtype=torch.float64)
    for tile in _tiles(num_tokens, (heads * active) ** 2):
        ids = expert_ids[tile]
        equal = ids[:, :, :, None, None] == ids[:, None, None, :, :]  # (t, h, k, h, k)
        shared += equal.any(dim=-1).sum(dim=(0, 2), dtype=torch.float64)
    return (shared / max(1, num_tokens * active)).float()


def co_activation(
    expert_ids: torch.Tensor, gates: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often two experts work on the same token, against chance.

    Args:
        experts: the experts to compare, `(num_compared,)`.

    Returns:
        counts: tokens that retrieved both, `(num_compared, num_compared)`, int64; on the diagonal, tokens that
            retrieved the expert.
        lift: the share of tokens with both, over the product of the shares with each, float32; 1 by chance, NaN where
            an expert of the pair was not retrieved.
    """
    num_tokens = len(expert_ids)
    place = torch.full((num_experts,), -1, dtype=torch.int64)
    place[experts] = torch.arange(len(experts))
    counts = torch.zeros(len(experts), len(experts))
    for tile in _tiles(num_tokens, 4 * len(experts)):
        columns = place[expert_ids[tile].flatten(1).long()].masked_fill(gates[tile].flatten(1) == 0, -1)
        used = torch.zeros(len(columns), len(experts) + 1).scatter_(1, columns.where(columns >= 0, len(experts)), 1.0)
        counts += used[:, :-1].T @ used[:, :-1]
    single = counts.diagonal()
    lift = counts * num_tokens / (single[:, None] * single[None, :])
    return counts.long(), lift.nan_to_num(nan=math.nan, posinf=math.nan)


def gate_entropy(gates: torch.Tensor) -> torch.Tensor:
    """Entropy of a head's gates, in nats: 0 if one expert has all, log k if the k experts share evenly.

    Gates that do not sum to 1, as with `gate_activation="sigmoid"`, are divided by their sum.

    Returns:
        `(num_tokens, num_heads)`, float32.
    """
    shares = gates / gates.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    return torch.special.entr(shares).sum(dim=-1)


def means_by_power_of_two(values: torch.Tensor, sizes: torch.Tensor) -> list[dict[str, Any]]:
    """Means of `values` where `sizes` is 0, 1, 2 to 3, 4 to 7, and so on.

    Args:
        values: `(num_tokens,)`.
        sizes: of each token, such as its position or its number of occurrences; integers from 0.

    Returns:
        Rows with `from`, `to`, `tokens` and `mean`; ranges without tokens have none.
    """
    exponents = torch.where(sizes > 0, sizes.clamp(min=1).double().log2().floor().long() + 1, 0)
    rows = []
    for exponent in exponents.unique().tolist():
        chosen = values[exponents == exponent].double()
        first = 0 if exponent == 0 else 2 ** (exponent - 1)
        last = 0 if exponent == 0 else 2**exponent - 1
        rows.append({"from": first, "to": last, "tokens": len(chosen), "mean": chosen.mean().item()})
    return rows


def routing_consistency(
    expert_ids: torch.Tensor, token_ids: torch.Tensor, seed: int = 0
) -> tuple[dict[str, torch.Tensor], float]:
    """Whether a token gets the same experts wherever it stands.

    Two occurrences of a token are compared by the share of their experts that they have in common: of the
    `num_heads · num_active` experts of one, those that the same head retrieved for the other. Every occurrence is
    compared with one other, in a random order.

    Args:
        token_ids: the sampled tokens, `(num_tokens,)`.

    Returns:
        table: `token` ids that occur at least twice, their number of `pairs`, and their mean `overlap`: `(num_types,)`
            each.
        chance: the mean overlap of two sampled tokens, whatever they are.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(token_ids), generator=generator)
    chance = math.nan
    if len(shuffled) > 1:
        chance = shared_experts(expert_ids[shuffled[:-1]], expert_ids[shuffled[1:]]).mean().item()
    order = shuffled[token_ids[shuffled].argsort(stable=True)]
    first, second = order[:-1], order[1:]
    same = token_ids[first] == token_ids[second]
    overlap = shared_experts(expert_ids[first[same]], expert_ids[second[same]])
    tokens, group = token_ids[first[same]].unique(return_inverse=True)
    pairs = torch.bincount(group, minlength=len(tokens))
    sums = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, group, overlap.double())
    return {"token": tokens, "pairs": pairs, "overlap": (sums / pairs).float()}, chance


def shared_experts(first_ids: torch.Tensor, second_ids: torch.Tensor) -> torch.Tensor:
    """The share of a token's experts in `first_ids` that the same head retrieved in `second_ids`.

    Args:
        first_ids, second_ids: of tokens to compare, or of a token in two models, same shape.

    Returns:
        `(num_tokens,)`, float32.
    """
    _, heads, active = first_ids.shape
    parts = [torch.empty(0)]
    for tile in _tiles(len(first_ids), heads * active**2):
        equal = first_ids[tile].unsqueeze(3) == second_ids[tile].unsqueeze(2)  # (t, h, k, k)
        parts.append(equal.any(dim=3).float().mean(dim=(1, 2)))
    return torch.cat(parts)


def _tiles(num_rows: int, pairs_per_row: int) -> list[slice]:
    size = max(1, TILE_PAIRS // max(1, pairs_per_row))
    return [slice(start, start + size) for start in range(0, num_rows, size)]

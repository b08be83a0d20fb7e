# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How alike experts are, in weights and in outputs, and whether gates follow their outputs' norms.

These are the observations of "A Closer Look into Mixture-of-Experts in Large Language Models" (Lo et al. 2024;
arXiv:2406.18219), whose models have 8 to 64 whole MLPs per layer. Here they are also made for experts of one neuron:

| there | one neuron (PEER) | a value (product-key memory) |
|---|---|---|
| W_up or W_act of an expert, flattened | row of `down_embed` (and `gate_embed`) | - |
| W_down, flattened | row of `up_embed` | row of `up_embed` |
| row of the gate's matrix | product key: both sub-keys side by side | the same |
| output of an expert | `act(x · down) · up` | `up` |

What they measure by re-ordering the neurons of an expert has no counterpart where an expert has one neuron.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from modeling_peer.analysis.routing_hooks import RoutedLayer
from modeling_peer.experts_peer import TABLE_NAMES
from modeling_peer.row_formats_peer import dequantise_rows, format_of

MAX_COMPARED = 1024  # experts of a layer whose pairs are compared
ACTIVE_ABOVE = 1e-3  # the paper's bound for an active neuron
LEAST_JUMP = 0.01  # of the last layer: smaller differences of cosines are noise of the experts drawn


def expert_vectors(layer: RoutedLayer, expert_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of some experts, one row each, float32: `(num_chosen, ...)` by the name of the matrix.

    Args:
        expert_ids: `(num_chosen,)`, int64.
    """
    experts = layer.experts
    if layer.has_single_neurons:
        names = [name for name in TABLE_NAMES if getattr(experts, name, None) is not None]
        return {name: table_rows(layer, name, expert_ids) for name in names}
    gate, up = experts.gate_up_proj[expert_ids].detach().float().chunk(2, dim=1)
    down = experts.down_proj[expert_ids].detach().float()
    return {"gate_proj": gate.flatten(1), "up_proj": up.flatten(1), "down_proj": down.flatten(1)}


def table_rows(layer: RoutedLayer, name: str, expert_ids: torch.Tensor) -> torch.Tensor:
    """Rows of an expert table, float32, dequantised if they are stored so: `(num_chosen, hidden_size)`.

    An expert that a slice does not keep has a row of zeros.
    """
    table = getattr(layer.experts, name).detach()
    expert_ids = expert_ids.to(table.device)
    # a checkpoint's own code may be older than slices
    places = layer.experts.rows_of(expert_ids) if hasattr(layer.experts, "rows_of") else expert_ids
    kept = places.clamp(min=0)
    rows = table[kept]
    if format_of(table) is None:
        rows = rows.float()
    else:
        rows = dequantise_rows(rows, layer.experts.scales()[name.replace("embed", "scale")].detach()[kept])
    if getattr(layer.experts, "overlay", None) is not None:
        rows = layer.experts.overlay.replace(places, TABLE_NAMES.index(name), rows)
    return rows.masked_fill(places.unsqueeze(-1) < 0, 0.0)


def gate_vectors(layer: RoutedLayer, expert_ids: torch.Tensor) -> torch.Tensor | None:
    """What the gate compares a token with, for some experts: `(num_chosen, size)`, float32.

    They are product keys, or rows of a linear router. With codebooks per head, those of all heads stand side by side.
    None if the router has another form.
    """
    retrieval = getattr(layer.parent, "retrieval", None)
    if retrieval is not None:
        keys = retrieval.sub_keys.detach().float()
        keys = keys if keys.dim() == 4 else keys[None]  # (1 or h, 2, n, query_dim / 2)
        first, second = expert_ids // keys.shape[2], expert_ids % keys.shape[2]
        both = torch.cat([keys[:, 0][:, first], keys[:, 1][:, second]], dim=-1)  # (h, chosen, query_dim)
        return both.transpose(0, 1).flatten(1)
    for path in ("router.score_weight", "router.weight", "router", "gate.weight"):
        found = layer.parent
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, torch.Tensor) and found.dim() == 2 and len(found) == layer.num_experts:
            return found.detach().float()[expert_ids]
    return None


def pick_experts(layer: RoutedLayer, seed: int = 0) -> torch.Tensor:
    """All experts that have weights, or `MAX_COMPARED` of them drawn evenly: sorted ids, int64."""
    rows = getattr(layer.experts, "row_of_expert", None)
    kept = None if rows is None else (rows >= 0).nonzero().squeeze(1).cpu()
    num_kept = layer.num_experts if kept is None else len(kept)
    if num_kept <= MAX_COMPARED:
        chosen = torch.arange(num_kept)
    else:
        generator = torch.Generator().manual_seed(seed)
        # drawn with repeats and made unique: a permutation of a million is not needed
        chosen = torch.randint(num_kept, (MAX_COMPARED,), generator=generator).unique()
    return chosen if kept is None else kept[chosen]


def pairwise_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of different rows: `(num_pairs,)`."""
    unit = F.normalize(vectors, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]


def weight_similarity(layer: RoutedLayer, seed: int = 0) -> dict[str, dict[str, float]]:
    """Cosines between the weights of different experts, by the name of the matrix.

    Returns:
        mean: of the cosines. Around 0 if experts are unrelated.
        mean_absolute: of their magnitudes. For unrelated rows of width d it is about `sqrt(2 / (π d))`, in `expected`.
        largest: cosine of the most similar pair.
    """
    result = {}
    for name, vectors in expert_vectors(layer, pick_experts(layer, seed)).items():
        cosines = pairwise_cosines(vectors)
        result[name] = {
            "mean": cosines.mean().item(),
            "mean_absolute": cosines.abs().mean().item(),
            "expected": math.sqrt(2 / (math.pi * vectors.shape[1])),
            "largest": cosines.max().item(),
        }
    return result


def gates_against_weights(layer: RoutedLayer, seed: int = 0) -> dict[str, float]:
    """How much of the similarity of two experts' weights follows from the similarity of their gate vectors.

    It is R² of the linear regression of the cosines of weights on those of gate vectors, over pairs of experts. A
    whole MLP is represented by the mean of its neurons, as in the source.

    Returns:
        R² by the name of the matrix; empty if the router has no such vectors, or there are fewer than three experts.
    """
    chosen = pick_experts(layer, seed)
    keys = gate_vectors(layer, chosen)
    if keys is None or len(chosen) < 3:
        return {}
    of_gates = pairwise_cosines(keys)
    vectors = expert_vectors(layer, chosen)
    if not layer.has_single_neurons:
        width = layer.experts.down_proj.shape[1]
        means = {
            name: rows.view(len(chosen), -1, width).mean(1) for name, rows in vectors.items() if "down" not in name
        }
        means["down_proj"] = vectors["down_proj"].view(len(chosen), width, -1).mean(2)
        vectors = means
    return {name: _correlation(of_gates, pairwise_cosines(rows)) ** 2 for name, rows in vectors.items()}


@torch.no_grad()
def expert_neurons(layer: RoutedLayer, hidden_states: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """The neuron of each of some experts of one neuron, after its activation; 1 for the values of a memory.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids: `(num_tokens, num_chosen)`, int64.

    Returns:
        `(num_tokens, num_chosen)`, float32.
    """
    experts, tokens = layer.experts, hidden_states.float().unsqueeze(-1)

    def read(name):
        return (table_rows(layer, name, expert_ids) @ tokens).squeeze(-1)

    if getattr(experts, "down_embed", None) is None:
        return torch.ones(expert_ids.shape, device=hidden_states.device)
    if getattr(experts, "gate_embed", None) is None:
        return experts.activation(read("down_embed"))
    return experts.activation(read("gate_embed")) * read("down_embed")


@torch.no_grad()
def expert_outputs(
    layer: RoutedLayer, hidden_states: torch.Tensor, expert_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of some experts would add to each token with a gate of 1.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids: `(num_tokens, num_chosen)`, int64.

    Returns:
        outputs: `(num_tokens, num_chosen, hidden_size)`, float32.
        neurons: activations in the experts, `(num_tokens, num_chosen, neurons per expert)`; of a memory, ones.
    """
    experts, tokens = layer.experts, hidden_states.float()
    if layer.has_single_neurons:
        neurons = expert_neurons(layer, tokens, expert_ids).unsqueeze(-1)
        return neurons * table_rows(layer, "up_embed", expert_ids), neurons
    gate_up, down = experts.gate_up_proj.float(), experts.down_proj.float()
    gate, up = torch.einsum("td,ewd->tew", tokens, gate_up).chunk(2, dim=-1)
    active = experts.act_fn(gate)
    every = torch.einsum("tew,edw->ted", active * up, down)
    index = expert_ids.unsqueeze(-1)
    return (
        every.gather(1, index.expand(-1, -1, every.shape[-1])),
        active.gather(1, index.expand(-1, -1, active.shape[-1])),
    )


def output_similarity(
    layer: RoutedLayer, hidden_states: torch.Tensor, expert_ids: torch.Tensor, seed: int = 0
) -> dict[str, float]:
    """Cosines between the outputs of different experts for the same token, averaged over pairs and tokens.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids: the experts the token retrieved, `(num_tokens, num_active)`, int64. An expert that two heads
            retrieved is compared with the others once.

    Returns:
        chosen: of the experts that the token retrieved.
        other: of as many experts drawn from the pool, at most 64; the source runs all experts.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(expert_ids), min(layer.num_experts, 4096), generator=generator)
    others = drawn.argsort(1)[:, : min(64, max(2, expert_ids.shape[1]), layer.num_experts)]
    if layer.num_experts > drawn.shape[1]:
        others = torch.randint(layer.num_experts, others.shape, generator=generator)
    return {
        "chosen": _mean_cosine(layer, hidden_states, expert_ids),
        "other": _mean_cosine(layer, hidden_states, others),
    }


def norms_against_gates(
    layer: RoutedLayer, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor
) -> dict[str, Any]:
    """Whether the experts with high gates are those with large outputs, and how many neurons are active.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids, gates: `(num_tokens, num_heads, num_active)`, best first. For whole MLPs whose router is linear,
            all experts are ranked instead, by their scores: the source's measurement.

    Returns:
        rank_correlation: Spearman's, of the norm of an expert's output with its gate, within a head.
        rank_counts: `[i][j]` counts how often the expert with the i-th highest gate had the j-th largest output.
        top_has_largest: share of heads whose best expert has the largest output.
        active_neurons: share of activations above 0.001 in magnitude.
    """
    if not layer.has_single_neurons:
        weights = gate_vectors(layer, torch.arange(layer.num_experts))
        if weights is not None:
            scores = hidden_states.float() @ weights.T
            expert_ids = scores.argsort(dim=-1, descending=True).unsqueeze(1)
            gates = scores.gather(1, expert_ids[:, 0]).unsqueeze(1)
    tokens, heads, active = expert_ids.shape
    norms, num_active, num_neurons = [], 0, 0
    for tile in torch.arange(tokens).split(64):
        outputs, neurons = expert_outputs(layer, hidden_states[tile], expert_ids[tile].flatten(1).long())
        norms.append(outputs.norm(dim=-1).view(len(tile), heads, active))
        num_active += int((neurons.abs() > ACTIVE_ABOVE).sum())
        num_neurons += neurons.numel()
    by_gate = gates.argsort(dim=-1, descending=True).argsort(dim=-1).flatten(0, 1)  # rank of each place
    by_norm = torch.cat(norms).argsort(dim=-1, descending=True).argsort(dim=-1).flatten(0, 1)
    counts = torch.bincount((by_gate * active + by_norm).flatten(), minlength=active**2).view(active, active)
    return {
        "rank_correlation": _correlation(by_gate.flatten().float(), by_norm.flatten().float()),
        "rank_counts": counts.tolist(),
        "top_has_largest": counts[0, 0].item() / max(1, int(counts[0].sum())),
        "active_neurons": num_active / max(1, num_neurons),
    }


def last_layer_outlier(values: list[float]) -> dict[str, Any]:
    """Whether the last layer stands out from all earlier ones.

    Our rule: it lies outside their range, by more than the width of that range and by more than `LEAST_JUMP`.

    Args:
        values: one per layer, in the order of the model; cosines, correlations or shares.

    Returns:
        outlier: true or false; None with fewer than three layers, of which nothing can be said. Three say little.
        last, lowest, highest: the last value, and the range of the earlier ones.
    """
    *earlier, last = values
    if len(earlier) < 2:
        return {"outlier": None, "last": last, "lowest": min(values), "highest": max(values)}
    lowest, highest = min(earlier), max(earlier)
    beyond = max(lowest - last, last - highest)
    return {"outlier": beyond > max(highest - lowest, LEAST_JUMP), "last": last, "lowest": lowest, "highest": highest}


def _mean_cosine(layer: RoutedLayer, hidden_states: torch.Tensor, expert_ids: torch.Tensor) -> float:
    total, pairs = 0.0, 0
    for tile in torch.arange(len(expert_ids)).split(64):
        ids = expert_ids[tile].long()
        unit = F.normalize(expert_outputs(layer, hidden_states[tile], ids)[0], dim=-1)
        cosines = unit @ unit.transpose(1, 2)
        # each pair of different experts once; a repeated expert only at its first place
        later = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(dim=2)
        differ = (ids.unsqueeze(2) != ids.unsqueeze(1)) & ~later.unsqueeze(2) & ~later.unsqueeze(1)
        total += cosines[differ].sum(dtype=torch.float64).item()
        pairs += int(differ.sum())
    return total / pairs if pairs else math.nan


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    first, second = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = (first.square().sum() * second.square().sum()).sqrt()
    return (first @ second / scale).item() if scale > 0 else 0.0

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How much each expert adds on a text: which experts a slice keeps, and which belong to a domain.

    importance = record_importance(model, token_batches(corpora, tokenizer, 256))
    importance[0].by("output").topk(1000).indices      # experts of the first sparse layer

Memory per layer is 24 bytes per expert.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from modeling_peer.analysis.expert_weights import expert_neurons, table_rows
from modeling_peer.analysis.routing_hooks import RoutedLayer, Routing, find_routed_layers, observe_routing
from modeling_peer.analysis.routing_trace import TokenBatch

# output: the sum over tokens of |gate| times the norm of the expert's output. mean_output: the mean over those tokens
# that retrieved the expert, as in REAP (Lasby et al. 2025, arXiv:2510.13999). use: times that it was retrieved.
MEASURES = ("output", "mean_output", "use")
ROWS_PER_TILE = 2**14


@dataclass
class ExpertImportance:
    """What was recorded of the experts of one layer.

    Args:
        name, index: of the layer, as in `RoutedLayer`.
        counts: times that each expert was retrieved, all heads together, `(num_experts,)`, int64.
        output_sums: sums of |gate| times the norm of its output, float64, same shape.
        num_tokens: tokens that were read.
    """

    name: str
    index: int
    counts: torch.Tensor
    output_sums: torch.Tensor
    num_tokens: int = 0

    def by(self, measure: str) -> torch.Tensor:
        """The importance of each expert, `(num_experts,)`, float64.

        Raises:
            ValueError: `measure` is none of `MEASURES`.
        """
        if measure not in MEASURES:
            raise ValueError(f"the measure {measure!r} is unknown. Known: {', '.join(MEASURES)}.")
        if measure == "use":
            return self.counts.double()
        return self.output_sums if measure == "output" else self.output_sums / self.counts.clamp(min=1)


@torch.no_grad()
def record_importance(
    model: torch.nn.Module,
    batches: Iterable[TokenBatch],
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> list[ExpertImportance]:
    """Run a model on a text and add up what each expert contributes, with a progress bar.

    Args:
        model: a model whose routed layers have experts of one neuron (PEER, product-key memory).
        batches: the text; see `token_batches`. Padding is not counted.
        max_tokens: stop after this many tokens, at the end of a batch.

    Returns:
        One entry per routed layer, in the order of the model.

    Raises:
        ValueError: the model has no such layer, or there is no text.
    """
    layers = find_routed_layers(model)
    if coarse := [layer.name for layer in layers if not layer.has_single_neurons]:
        raise ValueError(f"{', '.join(coarse)}: experts are whole MLPs. Importance is of experts of one neuron.")
    found = {layer.path: _Sums(layer) for layer in layers}
    kept = None

    def observe(layer: RoutedLayer, routing: Routing) -> None:
        found[layer.path].add(*(routing if kept is None else (values[kept] for values in routing)))

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device, was_training, num_tokens = next(model.parameters()).device, model.training, 0
    model.eval()
    try:
        with (
            observe_routing(model, observe),
            tqdm(total=max_tokens, desc="Recording", unit=" tokens", disable=not show_progress) as progress,
        ):
            for batch in batches:
                mask = None if batch.token_mask is None else batch.token_mask.to(device)
                kept = None if mask is None else mask.flatten().bool()
                decoder(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
                read = batch.input_ids.numel() if mask is None else int(mask.bool().sum())
                num_tokens += read
                progress.update(read)
                if max_tokens is not None and num_tokens >= max_tokens:
                    break
    finally:
        model.train(was_training)
    if not num_tokens:
        raise ValueError("there is no text to record: no batch had a token.")
    return [sums.result(num_tokens) for sums in found.values()]


class _Sums:
    def __init__(self, layer: RoutedLayer):
        self.layer = layer
        self.counts = torch.zeros(layer.num_experts, dtype=torch.int64)
        self.outputs = torch.zeros(layer.num_experts, dtype=torch.float64)
        parts = torch.arange(layer.num_experts).split(ROWS_PER_TILE)
        self.norms = torch.cat([table_rows(layer, "up_embed", part).norm(dim=1).cpu() for part in parts])

    def add(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor) -> None:
        ids, gates = expert_ids.flatten(1), gates.flatten(1)
        size = max(1, ROWS_PER_TILE // max(1, ids.shape[1]))
        parts = zip(hidden_states.split(size), ids.split(size), gates.split(size), strict=True)
        for tokens, some_ids, some_gates in parts:
            neurons = expert_neurons(self.layer, tokens, some_ids)
            places = some_ids.flatten().cpu()
            sizes = (some_gates.float() * neurons).abs().flatten().cpu() * self.norms[places]
            self.outputs.index_add_(0, places, sizes.double())
            self.counts.index_add_(0, places, (some_gates != 0).flatten().cpu().long())

    def result(self, num_tokens: int) -> ExpertImportance:
        return ExpertImportance(self.layer.name, self.layer.index, self.counts, self.outputs, num_tokens)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How much each expert adds on a text: which experts a slice keeps, and which belong to a domain.

    importance = record_importance(model, token_batches(corpora, tokenizer, 256))
    importance[0].by("output").topk(1000).indices      # experts of the first sparse layer

Memory per layer is 20 bytes per expert.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from modeling_peer.analysis.expert_weights import expert_neurons, table_rows
from modeling_peer.analysis.routing_hooks import RoutedLayer, Routing
from modeling_peer.analysis.routing_trace import DecoderReader, TokenBatch

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
        num_tokens: tokens that were read, without padding.
    """

    name: str
    index: int
    counts: torch.Tensor
    output_sums: torch.Tensor
    num_tokens: int = 0

    @classmethod
    def of_no_token(cls, layer: RoutedLayer) -> "ExpertImportance":
        """Before any token is read."""
        counts = torch.zeros(layer.num_experts, dtype=torch.int64)
        return cls(layer.name, layer.index, counts, torch.zeros(layer.num_experts, dtype=torch.float64))

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
    with _ImportanceRecorder(model) as recorder:
        recorder.read_all(batches, max_tokens, show_progress)
    return list(recorder.found.values())


class _ImportanceRecorder(DecoderReader):
    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        if coarse := [layer.name for layer in self.layers if not layer.has_single_neurons]:
            raise ValueError(f"{', '.join(coarse)}: experts are whole MLPs. Importance is of experts of one neuron.")
        self.found = {layer.path: ExpertImportance.of_no_token(layer) for layer in self.layers}
        # norms of rows of `up_embed`; NaN until an expert is retrieved: a mapped table is not read whole
        self.norms = {layer.path: torch.full((layer.num_experts,), math.nan) for layer in self.layers}

    def _observe(self, layer: RoutedLayer, routing: Routing) -> None:
        hidden_states, ids, gates = routing.hidden_states, routing.expert_ids.flatten(1), routing.gates.flatten(1)
        importance, norms = self.found[layer.path], self.norms[layer.path]
        importance.num_tokens += len(ids)
        size = max(1, ROWS_PER_TILE // max(1, ids.shape[1]))
        parts = zip(hidden_states.split(size), ids.split(size), gates.split(size), strict=True)
        for tokens, some_ids, some_gates in parts:
            neurons = expert_neurons(layer, tokens, some_ids)
            places = some_ids.flatten().cpu()
            new = places.unique()
            new = new[norms[new].isnan()]
            norms[new] = table_rows(layer, "up_embed", new).norm(dim=1).cpu()
            sizes = (some_gates.float() * neurons).abs().flatten().cpu() * norms[places]
            importance.output_sums.index_add_(0, places, sizes.double())
            importance.counts.index_add_(0, places, (some_gates != 0).flatten().cpu().long())

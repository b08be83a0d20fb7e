# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Records the routing of a model on a text, in one pass and in memory that does not grow with the text.

    trace = record_routing(model, token_batches(corpus, tokenizer, 256))
    trace.layers[0].gate_sums          # (num_heads, num_experts), exact
    trace.layers[0].top_contexts()     # the tokens with the largest gates of each expert, exact
    trace.sample.columns["layer_5/expert_ids"]   # (num_sampled, num_heads, num_active), of tokens drawn evenly

Memory in bytes, per layer, is `num_experts · (12 · num_heads + 8 · num_contexts + 4)`, and for samples at most
`SAMPLE_ASSIGNMENTS · 16` and `PROBE_TOKENS · 8 · hidden_size`; what waits to be sorted takes `num_experts · 64`, or
128 MiB if that is more. Only the token ids, 4 bytes each, grow with the text.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.routing_hooks import RoutedLayer, Routing, find_routed_layers, observe_routing
from modeling_peer.data.corpus import Corpus
from modeling_peer.data.packing import tokenize

# A sampled token keeps all its experts. Their number over all tokens of the sample is bounded, and so is the sample.
SAMPLE_ASSIGNMENTS = 2**22
SAMPLE_TOKENS = 2**16
PROBE_TOKENS = 2048  # tokens whose hidden states are kept, too
# Assignments that wait to be sorted: the more per expert, the fewer rows of the table are read for each.
PENDING_ASSIGNMENTS = 2**21
PENDING_PER_EXPERT = 4
ROWS_PER_TOKENIZATION = 64
NO_TEXT = "there is no text to record: no batch had a token."


@dataclass
class TokenBatch:
    """Sequences of equal length.

    Args:
        input_ids: `(batch_size, sequence_length)`, int64.
        sources: the number of the text that each sequence is from, `(batch_size,)`.
        token_mask: same shape as `input_ids`, false where a token is padding; `None` means no padding.
    """

    input_ids: torch.Tensor
    sources: torch.Tensor
    token_mask: torch.Tensor | None = None


@dataclass
class LayerTrace:
    """What was recorded of one layer.

    Args:
        name, index: of the layer, as in `RoutedLayer`.
        counts: how often each head retrieved each expert, `(num_heads, num_experts)`, int32.
        gate_sums: the sums of those gates, float32, same shape.
        best_counts: how often the expert was the head's best, int32, same shape.
        contexts: see `TopContexts`.
    """

    name: str
    index: int
    counts: torch.Tensor
    gate_sums: torch.Tensor
    best_counts: torch.Tensor
    contexts: "TopContexts"

    @classmethod
    def empty(cls, layer: RoutedLayer, num_contexts: int, device: torch.device) -> "LayerTrace":
        """Of no token yet."""
        shape = (layer.num_heads, layer.num_experts)
        counts, best = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
        contexts = TopContexts(layer.num_experts, num_contexts, device)
        return cls(layer.name, layer.index, counts, torch.zeros(shape, device=device), best, contexts)

    @property
    def num_experts(self) -> int:
        return self.counts.shape[1]

    @property
    def num_heads(self) -> int:
        return self.counts.shape[0]

    def add(self, expert_ids: torch.Tensor, gates: torch.Tensor, positions: torch.Tensor) -> None:
        """Add the routing of some tokens.

        Args:
            expert_ids, gates: `(num_tokens, num_heads, num_active)`, a head's best expert first.
            positions: of the tokens in the text, `(num_tokens,)`, int32.
        """
        offsets = torch.arange(self.num_heads, device=expert_ids.device)[:, None] * self.num_experts
        places = (expert_ids + offsets).flatten()
        retrieved = (gates != 0).to(torch.int32)
        self.counts.view(-1).scatter_add_(0, places, retrieved.flatten())
        self.gate_sums.view(-1).scatter_add_(0, places, gates.flatten())
        best = places.view(expert_ids.shape)[..., 0].flatten()
        self.best_counts.view(-1).scatter_add_(0, best, retrieved[..., 0].flatten())
        self.contexts.add(expert_ids, gates, positions)

    def top_contexts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that each expert has the largest gates for.

        Returns:
            positions: in the text, `(num_experts, num_contexts)`, int32; -1 where an expert has no more tokens.
            gates: same shape, largest first; where two heads retrieved the expert for a token, there are two entries.
        """
        self.contexts.merge()
        return self.contexts.positions, self.contexts.gates


class TopContexts:
    """The tokens with the largest gates of each expert, in a stream.

    Assignments whose gate is below the expert's least kept one are dropped at once. The others wait, and are sorted
    into the table together.
    """

    def __init__(self, num_experts: int, num_contexts: int, device: torch.device | str | None = None):
        self.gates = torch.zeros(num_experts, num_contexts, device=device)
        self.positions = torch.full((num_experts, num_contexts), -1, dtype=torch.int32, device=device)
        self.least = torch.zeros(num_experts, device=device)  # the last column of `gates`, contiguous
        self.pending: list[tuple[torch.Tensor, ...]] = []
        self.num_pending = 0

    def add(self, expert_ids: torch.Tensor, gates: torch.Tensor, positions: torch.Tensor) -> None:
        """Arguments as in `LayerTrace.add`."""
        ids, values = expert_ids.flatten(), gates.flatten()
        kept = (values > self.least[ids]).nonzero().squeeze(1)
        token = kept // (ids.numel() // max(1, len(positions)))
        self.pending.append((ids[kept], values[kept], positions[token]))
        self.num_pending += len(kept)
        if self.num_pending >= max(PENDING_ASSIGNMENTS, PENDING_PER_EXPERT * len(self.least)):
            self.merge()

    def merge(self) -> None:
        """Sort the waiting assignments into the table."""
        if not self.num_pending:
            return
        ids, gates, positions = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.num_pending = [], 0
        # One sort by expert, then by falling gate: the bits of positive floats are ordered as the floats are.
        order = torch.argsort((ids << 32) | (2**31 - 1 - gates.view(torch.int32).to(torch.int64)))
        ids, gates, positions = ids[order], gates[order], positions[order]
        experts, sizes = torch.unique_consecutive(ids, return_counts=True)
        starts = sizes.cumsum(0) - sizes
        group = torch.repeat_interleave(torch.arange(len(experts), device=ids.device), sizes)
        rank = torch.arange(len(ids), device=ids.device) - starts[group]
        width = self.gates.shape[1]
        fits = rank < width
        new_gates = torch.zeros(len(experts), width, device=ids.device)
        new_positions = torch.full((len(experts), width), -1, dtype=torch.int32, device=ids.device)
        new_gates[group[fits], rank[fits]] = gates[fits]
        new_positions[group[fits], rank[fits]] = positions[fits]
        all_gates = torch.cat([self.gates[experts], new_gates], dim=1)
        all_positions = torch.cat([self.positions[experts], new_positions], dim=1)
        best, columns = all_gates.topk(width, dim=1)
        self.gates[experts], self.positions[experts] = best, all_positions.gather(1, columns)
        self.least[experts] = best[:, -1]


class Sample:
    """Tokens drawn from a stream, each with the same probability and without replacement.

    Each token gets a random number, and those with the smallest numbers stay (Vitter 1985's problem, by sorting).

    Args:
        size: tokens that are kept, at most.
        seed: of the random numbers.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.limit = 2.0  # above all random numbers
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.rows = torch.empty(0, dtype=torch.int64)
        self.num_held = 0

    def draw(self, num_tokens: int) -> None:
        """Choose among the next `num_tokens` tokens: `rows` of the batch that follow with `put`."""
        keys = torch.rand(num_tokens, generator=self.generator, dtype=torch.float64)
        self.rows = (keys < self.limit).nonzero().squeeze(1)
        self.put("key", keys)

    def put(self, name: str, values: torch.Tensor) -> None:
        """Keep the chosen rows of `values`, `(num_tokens, ...)`, in the column `name`: in int32 or float32."""
        values = values[self.rows.to(values.device)].cpu()
        narrow = {torch.int64: torch.int32, torch.bfloat16: torch.float32, torch.float16: torch.float32}
        self.parts.setdefault(name, []).append(values.to(narrow.get(values.dtype, values.dtype)))

    def close(self) -> None:
        """End a batch: of more than twice the size, keep the sample."""
        self.num_held += len(self.rows)
        if self.num_held > 2 * self.size:
            self._shrink()

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """The columns that were put, `(num_sampled, ...)`, rows in the order of the text."""
        self._shrink()
        return {name: parts[0] for name, parts in self.parts.items() if parts and name != "key"}

    def _shrink(self) -> None:
        if not self.parts:
            return
        columns = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in self.parts.items()}
        keys = columns["key"]
        if len(keys) > self.size:
            kept = keys.topk(self.size, largest=False)
            self.limit = kept.values.max().item()
            rows = kept.indices.sort().values
            columns = {name: values[rows] for name, values in columns.items()}
        self.parts = {name: [values] for name, values in columns.items()}
        self.num_held = len(columns["key"])


@dataclass
class RoutingTrace:
    """What was recorded of a model on a text.

    Args:
        layers: one entry per routed layer.
        sample: columns `position` (in the text) and, for each layer, `<name>/expert_ids` (int32) and `<name>/gates`,
            `(num_sampled, num_heads, num_active)`.
        probe: the same of fewer tokens, and `<name>/hidden_states`, `(num_sampled, hidden_size)`: what the layer's
            experts read.
        token_ids: the whole text, `(num_tokens,)`, int32, padding included.
        sequence_starts: positions at which a sequence begins, int64.
        sequence_sources: the number of the text that each sequence is from.
        source_names: the names of the texts.
    """

    layers: list[LayerTrace]
    sample: Sample
    probe: Sample
    token_ids: torch.Tensor
    sequence_starts: torch.Tensor
    sequence_sources: torch.Tensor
    source_names: list[str]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def sequence_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The number of the sequence that each position is in."""
        return torch.searchsorted(self.sequence_starts, positions.to(torch.int64), right=True) - 1

    def position_in_sequence(self, positions: torch.Tensor) -> torch.Tensor:
        """Tokens before each position in its sequence."""
        return positions.to(torch.int64) - self.sequence_starts[self.sequence_of(positions)]

    def source_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The number of the text that each position is from."""
        return self.sequence_sources[self.sequence_of(positions)]

    def context(self, position: int, before: int, after: int) -> tuple[list[int], int]:
        """Tokens around a position, within its sequence, and the place of the position among them."""
        sequence = int(self.sequence_of(torch.tensor([position]))[0])
        start = int(self.sequence_starts[sequence])
        last = sequence + 1 == len(self.sequence_starts)
        end = self.num_tokens if last else int(self.sequence_starts[sequence + 1])
        first = max(start, position - before)
        return self.token_ids[first : min(end, position + after + 1)].tolist(), position - first


class DecoderReader:
    """Runs a model's decoder on batches, in evaluation mode and without its output embedding, and observes routing.

    A subclass gets the routing of the tokens that are not padding in `_observe`.

    Args:
        model: any model of Transformers with routed layers; see `routing_hooks`.

    Raises:
        ValueError: the model has no routed layer.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.device = next(model.parameters()).device
        self.layers = find_routed_layers(model)
        self.num_tokens = 0  # read so far, padding included
        self.kept = None  # of the batch: the places of the tokens that are not padding; None: all

    def __enter__(self):
        self.was_training = self.model.training
        self.model.eval()
        self.hooks = ExitStack()
        self.hooks.enter_context(observe_routing(self.model, self._observe_all))
        return self

    def __exit__(self, *error) -> None:
        self.hooks.close()
        self.model.train(self.was_training)

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> None:
        """Run the model on a batch and record it."""
        ids, mask = batch.input_ids, batch.token_mask
        self.kept = None
        if mask is not None:
            self.kept, mask = mask.flatten().bool().nonzero().squeeze(1).to(self.device), mask.to(self.device)
        self._begin(batch)
        self.decoder(input_ids=ids.to(self.device), attention_mask=mask, use_cache=False)
        self._end(batch)
        self.num_tokens += ids.numel()

    def read_all(self, batches: Iterable[TokenBatch], max_tokens: int | None, show_progress: bool = True) -> None:
        """Read batches, with a progress bar, and stop after `max_tokens`, at the end of a batch.

        Raises:
            ValueError: no batch had a token.
        """
        with tqdm(total=max_tokens, desc="Recording", unit=" tokens", disable=not show_progress) as progress:
            for batch in batches:
                self.read(batch)
                progress.update(batch.input_ids.numel())
                if max_tokens is not None and self.num_tokens >= max_tokens:
                    break
        if not self.num_tokens:
            raise ValueError(NO_TEXT)

    def _begin(self, batch: TokenBatch) -> None: ...

    def _end(self, batch: TokenBatch) -> None: ...

    def _observe(self, layer: RoutedLayer, routing: Routing) -> None:
        raise NotImplementedError

    def _observe_all(self, layer: RoutedLayer, routing: Routing) -> None:
        if self.kept is not None:
            routing = Routing(*(tensor[self.kept] for tensor in routing))
        self._observe(layer, routing)


class RoutingRecorder(DecoderReader):
    """Runs a model on batches and records the routing.

        with RoutingRecorder(model) as recorder:
            for batch in batches:
                recorder.read(batch)
        trace = recorder.trace

    Args:
        num_contexts: contexts kept per expert.
        source_names: names of the texts that `TokenBatch.sources` counts.
        seed: of the samples.

    Raises:
        ValueError: the model has no routed layer or, in `read`, a layer routes other tokens than those of the batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        num_contexts: int = 10,
        source_names: list[str] | None = None,
        seed: int = 0,
    ):
        super().__init__(model)
        self.traces = {layer.path: LayerTrace.empty(layer, num_contexts, self.device) for layer in self.layers}
        self.samples = [Sample(SAMPLE_TOKENS, seed), Sample(PROBE_TOKENS, seed + 1)]
        self.source_names = source_names or ["text"]
        self.token_ids, self.lengths, self.sources = [], [], []
        self.positions = None  # of the tokens of the batch that are not padding

    def _begin(self, batch: TokenBatch) -> None:
        end = self.num_tokens + batch.input_ids.numel()
        positions = torch.arange(self.num_tokens, end, dtype=torch.int32, device=self.device)
        self.positions = positions if self.kept is None else positions[self.kept]
        for sample in self.samples:
            sample.draw(len(self.positions))
            sample.put("position", self.positions)

    def _end(self, batch: TokenBatch) -> None:
        for sample in self.samples:
            sample.close()
        ids = batch.input_ids
        self.token_ids.append(ids.flatten().to(torch.int32))
        self.lengths.append(torch.full((len(ids),), ids.shape[1]))
        self.sources.append(batch.sources)

    @property
    def trace(self) -> "RoutingTrace":
        """What was recorded so far.

        Raises:
            ValueError: no batch had a token.
        """
        if not self.num_tokens:
            raise ValueError(NO_TEXT)
        lengths = torch.cat(self.lengths)
        return RoutingTrace(
            list(self.traces.values()),
            *self.samples,
            token_ids=torch.cat(self.token_ids),
            sequence_starts=lengths.cumsum(0) - lengths,
            sequence_sources=torch.cat(self.sources),
            source_names=self.source_names,
        )

    def _observe(self, layer: RoutedLayer, routing: Routing) -> None:
        hidden, ids, gates = routing
        if len(ids) != len(self.positions):
            raise ValueError(
                f"{layer.name} routed {len(ids)} tokens of {len(self.positions)}. Layers that drop or join tokens "
                "cannot be recorded."
            )
        gates = gates.to(torch.float32)
        if not layer.has_single_neurons:
            # an id beyond the pool stands for no expert in some of Transformers' mixtures
            none = ids >= layer.num_experts
            ids, gates = ids.masked_fill(none, 0), gates.masked_fill(none, 0.0)
        self.traces[layer.path].add(ids, gates, self.positions)
        sample, probe = self.samples
        sample.size = min(sample.size, SAMPLE_ASSIGNMENTS // (ids.shape[1] * ids.shape[2]))
        for kept in self.samples:
            kept.put(f"{layer.name}/expert_ids", ids)
            kept.put(f"{layer.name}/gates", gates)
        probe.put(f"{layer.name}/hidden_states", hidden)


def record_routing(
    model: torch.nn.Module,
    batches: Iterable[TokenBatch],
    max_tokens: int | None = None,
    num_contexts: int = 10,
    source_names: list[str] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> RoutingTrace:
    """Run a model on a text and record its routing, with a progress bar. Arguments as in `RoutingRecorder`, and:

    Args:
        batches: the text; see `token_batches`.
        max_tokens: stop after this many tokens, at the end of a batch.

    Raises:
        ValueError: the model has no routed layer, or there is no text.
    """
    with RoutingRecorder(model, num_contexts, source_names, seed) as recorder:
        recorder.read_all(batches, max_tokens, show_progress)
    return recorder.trace


def token_batches(
    corpora: list[Corpus], tokenizer: PreTrainedTokenizerBase, sequence_length: int, batch_size: int = 8
) -> Iterator[TokenBatch]:
    """Packed sequences of several texts, one of each in turn, so that a part of the batches has all of them evenly.

    A text that ends first drops out. Its last sequence, which may be shorter, is a batch of its own.

    Args:
        corpora: the texts; their split `train` is read, as a stream where it is one.
        sequence_length: tokens per sequence.
        batch_size: sequences per batch.
    """
    streams = {number: _sequences(corpus, tokenizer, sequence_length) for number, corpus in enumerate(corpora)}
    batch, sources = [], []
    while streams:
        for number in list(streams):
            sequence = next(streams[number], None)
            if sequence is None:
                del streams[number]
            elif len(sequence) < sequence_length:
                yield TokenBatch(torch.tensor([sequence]), torch.tensor([number]))
            else:
                batch.append(sequence)
                sources.append(number)
            if len(batch) == batch_size:
                yield TokenBatch(torch.tensor(batch), torch.tensor(sources))
                batch, sources = [], []
    if batch:
        yield TokenBatch(torch.tensor(batch), torch.tensor(sources))


def _sequences(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    held: list[int] = []
    for rows in corpus.train.iter(batch_size=ROWS_PER_TOKENIZATION):
        ids = tokenize(rows, tokenizer, corpus.text_column, corpus.rows_are_lines)["input_ids"]
        held.extend(token for row in ids for token in row)
        whole = len(held) // length * length
        yield from (held[i : i + length] for i in range(0, whole, length))
        del held[:whole]
    if held:
        yield held

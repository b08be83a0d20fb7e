# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The timed calls of a model whose tables are in files or in memory, with their pages in the page cache or not."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from modeling_peer import PeerForCausalLM
from modeling_peer.benchmarks.disk import drop_pages, read_bytes
from modeling_peer.benchmarks.table_files import table_files
from modeling_peer.costs.memory import anonymous_bytes
from modeling_peer.costs.timing import set_threads
from modeling_peer.mapped_memory_peer import PAGE
from modeling_peer.quantised_tables_peer import expert_pools

MAPPED, MEMORY = "mapped", "memory"
TASKS = ("decode", "prefill")


@dataclass
class Sizes:
    """How many tokens calls have, and how often they are repeated."""

    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    rounds: int
    cold_tokens: int
    cold_prefills: int


class PlacedModel:
    """A model from a folder, its tables in one placement.

    Args:
        files: its files of expert tables.
    """

    def __init__(self, folder: Path, placement: str, files: list[Path], seed: int):
        self.model: PreTrainedModel = PeerForCausalLM.from_pretrained(folder, table_placement=placement).eval()
        self.files, self.generator = files, torch.Generator().manual_seed(seed)
        pools = expert_pools(self.model).values()
        self.mapped = [
            (address, num_rows * row_bytes)
            for pool in pools
            if pool.mapped_tables is not None
            for address, num_rows, row_bytes in pool.mapped_tables.tables
        ]
        tables = [table for pool in pools for table in pool.tables() if table is not None]
        self.row_bytes, self.tables_per_layer = tables[0].stride(0) * tables[0].element_size(), 2

    def draw(self, num_tokens: int) -> torch.Tensor:
        """New random token ids, `(1, num_tokens)`."""
        return torch.randint(self.model.config.vocab_size, (1, num_tokens), generator=self.generator)

    def drop_pages(self) -> None:
        drop_pages(self.files, self.mapped)

    @torch.no_grad()
    def decode(self, prompt: torch.Tensor, token_ids: torch.Tensor, before: Callable[[], Any] = lambda: None):
        """Seconds of each step of decoding that reads the given tokens, one after the other.

        The tokens are given, and not generated: a model with random weights soon repeats itself, and its rows would
        be in the processor's cache.

        Args:
            prompt, token_ids: `(1, num_tokens)`.
            before: called before each step, untimed.
        """
        cache, seconds = DynamicCache(config=self.model.config), []
        self.model(prompt, cache=cache, use_cache=True, logits_to_keep=1)
        for token_id in token_ids.unbind(1):
            before()
            started = time.perf_counter()
            self.model(token_id.unsqueeze(1), cache=cache, use_cache=True)
            seconds.append(time.perf_counter() - started)
        return seconds

    @torch.no_grad()
    def prefill(self, token_ids: torch.Tensor) -> float:
        """Seconds of one pass over a prompt."""
        started = time.perf_counter()
        self.model(token_ids, logits_to_keep=1, use_cache=True)
        return time.perf_counter() - started

    @torch.no_grad()
    def pages(self, token_ids: torch.Tensor) -> int:
        """Distinct pages of the tables that one pass over these tokens reads."""
        found = 0
        for ids in self.model(token_ids, output_expert_ids=True, logits_to_keep=1).expert_ids:
            rows = ids.unique()
            first, last = rows * self.row_bytes // PAGE, ((rows + 1) * self.row_bytes - 1) // PAGE
            spans = [torch.minimum(first + i, last) for i in range(-(-self.row_bytes // PAGE) + 1)]
            found += self.tables_per_layer * len(torch.cat(spans).unique())
        return found


def summarize(seconds: list[float]) -> dict[str, float]:
    """Median and ninth decile in milliseconds."""
    median, ninth = 1000 * torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9]).double())
    return {"median_ms": round(float(median), 4), "ninth_decile_ms": round(float(ninth), 4), "repeats": len(seconds)}


def measure_warm(models: dict[str, PlacedModel], sizes: Sizes, all_cached: bool) -> Iterator[tuple[str, dict]]:
    """Decode and prefill of all placements in turn, with the rows in memory.

    Args:
        all_cached: whether whole tables are in the page cache. If not, each call runs a second time, on rows that the
            first one read.
    """
    decode, prefill = ({name: [] for name in models} for _ in TASKS)
    for round_number in range(-1, sizes.rounds):  # the first round warms up, and does not count
        prompt, tokens, text = (
            next(iter(models.values())).draw(n) for n in (sizes.prompt_tokens, sizes.new_tokens, sizes.prefill_tokens)
        )
        for name, model in models.items():
            if not all_cached:
                model.decode(prompt, tokens)
            steps = model.decode(prompt, tokens)
            if not all_cached:
                model.prefill(text)
            seconds = model.prefill(text)
            if round_number >= 0:
                decode[name] += steps
                prefill[name].append(seconds)
    yield "decode", {name: summarize(found) for name, found in decode.items()}
    yield "prefill", {name: summarize(found) for name, found in prefill.items()}


def measure_cold(model: PlacedModel, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Decode and prefill with no page of the tables in the page cache before each call."""
    prompt, tokens = model.draw(sizes.prompt_tokens), model.draw(sizes.cold_tokens + 1)
    counts = []

    def before_step():
        model.drop_pages()
        counts.append(read_bytes())

    model.decode(prompt, tokens[:, :1], before=model.drop_pages)  # rows are requested from the second call on
    steps = model.decode(prompt, tokens[:, 1:], before=before_step)
    num_bytes = read_bytes() - counts[0]
    pages = [model.pages(token_id.unsqueeze(1)) for token_id in tokens[:, 1:].unbind(1)]
    found = {
        "decode": summarize(steps)
        | {"mib_read_per_call": _mib(num_bytes, len(steps)), "pages_per_call": round(sum(pages) / len(pages))}
    }
    seconds, before = [], read_bytes()
    for _ in range(sizes.cold_prefills):
        text = model.draw(sizes.prefill_tokens)
        model.drop_pages()
        seconds.append(model.prefill(text))
    found["prefill"] = summarize(seconds) | {
        "mib_read_per_call": _mib(read_bytes() - before, len(seconds)),
        "pages_per_call": model.pages(text),
    }
    return found


def probe_start(folder: str, placement: str, threads: int | None, started: float) -> dict[str, Any]:
    """Seconds and memory of loading and of the first token, in this process, which should be new.

    Imports are those of the benchmark, a few modules more than a user's.

    Args:
        started: time of the process's start, in seconds since the epoch.
    """
    imported = time.time()
    set_threads(threads)
    before = anonymous_bytes()
    model = PlacedModel(Path(folder), placement, table_files(Path(folder)), seed=0)
    loaded, of_model = time.time(), anonymous_bytes() - before
    model.prefill(model.draw(1))
    first, cpu = time.time(), time.process_time()
    model.prefill(model.draw(1))
    return {
        "import_seconds": round(imported - started, 3),
        "load_seconds": round(loaded - imported, 3),
        "first_token_seconds": round(first - loaded, 3),
        "second_token_seconds": round(time.time() - first, 4),
        "seconds_in_all": round(first - started, 3),
        "cpu_seconds_in_all": round(cpu, 3),
        "anonymous_bytes_of_model": of_model,
        "anonymous_bytes": anonymous_bytes(),
    }


def _mib(num_bytes: int, num_calls: int) -> float:
    return round(num_bytes / num_calls / 2**20, 3)

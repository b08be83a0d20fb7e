# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmark a model whose expert tables stay in their files: the function behind `peer bench-tables`."""

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_peer.benchmarks.circumstances import announce, describe_measurement
from modeling_peer.benchmarks.disk import cached_bytes, drop_pages, random_reads_per_second
from modeling_peer.benchmarks.memory import USABLE, in_new_process
from modeling_peer.benchmarks.report import publish
from modeling_peer.benchmarks.settings import PresetBenchmark
from modeling_peer.benchmarks.table_files import is_complete, table_files, write_random_checkpoint
from modeling_peer.benchmarks.table_tasks import MAPPED, MEMORY, PlacedModel, Sizes, measure_cold, measure_warm
from modeling_peer.console.errors import SettingsError, require_at_least_one
from modeling_peer.costs.memory import anonymous_bytes, available_bytes
from modeling_peer.costs.timing import set_threads
from modeling_peer.hub.loading import load_preset
from modeling_peer.kernels.cpu.memory import wait_for_huge_pages
from modeling_peer.mapped_memory_peer import PAGE
from modeling_peer.table_placement_peer import wait_for_mapped_pages

GROUP = 256  # reads that are measured in progress at a time: those of a layer for one token with h = 8 and k = 16
FEW_PER_CENT_CACHED = 0.02  # more than that after a drop, and cold figures would not be cold


@dataclass
class TablesBenchmark(PresetBenchmark):
    """The folder of the model, and the number of tokens per call."""

    folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the checkpoint, on the disk to measure. It is written if it does not exist, kept, and "
            "used again by the next run. Unset: a temporary folder, which is deleted."
        },
    )
    prompt_tokens: int = field(default=8, metadata={"help": "Length of the prompt before decoding."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens that a round of decoding reads, one per call."})
    prefill_tokens: int = field(default=512, metadata={"help": "Length of a prompt that is read in one pass."})
    cold_tokens: int = field(
        default=48, metadata={"help": "Tokens decoded with no page of the tables in the page cache before each."}
    )
    cold_prefills: int = field(default=3, metadata={"help": "Prompts read with no such page before each."})
    disk_reads: int = field(default=8192, metadata={"help": "Random reads of the disk in one measurement."})
    trained_model: str | None = field(
        default=None,
        metadata={"help": "A trained PEER checkpoint, to measure how much of its reading falls on few rows."},
    )
    text_file: str | None = field(default=None, metadata={"help": "Text that --trained_model reads for that."})
    max_text_tokens: int = field(default=65536, metadata={"help": "Tokens of that text to read."})

    def __post_init__(self):
        super().__post_init__()
        if sys.platform != "linux" or self.device != "cpu":
            raise SettingsError("bench-tables needs Linux and --device cpu: only there are tables mapped files.")
        counts = ("prompt_tokens", "new_tokens", "prefill_tokens", "cold_tokens", "cold_prefills", "max_text_tokens")
        require_at_least_one(self, *counts)
        if self.disk_reads < GROUP:
            raise SettingsError(f"--disk_reads ({self.disk_reads}) must be at least {GROUP}, which are made at once.")
        if (self.trained_model is None) != (self.text_file is None):
            raise SettingsError("--trained_model and --text_file belong together: give both, or neither.")

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.prompt_tokens,
            self.new_tokens,
            self.prefill_tokens,
            self.repeats,
            self.cold_tokens,
            self.cold_prefills,
        )


def bench_tables(settings: TablesBenchmark) -> dict[str, Any]:
    """Write the checkpoint if there is none, measure, print the tables, and write the result.

    Raises:
        SettingsError: the checkpoint does not fit on the disk, or the folder has another one.
    """
    set_threads(settings.threads)
    if settings.folder is not None:
        return _bench_in(Path(settings.folder).expanduser(), settings)
    with tempfile.TemporaryDirectory(prefix="bench-tables-") as folder:
        return _bench_in(Path(folder), settings)


def _bench_in(folder: Path, settings: TablesBenchmark) -> dict[str, Any]:
    config = load_preset(settings.model, settings.model_overrides)
    longest = max(settings.prefill_tokens, settings.prompt_tokens + settings.new_tokens)
    longest = max(longest, settings.prompt_tokens + settings.cold_tokens)
    if longest > config.max_position_embeddings:
        raise SettingsError(
            f"{longest} tokens exceed the model's {config.max_position_embeddings} positions: lower --prefill_tokens, "
            "--new_tokens or --cold_tokens."
        )
    if not is_complete(folder):
        write_random_checkpoint(folder, config, settings.torch_dtype, settings.seed)
    files = table_files(folder)
    table_bytes = sum(file.stat().st_size for file in files)
    row_bytes = config.hidden_size * settings.torch_dtype.itemsize
    _require_same_model(folder, config, table_bytes, row_bytes)
    result = {
        "benchmark": "tables",
        **describe_measurement(settings),
        "kernel_tests": settings.kernel_tests,
        "missing": {},
        "model": {
            "sparse_layers": config.mlp_layer_types.count("sparse"),
            "num_experts": config.num_peer_experts,
            "hidden_size": config.hidden_size,
            "row_bytes": row_bytes,
            "table_bytes": table_bytes,
        },
        "disk": _measure_disk(files, row_bytes, settings),
    }
    usable = USABLE * available_bytes(settings.torch_device)
    in_memory = table_bytes < usable / 2  # beside the page cache, which holds the same tables
    placements = [MAPPED, MEMORY] if in_memory else [MAPPED]
    if not in_memory:
        gib = f"{table_bytes / 2**30:.1f} GiB of tables, of {usable / 2**30:.1f} GiB that may be used"
        result["missing"][MEMORY] = f"would need twice {gib}: in memory and in the page cache"
        announce(f"{MEMORY} is left out: {result['missing'][MEMORY]}")
    result["start"] = _measure_start(folder, files, placements, settings)
    models = {name: PlacedModel(folder, name, files, settings.seed) for name in placements}
    result["cold"] = measure_cold(models[MAPPED], settings.sizes)
    for task, found in result["cold"].items():
        announce(f"{task}, cold: {found['median_ms']:.3g} ms")
    result["cold"]["decode"] |= _against_disk(result)
    if in_memory:
        _read_whole(files)
        models[MAPPED] = PlacedModel(folder, MAPPED, files, settings.seed)  # finds its tables in the page cache
        for model in models.values():
            model.decode(model.draw(1), model.draw(1))
        wait_for_huge_pages()
        wait_for_mapped_pages()
    result["tasks"] = []
    for task, found in measure_warm(models, settings.sizes, all_cached=in_memory):
        announce(f"{task}, warm: " + ", ".join(f"{name} {one['median_ms']:.3g} ms" for name, one in found.items()))
        result["tasks"].append({"task": task, "contenders": found})
    result["anonymous_bytes_at_the_end"] = anonymous_bytes() if placements == [MAPPED] else None
    if settings.trained_model is not None:
        from modeling_peer.benchmarks.hot_rows import shares_of_hot_rows  # with packages for data sets

        result["hot_rows"] = shares_of_hot_rows(settings.trained_model, settings.text_file, settings.max_text_tokens)
    publish(result, settings.output_file)
    return {"path": settings.output_file, **result}


def _require_same_model(folder: Path, config, table_bytes: int, row_bytes: int) -> None:
    expected = 2 * config.mlp_layer_types.count("sparse") * config.num_peer_experts * row_bytes
    if not expected <= table_bytes < expected + 2**20 * config.num_hidden_layers:
        raise SettingsError(
            f"{folder} has {table_bytes:,} bytes of tables, and the settings ask for {expected:,}. Delete it, name "
            "another --folder, or give the settings it was written with."
        )


def _measure_disk(files: list[Path], row_bytes: int, settings: TablesBenchmark) -> list[dict[str, Any]]:
    """Random reads a second: single and many at once, of a page, of a row, and of an expert's two rows together.

    Raises:
        SettingsError: pages stay in the page cache, as in a file system in memory.
    """
    drop_pages(files)
    share = cached_bytes(files) / sum(file.stat().st_size for file in files)
    if share > FEW_PER_CENT_CACHED:
        raise SettingsError(
            f"{share:.0%} of {files[0].parent} stay in the page cache: it is in memory, or another process uses it. "
            "Name a --folder on a disk."
        )
    found = []
    for num_bytes in dict.fromkeys((PAGE, row_bytes, 2 * row_bytes)):
        for at_once in (1, GROUP):
            num_reads = settings.disk_reads if at_once > 1 else max(GROUP, settings.disk_reads // 16)
            rates = random_reads_per_second(files, num_bytes, at_once, num_reads, settings.seed + num_bytes)
            found.append({"bytes": num_bytes, "at_once": at_once, **rates})
            announce(f"disk: {num_bytes} bytes, {at_once} at once: {rates} reads a second")
    return found


def _against_disk(result: dict[str, Any]) -> dict[str, float]:
    """Cold decode beside the time in which the disk reads as many pages, `GROUP` at once, in the faster way."""
    rates = next(one for one in result["disk"] if (one["bytes"], one["at_once"]) == (PAGE, GROUP))
    pages_per_second = max(rates.get("direct", 0.0), rates["requested"])
    decode = result["cold"]["decode"]
    disk_ms = 1000 * decode["pages_per_call"] / pages_per_second
    return {"disk_ms": round(disk_ms, 4), "percent_of_disk": round(100 * disk_ms / decode["median_ms"], 2)}


def _measure_start(
    folder: Path, files: list[Path], placements: list[str], settings: TablesBenchmark
) -> list[dict[str, Any]]:
    """Load and first token in new processes: first one that compiles what is not compiled, then those that count."""
    function, found = "modeling_peer.benchmarks.table_tasks:probe_start", []
    in_new_process(function, str(folder), MAPPED, settings.threads, time.time())
    for placement in placements:
        for pages in ("cold", "warm"):
            if pages == "cold":
                drop_pages(files)
            answer = in_new_process(function, str(folder), placement, settings.threads, time.time())
            found.append({"placement": placement, "pages": pages, **answer})
            announce(f"start, {placement}, {pages}: {answer}")
    return found


def _read_whole(files: list[Path]) -> None:
    """Bring files into the page cache."""
    content = bytearray(2**24)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(content):
                pass

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of training steps with a huge embedding: dense AdamW against row-sparse training.

The function behind `peer bench-embeddings`. Each measurement is a process of its own, and contenders take turns. The
first step of a process creates the optimizer's state and is not timed. A step zeroes the gradients, runs forward and
backward, clips, and updates.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from modeling_peer.benchmarks.circumstances import announce
from modeling_peer.benchmarks.memory import USABLE, in_new_process
from modeling_peer.console.errors import SettingsError, require, require_numbers
from modeling_peer.console.files import require_writable, write_json
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.memory import available_bytes, forget_peak_memory, memory_bytes, peak_memory_bytes
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.costs.timing import set_threads, summarize
from modeling_peer.optim import RowSparseAdamW, clip_gradients, parameter_groups, train_rows_sparsely
from modeling_peer.optim.row_sparse_state import ROW_STATES

DENSE = "dense"
CONTENDERS = (DENSE, *ROW_STATES)  # torch.optim.AdamW; RowSparseAdamW with each kind of state
# Copies of the table in a step of dense AdamW: weights, gradient, two moments, a temporary; and one to spare.
DENSE_COPIES = 6
LEARNING_RATE = 1e-3


@dataclass
class EmbeddingsBenchmark:
    """Size of the embedding, tokens of a step, and what is compared. The rest of the model is two small layers."""

    num_rows: int = field(default=1_000_000, metadata={"help": "Rows of the embedding."})
    width: int = field(default=256, metadata={"help": "Numbers of a row, a multiple of 8."})
    num_sequences: int = field(default=4, metadata={"help": "Sequences of a step."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    steps: int = field(default=5, metadata={"help": "Steps that are timed in each process."})
    rounds: int = field(default=3, metadata={"help": "Processes of each contender, in turn."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Unset: PyTorch's own choice."})
    contenders: list[str] = field(
        default_factory=lambda: list(CONTENDERS),
        metadata={"nargs": "+", "help": "dense (torch.optim.AdamW), or a row_state: float32 bfloat16 factored row."},
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file of the result."})

    def __post_init__(self):
        require_numbers(self)
        for name in ("num_rows", "width", "num_sequences", "sequence_length", "steps", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        require(self.num_rows >= 2, "num_rows", self.num_rows, "at least 2")
        if unknown := [name for name in self.contenders if name not in CONTENDERS]:
            raise SettingsError(f"--contenders must be of {', '.join(CONTENDERS)}; got {', '.join(unknown)}.")


def bench_embeddings(arguments: EmbeddingsBenchmark) -> dict[str, Any]:
    """Measure each contender in turn, print the table and write the file.

    Returns:
        `contenders`: by name, `milliseconds` and `cpu_milliseconds` of a step (medians and quartiles; CPU time is that
        of the process), `peak_mib` of its resident memory beyond that of the imports, `state_mib` of the optimizer's
        state of the embedding. Then `settings`, `machine`, `versions`.

    Raises:
        SettingsError: sizes do not fit together, or dense AdamW would not fit in memory.
    """
    table_bytes = 4 * arguments.num_rows * arguments.width
    needed, available = DENSE_COPIES * table_bytes, USABLE * available_bytes(torch.device("cpu"))
    if DENSE in arguments.contenders and needed > available:
        raise SettingsError(
            f"dense AdamW on {arguments.num_rows:,} rows of {arguments.width} needs about {needed / 2**30:.1f} GiB, "
            f"and {available / 2**30:.1f} are free. Take fewer rows, or leave dense out of --contenders."
        )
    _llama(arguments)  # sizes that do not fit together are found before the first process
    if arguments.output_file:
        require_writable("output_file", arguments.output_file)
    settings = asdict(arguments)
    del settings["output_file"]
    runs: dict[str, list] = {name: [] for name in arguments.contenders}
    for number in range(arguments.rounds):
        for name in arguments.contenders[:: 1 if number % 2 == 0 else -1]:
            run = in_new_process("modeling_peer.benchmarks.embeddings:measure_embedding", name, settings)
            if "why" in run:
                raise SettingsError(f"{name}: {run['why']}. Take fewer --num_rows.")
            announce(f"round {number + 1}, {name}: {summarize(run['seconds']).median_ms:.1f} ms")
            runs[name].append(run)
    contenders = {
        name: {
            "milliseconds": summarize([one for run in own for one in run["seconds"]]).as_dict(),
            "cpu_milliseconds": summarize([one for run in own for one in run["cpu_seconds"]]).as_dict(),
            "peak_mib": max((run["peak_mib"] for run in own if run["peak_mib"] is not None), default=None),
            "state_mib": own[0]["state_mib"],
        }
        for name, own in runs.items()
    }
    print(as_markdown([_row(name, one) for name, one in contenders.items()]))
    set_threads(arguments.threads)
    result = {
        "benchmark": "embeddings",
        "contenders": contenders,
        "settings": settings,
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
    }
    if arguments.output_file:
        write_json(Path(arguments.output_file), result)
    return {"path": arguments.output_file, **result}


def _row(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    clock = measured["milliseconds"]
    return {
        "gradients, state": "dense, AdamW" if name == DENSE else f"row-sparse, {name}",
        "a step, ms": f"{clock['median_ms']:,.0f}",
        "quartiles": f"{clock['lower_quartile_ms']:,.0f} to {clock['upper_quartile_ms']:,.0f}",
        "CPU time, ms": f"{measured['cpu_milliseconds']['median_ms']:,.0f}",
        "peak memory, MiB": "-" if measured["peak_mib"] is None else f"{measured['peak_mib']:,.0f}",
        "state, MiB": f"{measured['state_mib']:,.0f}",
    }


def _llama(arguments: EmbeddingsBenchmark) -> LlamaForSequenceClassification:
    """Two small layers; their embedding is replaced."""
    try:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=arguments.width,
            intermediate_size=2 * arguments.width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=arguments.sequence_length,
            pad_token_id=0,
        )
        return LlamaForSequenceClassification(config)
    except (ValueError, StrictDataclassError) as error:
        raise SettingsError(str(error)) from error


def measure_embedding(contender: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process.

    Returns:
        `seconds` and `cpu_seconds` of each timed step, `peak_mib` (None if it cannot be measured), `state_mib`.
    """
    arguments, cpu = EmbeddingsBenchmark(**settings), torch.device("cpu")
    set_threads(arguments.threads)
    torch.manual_seed(0)
    unmeasured, before = forget_peak_memory(cpu), 0
    if unmeasured is None:
        before = memory_bytes(cpu)
    model = _llama(arguments)
    # filled with a constant, because drawing random numbers takes longer than all steps
    rows = torch.full((arguments.num_rows, arguments.width), 0.02)
    embedding = model.model.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
    if contender == DENSE:
        optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE))
    else:
        train_rows_sparsely(model, "embed_tokens")
        optimizer = RowSparseAdamW(parameter_groups(model, LEARNING_RATE), row_state=contender)
    # frequencies of tokens as in text: the n-th is 1 / n as frequent as the first
    share = torch.rand(arguments.steps + 1, arguments.num_sequences, arguments.sequence_length)
    batches = (arguments.num_rows**share).long().clamp(1, arguments.num_rows - 1)
    labels = torch.zeros(arguments.num_sequences, dtype=torch.int64)
    seconds, cpu_seconds = [], []
    for tokens in batches:
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        if contender == DENSE:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            clip_gradients(model, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    state = optimizer.state[embedding.weight].values()
    peak = None if unmeasured else round((peak_memory_bytes(cpu) - before) / 2**20, 1)
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "peak_mib": peak,
        "state_mib": round(sum(one.nbytes for one in state if one.dim()) / 2**20, 3),
    }

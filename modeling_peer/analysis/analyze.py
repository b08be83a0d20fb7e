# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Record the routing of a checkpoint on a text and report on it: the function behind `peer inspect`."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import modeling_peer
from modeling_peer.analysis import figures as figure_tables
from modeling_peer.analysis.figures import collect_figures
from modeling_peer.analysis.html_report import render, without_nan
from modeling_peer.analysis.named_texts import NamedTexts, ReadingArguments, load_named_texts
from modeling_peer.analysis.routing_hooks import find_routed_layers
from modeling_peer.analysis.routing_trace import RoutingTrace, record_routing, token_batches
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.tables import as_markdown
from modeling_peer.data.corpus import TextArguments, load_text
from modeling_peer.data.tokenizers import encode_texts
from modeling_peer.files_peer import give_default_permissions, write_text

HTML, DATA, TENSORS = "report.html", "report.json", "report.safetensors"


@dataclass
class InspectionArguments(ReadingArguments, TextArguments):
    """What is reported, and where the report goes. Several texts are read in turn, and told apart."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for report.html, report.json and report.safetensors. Files of these names are replaced."
        },
    )
    beside: str | None = field(
        default=None, metadata={"help": "A second checkpoint, which reads the same text and is compared."}
    )
    excerpt: str | None = field(
        default=None,
        metadata={"help": "Text whose experts the report shows word by word. Unset: the beginning of each text."},
    )
    max_tokens: int = field(default=1_000_000, metadata={"help": "Tokens to read, at most."})
    num_contexts: int = field(default=10, metadata={"help": "Contexts that are kept for each expert."})
    seed: int = field(
        default=0, metadata={"help": "Seed of what is drawn: the sample of tokens, some of the experts."}
    )


def inspect_checkpoint(arguments: InspectionArguments) -> dict[str, Any]:
    """Record, write the three files of the report, and print its tables.

    Returns:
        `model`, `html`, `data`, `tensors` (paths), `num_tokens`, `seconds`, and by layer the usage of all heads.

    Raises:
        SettingsError: a checkpoint, a text or the folder does not exist or cannot be used.
    """
    started = time.perf_counter()
    if not arguments.output_dir:
        raise SettingsError("--output_dir is missing. Name a folder for the report.")
    folder = Path(arguments.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {folder}: {error.strerror}.") from error
    texts = _load_texts(arguments)
    figures, trace = _inspect(arguments.model, arguments, texts)
    figures["data"] = texts.description
    tables = {
        "usage": figure_tables.usage_rows(figures),
        "routing": figure_tables.routing_rows(figures),
        "weights": figure_tables.weight_rows(figures),
    }
    if arguments.beside:
        other, _ = _inspect(arguments.beside, arguments, texts)
        figures["beside"] = arguments.beside
        figures["comparison"] = figure_tables.compare(figures, other)
        tables["beside"] = figure_tables.compare_rows(figures, other)
    figures["tables"] = tables
    print()
    for rows in tables.values():
        print(as_markdown(rows), end="\n\n")
    paths = _write(folder, figures, trace)
    return {
        "model": arguments.model,
        **paths,
        "num_tokens": trace.num_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "usage": {layer["name"]: layer["usage"][0] for layer in without_nan(figures["layers"])},
    }


def trace_tensors(trace: RoutingTrace) -> dict[str, torch.Tensor]:
    """Everything recorded, by name, as `report.safetensors` has it.

    `token_ids`, `sequence_starts`, `sequence_sources`; for each layer `<layer>/counts`, `gate_sums`, `best_counts`,
    `context_positions` and `context_gates`; and the samples, `sample/...` and `probe/...` (see `RoutingTrace`).
    """
    tensors = {name: getattr(trace, name) for name in ("token_ids", "sequence_starts", "sequence_sources")}
    for layer in trace.layers:
        positions, gates = layer.top_contexts()
        found = {"counts": layer.counts, "gate_sums": layer.gate_sums, "best_counts": layer.best_counts}
        found |= {"context_positions": positions, "context_gates": gates}
        tensors |= {f"{layer.name}/{name}": values for name, values in found.items()}
    for kind, sample in (("sample", trace.sample), ("probe", trace.probe)):
        tensors |= {f"{kind}/{name}": values for name, values in sample.columns.items()}
    return {name: values.cpu().contiguous() for name, values in tensors.items()}


def _inspect(
    name: str | None, arguments: InspectionArguments, texts: NamedTexts
) -> tuple[dict[str, Any], RoutingTrace]:
    model, tokenizer = arguments.load(name)
    try:
        layers = find_routed_layers(model)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    length = arguments.sequence_length(model)
    print(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {model.device}")
    print(f"routed layers: {', '.join(f'{layer.name} ({layer.num_experts:,} experts)' for layer in layers)}")
    batches = token_batches(texts.corpora, tokenizer, length, arguments.batch_size)
    excerpts = []
    try:
        trace = record_routing(
            model, batches, arguments.max_tokens, arguments.num_contexts, texts.names, arguments.seed
        )
        if arguments.excerpt:
            excerpts = [("excerpt", encode_texts(tokenizer, [arguments.excerpt])[0][:length])]
        figures = collect_figures(model, tokenizer, trace, excerpts, arguments.seed)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    versions = f"modeling_peer {modeling_peer.__version__}, transformers {transformers.__version__}"
    figures |= {"model": name, "num_parameters": model.num_parameters(), "sequence_length": length}
    figures |= {"versions": f"{versions}, torch {torch.__version__}"}
    return figures, trace


def _load_texts(arguments: InspectionArguments) -> NamedTexts:
    if arguments.text:
        return load_named_texts(arguments, arguments.text)
    corpus = load_text(arguments, streaming=True)
    return NamedTexts([arguments.dataset_name], [corpus], corpus.description)


def _write(folder: Path, figures: dict[str, Any], trace: RoutingTrace) -> dict[str, str]:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="_") as unfinished:
            save_file(trace_tensors(trace), Path(unfinished, TENSORS), metadata={"format": "pt"})
            give_default_permissions(Path(unfinished))
            os.replace(Path(unfinished, TENSORS), folder / TENSORS)
        write_text(folder / DATA, json.dumps(without_nan(figures), ensure_ascii=False, allow_nan=False) + "\n")
        write_text(folder / HTML, render(figures))
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {folder}: {error.strerror}.") from error
    return {"html": str(folder / HTML), "data": str(folder / DATA), "tensors": str(folder / TENSORS)}

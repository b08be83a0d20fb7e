# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Score any causal checkpoint on any text: the function behind `peer evaluate`."""

import json
from dataclasses import dataclass, field
from typing import Any

import modeling_peer  # noqa: F401  registers PEER with the Auto classes
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import require_writable
from modeling_peer.data.corpus import TextArguments, load_text
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import CheckpointArguments


@dataclass
class EvaluationArguments(TextArguments, CheckpointArguments):
    """What is scored, and with which window."""

    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub id. Unset: the checkpoint's own."}
    )
    file: str | None = field(
        default=None,
        metadata={"help": "Text to score: a UTF-8 file (also .jsonl with a text column, .gz and .xz) or a folder."},
    )
    max_bytes: int | None = field(default=None, metadata={"help": "Bytes of UTF-8 text to score. Unset: all."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in the window. Unset: max_position_embeddings, at most 1024."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window moves. Unset: half of context_length."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    output_file: str | None = field(default=None, metadata={"help": "Write the result to this JSON file."})


def evaluate_checkpoint(arguments: EvaluationArguments) -> dict[str, Any]:
    """Measure perplexity and bits per byte, and return them with a description of the data.

    Raises:
        SettingsError: the model or text does not exist, or the window does not fit the model.
    """
    if arguments.output_file:
        require_writable("output_file", arguments.output_file)
    corpus = load_text(arguments, arguments.file)
    texts = corpus.documents("train", arguments.max_bytes)
    model, tokenizer = arguments.load(tokenizer=arguments.tokenizer)
    print(f"data: {corpus.description}")
    print(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {model.device}")
    try:
        measured = CausalPerplexity().compute(
            data=texts,
            model=model,
            tokenizer=tokenizer,
            context_length=arguments.context_length,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    result = {"model": arguments.model, "data": corpus.description, **measured}
    if arguments.output_file:
        write_text(arguments.output_file, json.dumps(result, indent=2) + "\n")
    return result

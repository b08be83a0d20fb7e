# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Score any causal checkpoint on any text: the function behind `peer evaluate`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modeling_peer  # noqa: F401  registers PEER with the Auto classes
from modeling_peer.console.errors import SettingsError, require_numbers
from modeling_peer.data.corpus import DataArguments, load_corpus
from modeling_peer.data.python_sources import PYTHON_STDLIB
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import load_checkpoint


@dataclass
class EvaluationArguments:
    """The model, the text, and the window."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint folder or Hub id, PEER or not."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub id. Unset: the checkpoint's own."}
    )
    file: str | None = field(
        default=None,
        metadata={"help": "Text to score: a UTF-8 file (also .jsonl with a text column, .gz and .xz) or a folder."},
    )
    dataset_name: str = field(
        default=PYTHON_STDLIB,
        metadata={
            "help": "Hub id or local folder of a data set. Default: the sources of the Python standard library."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    split: str = field(default="validation", metadata={"help": "Split of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column (or .jsonl key) that holds the text."})
    rows_are_lines: bool = field(
        default=False,
        metadata={
            "help": "Join the rows and score them as one text. For data sets whose rows are lines, such as WikiText."
        },
    )
    max_bytes: int | None = field(default=None, metadata={"help": "Bytes of UTF-8 text to score. Unset: all."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in the window. Unset: max_position_embeddings, at most 1024."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window moves. Unset: half of context_length."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights. auto: the stored type."})
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "Implementation of the experts: eager, or a registered name. Unset: PEER chooses."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model code of the checkpoint. Read it first."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Write the result to this JSON file."})

    def __post_init__(self):
        require_numbers(self)


def evaluate_checkpoint(arguments: EvaluationArguments) -> dict[str, Any]:
    """Measure perplexity and bits per byte, and return them with a description of the data.

    Raises:
        SettingsError: the model or text does not exist, or the window does not fit the model.
    """
    if arguments.output_file:
        _require_writable(Path(arguments.output_file))
    texts, description = _load_texts(arguments)
    model, tokenizer = load_checkpoint(
        arguments.model,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        experts_implementation=arguments.experts_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"data: {description}")
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
    result = {"model": arguments.model, "data": description, **measured}
    if arguments.output_file:
        write_text(arguments.output_file, json.dumps(result, indent=2) + "\n")
    return result


def _require_writable(path: Path) -> None:
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write to --output_file {path}: {error.strerror}.") from error


def _load_texts(arguments: EvaluationArguments) -> tuple[list[str], str]:
    split = "train"  # the one split that load_corpus always fills
    data = DataArguments(text_column=arguments.text_column, rows_are_lines=arguments.rows_are_lines)
    data.validation_percent = 0.0
    if arguments.file:
        data.train_file = arguments.file
    else:
        data.dataset_name, data.dataset_config = arguments.dataset_name, arguments.dataset_config
        data.train_split = arguments.split
        if arguments.dataset_name == PYTHON_STDLIB:
            split = arguments.split
            if split not in ("train", "validation"):
                raise SettingsError(f"{PYTHON_STDLIB} has the splits train and validation, not {split!r}.")
    corpus = load_corpus(data)
    description = corpus.description if arguments.file else f"{corpus.description}, {arguments.split}"
    return corpus.documents(split, arguments.max_bytes), description

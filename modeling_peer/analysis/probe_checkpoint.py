# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Probe single experts of a checkpoint, beside those or the neurons of another: the function behind `peer probe`."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from modeling_peer.analysis.named_texts import ReadingArguments, load_named_texts
from modeling_peer.analysis.probing import (
    EXPERT_FEATURES,
    label_tokens,
    margin,
    probe_labels,
    probe_table,
    record_features,
)
from modeling_peer.console.errors import SettingsError, nearest, require_at_least_one
from modeling_peer.console.files import require_writable
from modeling_peer.console.tables import as_markdown
from modeling_peer.files_peer import write_text


@dataclass
class ProbeArguments(ReadingArguments):
    """What is probed. Which text a token is from is a label, too."""

    beside: list[str] = field(
        default_factory=list,
        metadata={"help": "Other checkpoints with the same tokenizer, such as a dense twin.", "nargs": "+"},
    )
    expert_feature: str = field(
        default="neuron", metadata={"help": "Feature of an expert: neuron (times its gate), or gate."}
    )
    max_tokens: int = field(default=65_536, metadata={"help": "Tokens, an equal part from each text, at most."})
    num_splits: int = field(default=5, metadata={"help": "Divisions into a half that chooses and one that scores."})
    output_file: str | None = field(default=None, metadata={"help": "Write the result to this JSON file."})

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "max_tokens", "num_splits")
        if self.expert_feature not in EXPERT_FEATURES:
            raise SettingsError(
                f"--expert_feature must be one of {', '.join(EXPERT_FEATURES)}; got {self.expert_feature!r}."
                f"{nearest(self.expert_feature, EXPERT_FEATURES)}"
            )


def probe_checkpoint(arguments: ProbeArguments) -> dict[str, Any]:
    """Label tokens, find the best feature of each model for each label, and print the table of F1.

    Returns:
        `rows` as in `probe_labels`, `margin` of the first checkpoint over each other one, `num_tokens`, `seconds`.

    Raises:
        SettingsError: a checkpoint or a text does not exist or cannot be used, or tokenizers differ.
    """
    started = time.perf_counter()
    arguments.require("model", "text")
    if arguments.output_file:
        require_writable("output_file", arguments.output_file)
    texts = load_named_texts(arguments, arguments.text, streaming=False)
    tokens, features, vocabulary = None, {}, None
    for name in [arguments.model, *arguments.beside]:
        model, tokenizer = arguments.load(name)
        length = arguments.sequence_length(model)
        if tokens is None:
            if not tokenizer.is_fast:
                raise SettingsError(
                    f"the tokenizer of {name!r} does not say where in a text a token is. Use a fast one."
                )
            documents = {
                text: "".join(corpus.documents("train", 16 * arguments.max_tokens // len(texts.names)))
                for text, corpus in zip(texts.names, texts.corpora, strict=True)
            }
            tokens, vocabulary = (
                label_tokens(documents, tokenizer, length, arguments.max_tokens),
                tokenizer.get_vocab(),
            )
            if len(tokens.sequences) < 2:
                raise SettingsError(f"the texts have {tokens.num_tokens} tokens in sequences of {length}: too few.")
        elif tokenizer.get_vocab() != vocabulary:
            raise SettingsError(f"{name!r} and {arguments.model!r} have different tokenizers: labels would not match.")
        print(f"{name}: {model.num_parameters():,} parameters")
        try:
            features[name] = record_features(model, tokens, arguments.expert_feature, arguments.batch_size)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    rows = probe_labels(features, tokens, arguments.num_splits)
    if not rows:
        raise SettingsError(f"no label is frequent enough in {tokens.num_tokens:,} tokens. Read more text.")
    result = {
        "model": arguments.model,
        "data": texts.description,
        "expert_feature": arguments.expert_feature,
        "num_tokens": tokens.num_tokens,
        "rows": rows,
        "margin": {other: margin(rows, arguments.model, other) for other in arguments.beside},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(as_markdown(probe_table(rows)))
    if arguments.output_file:
        write_text(arguments.output_file, json.dumps(result, indent=2) + "\n")
    return result

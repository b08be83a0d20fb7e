# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Texts that a command of this room reads side by side, each with a name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import Corpus, TextArguments, load_text
from modeling_peer.evaluation.perplexity import CausalPerplexity


@dataclass
class NamedTexts:
    """Texts and their names, in the order of the command line, and a description of them all."""

    names: list[str]
    corpora: list[Corpus]
    description: str


def load_named_texts(arguments: TextArguments, paths: Sequence[str], streaming: bool = True) -> NamedTexts:
    """The texts in files, each named by its file without the ending, or by its path if two had one name.

    Raises:
        SettingsError: a file is missing, empty or no text.
    """
    corpora = [load_text(arguments, path, streaming=streaming) for path in paths]
    names = [Path(path).name.split(".")[0] or path for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    return NamedTexts(names, corpora, ", ".join(Path(path).name for path in paths))


def sequence_length(model: PreTrainedModel, context_length: int | None) -> int:
    """`context_length`, or the longest that the model takes, at most 1024.

    Raises:
        SettingsError: the model takes no sequence of this length.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or 1024
    length = min(longest, 1024) if context_length is None else context_length
    if length > longest:
        raise SettingsError(f"--context_length ({length}) exceeds the model's {longest} positions.")
    return length


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: NamedTexts,
    max_bytes: int | None,
    context_length: int,
    batch_size: int,
) -> dict[str, float]:
    """Perplexity of each text, by name. At most `max_bytes` of each are scored."""
    return {
        name: CausalPerplexity().compute(
            data=corpus.documents("train", max_bytes),
            model=model,
            tokenizer=tokenizer,
            context_length=context_length,
            batch_size=batch_size,
            show_progress=False,
        )["perplexity"]
        for name, corpus in zip(texts.names, texts.corpora, strict=True)
    }

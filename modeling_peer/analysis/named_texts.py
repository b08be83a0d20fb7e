# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Texts that a command reads side by side with a checkpoint, each with a name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError, require_at_least_one
from modeling_peer.data.corpus import Corpus, TextForm, load_text
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.hub.loading import CheckpointArguments


@dataclass
class ReadingArguments(TextForm, CheckpointArguments):
    """The texts, and how they are cut into sequences."""

    text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts: files or folders (UTF-8; also .jsonl with a text column, .gz, .xz), named by their files.",
            "nargs": "+",
        },
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Unset: max_position_embeddings, at most 1024."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences per forward pass."})

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "context_length", "batch_size")

    def require(self, *names: str) -> None:
        """Raise SettingsError if one of these fields is unset or empty."""
        for name in names:
            if not getattr(self, name):
                raise SettingsError(f"--{name} is missing.")

    def sequence_length(self, model: PreTrainedModel) -> int:
        """`context_length`, or the longest that the model takes, at most 1024.

        Raises:
            SettingsError: the model takes no sequence of this length.
        """
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        length = min(longest, 1024) if self.context_length is None else self.context_length
        if length > longest:
            raise SettingsError(f"--context_length ({length}) exceeds the model's {longest} positions.")
        return length


@dataclass
class NamedTexts:
    """Texts and their names, in the order of the command line, and a description of them all."""

    names: list[str]
    corpora: list[Corpus]
    description: str


def load_named_texts(form: TextForm, paths: Sequence[str], streaming: bool = True) -> NamedTexts:
    """The texts in files, each named by its file without the ending, or by its path if two had one name.

    Raises:
        SettingsError: a file is missing, empty or no text.
    """
    corpora = [load_text(form, path, streaming=streaming) for path in paths]
    names = [Path(path).name.split(".")[0] or path for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    return NamedTexts(names, corpora, ", ".join(Path(path).name for path in paths))


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

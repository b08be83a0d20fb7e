# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Blocks of tokens for a run: how long they are, and those of a corpus."""

import math

import datasets
import torch

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import Corpus
from modeling_peer.data.packing import pack
from modeling_peer.training.recipe import Recipe


def choose_block_size(block_size: int | None, config) -> int:
    """Tokens per example, checked against the positions that the model has."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if block_size is None:
        return min(longest, 1024)
    if not 2 <= block_size <= longest:
        raise SettingsError(
            f"block_size ({block_size}) must be from 2 to max_position_embeddings ({longest}); a new model can have "
            f"more: --model_overrides max_position_embeddings={block_size}."
        )
    return block_size


def pack_corpus(corpus: Corpus, tokenizer, block_size: int, recipe: Recipe):
    """Training and validation examples; the latter None when there is no validation text."""
    data, run = recipe.data, recipe.run
    options = {
        "tokenizer": tokenizer,
        "block_size": block_size,
        "text_column": corpus.text_column,
        "rows_are_lines": corpus.rows_are_lines,
        "num_workers": data.preprocessing_workers,
    }
    train = pack(corpus.train, **options)
    if isinstance(train, datasets.IterableDataset):
        # without end: a run that is resumed skips as many examples as it had seen, however many passes that was
        train = train.repeat(None)
        if data.shuffle_buffer:
            # the examples and not the rows: a long document is several rows in order
            train = train.shuffle(seed=run.seed, buffer_size=data.shuffle_buffer)
    validation = corpus.validation and pack(corpus.validation, **options, name="validation")
    if validation is not None and data.max_evaluation_examples:
        most = data.max_evaluation_examples
        chosen = range(0, len(validation), max(1, len(validation) // most))[:most]
        validation = torch.utils.data.Subset(validation, chosen)
    return train, validation

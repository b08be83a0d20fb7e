# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Blocks of tokens for a run: their size, and the blocks of a corpus."""

import math

import datasets
import torch

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import Corpus
from modeling_peer.data.packing import pack
from modeling_peer.training.recipe import Recipe


def choose_block_size(block_size: int | None, config) -> int:
    """Tokens per example: `block_size`, or if it is None the model's positions, at limit 1024.

    Raises:
        SettingsError: `block_size` is below 2 or exceeds the model's positions.
    """
    max_positions = getattr(config, "max_position_embeddings", None) or math.inf
    if block_size is None:
        return min(max_positions, 1024)
    if not 2 <= block_size <= max_positions:
        raise SettingsError(
            f"block_size ({block_size}) must be from 2 to max_position_embeddings ({max_positions}); a new model can "
            f"have more: --model_overrides max_position_embeddings={block_size}."
        )
    return block_size


def pack_corpus(corpus: Corpus, tokenizer, block_size: int, recipe: Recipe):
    """The training and the validation examples. The latter are None if there is no validation text."""
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
        # endless: a resumed run skips the examples it has seen, which may be several passes over the data
        train = train.repeat(None)
        if data.shuffle_buffer:
            # examples are shuffled, not rows: a long document is several consecutive rows
            train = train.shuffle(seed=run.seed, buffer_size=data.shuffle_buffer)
    validation = corpus.validation and pack(corpus.validation, **options, name="validation")
    if validation is not None and data.max_evaluation_examples:
        limit = data.max_evaluation_examples
        chosen = range(0, len(validation), max(1, len(validation) // limit))[:limit]
        validation = torch.utils.data.Subset(validation, chosen)
    return train, validation

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The tokens that all runs of a study train on: made once, and the same when the study is continued."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import load_corpus
from modeling_peer.data.packing import PackedBlocks
from modeling_peer.studies.unchanged import require_same_beginning
from modeling_peer.training.blocks import choose_block_size, pack_corpus
from modeling_peer.training.models import load_tokenizer
from modeling_peer.training.recipe import Recipe

TOKENIZER_FOLDER = "tokenizer"
DATA_FILE = "data.json"
# What it holds of the data.
FACTS = ("data", "vocab_size", "block_size", "training_tokens", "validation_examples", "tokens_sha256")


def prepare_data(recipe: Recipe, config: PreTrainedConfig, output_dir: Path) -> dict[str, Any]:
    """Learn the tokenizer into `output_dir/tokenizer`, unless it is there, and tokenize into the cache of `datasets`,
    where the runs find it.

    Returns:
        What was read, its size in tokens, and a hash of the tokens.

    Raises:
        SettingsError: nothing to train on or to validate with, or other tokens than the study began with.
    """
    corpus = load_corpus(recipe.data)
    if corpus.validation is None:
        raise SettingsError("a study needs validation text: name a --validation_file, or set --validation_percent.")
    folder = output_dir / TOKENIZER_FOLDER
    if not folder.is_dir():
        tokenizer, origin = load_tokenizer(recipe.model, config, corpus, None)
        print(f"tokenizer: {origin}, {len(tokenizer)} tokens", flush=True)
        unfinished = folder.with_name(f"_{TOKENIZER_FOLDER}")
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    # Read from there even now: what the runs read is then found in the cache, whose key is the tokenizer's state.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    block_size = choose_block_size(recipe.data.block_size, config)
    train, validation = pack_corpus(corpus, tokenizer, block_size, recipe)
    # the hash is of the whole validation text, whichever examples of it are used
    digest = _hash(train, getattr(validation, "dataset", validation))
    values = (corpus.description, len(tokenizer), block_size, train.num_tokens, len(validation), digest)
    facts = dict(zip(FACTS, values, strict=True))
    require_same_beginning(output_dir / DATA_FILE, facts, "data")
    return facts


def _hash(*parts: PackedBlocks) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for chunk in part.chunks:
            digest.update(chunk.tobytes())
    return digest.hexdigest()

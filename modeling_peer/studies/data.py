# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The tokens that all runs of a study train on.

They are made once. A study that is continued uses the same tokens.
"""

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
# What this file records.
FACTS = ("data", "vocab_size", "block_size", "training_tokens", "validation_examples", "tokens_sha256")


def prepare_data(recipe: Recipe, config: PreTrainedConfig, output_dir: Path) -> dict[str, Any]:
    """Train the tokenizer if `output_dir/tokenizer` does not exist, and tokenize the text.

    The tokens go into the cache of `datasets`, where the runs find them.

    Returns:
        The facts named in `FACTS`: description of the text, sizes, and a hash of the tokens.

    Raises:
        SettingsError: there is no text to train on or to validate with, or the tokens differ from those that the
            study began with.
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
    # Always loaded from the folder, as the runs do: the key of the cache is the tokenizer's state.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    block_size = choose_block_size(recipe.data.block_size, config)
    train, validation = pack_corpus(corpus, tokenizer, block_size, recipe)
    # Hash the whole validation text, even if only some of its examples are used.
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

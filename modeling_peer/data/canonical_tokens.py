# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokens that mean the same: one id for `Apple`, ` apple` and `APPLE`."""

import re
import unicodedata

import torch
from transformers import PreTrainedTokenizerBase

_SPACE = re.compile(r"\s+")
# What a tokenizer decodes bytes to that are no character by themselves.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def canonical_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> torch.Tensor:
    """The id that stands for each token: the first one whose text is the same but for case, accents and spaces.

    Engram compresses its vocabulary in this way before hashing (arXiv:2601.07372, section 2.2). Special tokens, and
    tokens that are a part of a character, stand for themselves.

    Args:
        vocab_size: rows of the model's embedding; default: tokens of the tokenizer. Ids past its end stand for
            themselves.

    Returns:
        `(vocab_size,)`, int64.

    Raises:
        ValueError: the tokenizer has more tokens than that.
    """
    num_tokens = len(tokenizer)
    vocab_size = num_tokens if vocab_size is None else vocab_size
    if num_tokens > vocab_size:
        raise ValueError(f"the tokenizer has {num_tokens} tokens, but vocab_size is {vocab_size}. Raise vocab_size.")
    canonical, first = torch.arange(vocab_size), {}
    special = set(tokenizer.all_special_ids)
    for token in range(num_tokens):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if token not in special and _INCOMPLETE not in text:
            canonical[token] = first.setdefault(_normalised(text), token)
    return canonical


def _normalised(text: str) -> str:
    """Without case, accents, and spaces around. Of spaces alone one remains, and marks alone stay as they are."""
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(letter for letter in decomposed if unicodedata.category(letter) != "Mn").casefold()
    return _SPACE.sub(" ", plain).strip() or plain[:1] or text

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which tokens of a tokenizer count as the same for a hashed memory."""

import pytest
import torch

from modeling_peer.data.canonical_tokens import canonical_token_ids
from modeling_peer.data.tokenizers import byte_tokenizer, train_byte_level_bpe

WORDS = ("Apple", " apple", "apple", " APPLE", " café", " Cafe", "pear", " ", "  ")


@pytest.fixture(scope="module")
def tokenizer():
    text = " ".join(["Apple apple APPLE café Cafe pear"] * 50)
    tokenizer = train_byte_level_bpe([text], 320)
    tokenizer.add_tokens([word for word in WORDS if len(tokenizer.encode(word)) > 1])
    return tokenizer


def test_case_accents_and_spaces_around_do_not_count(tokenizer):
    canonical = canonical_token_ids(tokenizer)

    def of(word):
        (token,) = tokenizer.encode(word, add_special_tokens=False)
        return int(canonical[token])

    assert of("Apple") == of(" apple") == of("apple") == of(" APPLE")
    assert of(" café") == of(" Cafe")
    assert of(" ") == of("  ")
    assert len({of("apple"), of(" café"), of("pear"), of(" ")}) == 4


def test_an_id_stands_for_itself_or_for_later_ones(tokenizer):
    canonical = canonical_token_ids(tokenizer, len(tokenizer) + 5)
    assert torch.equal(canonical[canonical], canonical)
    assert (canonical <= torch.arange(len(canonical))).all()
    assert canonical[-5:].tolist() == list(range(len(tokenizer), len(tokenizer) + 5))
    for token in tokenizer.all_special_ids:
        assert canonical[token] == token


def test_parts_of_characters_stand_for_themselves():
    tokenizer = byte_tokenizer()
    canonical = canonical_token_ids(tokenizer)
    (high_byte, low_byte) = tokenizer.encode("é", add_special_tokens=False)
    assert canonical[high_byte] == high_byte
    assert canonical[low_byte] == low_byte
    assert canonical[tokenizer.encode("A")[0]] == canonical[tokenizer.encode("a")[0]]


def test_a_vocabulary_too_small_is_refused(tokenizer):
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens, but vocab_size is 9"):
        canonical_token_ids(tokenizer, 9)

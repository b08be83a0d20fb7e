# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers trained on the training text: byte-level BPE, or one token per byte.

Also checks that a tokenizer fits a model, and encodes text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
NUM_BYTES = 256
# merges converge with much less text; more costs time and memory, and gives the same tokens
MAX_TRAINING_CHARACTERS = 50_000_000


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """Learn merges of bytes, most frequent pair first (Sennrich et al. 2016; bytes as in GPT-2).

    Every text can be encoded and decoded again, because all 256 bytes are tokens.

    Args:
        texts: read up to `MAX_TRAINING_CHARACTERS`.
        vocab_size: total number of tokens: special ones, 256 bytes, and merges. Small texts may give fewer.
        with_mask: add a mask token beside the end-of-text token, for masked language models.
    """
    special_tokens = _special_tokens(with_mask)
    smallest = NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least {smallest}: 256 bytes and {', '.join(special_tokens)}."
        )
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    tokenizer.train_from_iterator(_first_characters(texts), trainer)
    return _wrap(tokenizer, with_mask)


def byte_tokenizer(with_mask: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones. It needs no training, and bits per token are bits per byte."""
    special_tokens = _special_tokens(with_mask)
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTES + len(special_tokens),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return _wrap(tokenizer, with_mask)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens. A text such as `<|endoftext|>` is encoded as text.

    Most tokenizers have an option for that (`split_special_tokens`). If one finds special tokens anyway, the text is
    cut inside them.

    Raises:
        ValueError: the tokenizer still turns text into a special token, or a text is not Unicode.
    """
    for text in texts:
        require_whole_characters(text)
    rows = _encode(tokenizer, list(texts)) if texts else []
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for position, text in enumerate(texts):
        if _special_tokens_found(rows[position], text, special, tokenizer):
            parts = _cut_within(text, special.values())
            rows[position] = [i for row in _encode(tokenizer, parts) for i in row]
            if found := _special_tokens_found(rows[position], text, special, tokenizer):
                raise ValueError(
                    f"{type(tokenizer).__name__} reads {', '.join(map(repr, sorted(found)))} in a text as special "
                    "tokens, and does not support split_special_tokens=True. Use its fast version (tokenizers), "
                    "or remove them from the text."
                )
    return rows


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """`encode_texts` of one text, with the special tokens that the tokenizer adds around it."""
    ids = encode_texts(tokenizer, [prompt])[0]
    # if the text had to be cut, the tokenizer cannot add special tokens around it
    return _encode(tokenizer, [prompt], True)[0] if ids == _encode(tokenizer, [prompt])[0] else ids


def require_whole_characters(text: str) -> None:
    """Raise ValueError if a text has a surrogate: half a character, which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text holds half a character, {error.object[error.start]!a} at {error.start}, which UTF-8 cannot "
            'encode. Decode its file with errors="replace", or remove it.'
        ) from error


def _encode(tokenizer, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    try:
        return tokenizer(texts, split_special_tokens=True, **options)["input_ids"]
    except (TypeError, ValueError):  # the tokenizer of Mistral has no such option, and always encodes text as text
        return tokenizer(texts, **options)["input_ids"]


def _special_tokens_found(row: list[int], text: str, special: dict[int, str], tokenizer) -> set[str]:
    # the unknown token counts only if the text names it; otherwise it stands for an unknown character
    return {special[i] for i in special.keys() & set(row) if i != tokenizer.unk_token_id or special[i] in text}


def _cut_within(text: str, tokens: Iterable[str]) -> list[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    ends = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, longest_first)), text)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def _special_tokens(with_mask: bool) -> list[str]:
    return [END_OF_TEXT, MASK] if with_mask else [END_OF_TEXT]


def _empty_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, with_mask: bool) -> PreTrainedTokenizerFast:
    # one token for begin, end and padding: packed blocks have no padding, and each text follows the end of another
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK if with_mask else None,
        clean_up_tokenization_spaces=False,
    )


def _first_characters(texts: Iterable[str]) -> Iterator[str]:
    left = MAX_TRAINING_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return

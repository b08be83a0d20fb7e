# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Packing: the tokens of all documents in sequence, cut into blocks of equal length, without padding."""

from bisect import bisect_right
from itertools import accumulate

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import ENDS_DOCUMENT
from modeling_peer.data.tokenizers import encode_texts

# `datasets` caches tokens by the arguments of `tokenize`, not by its code. Increase this number with every change.
TOKENIZATION = 2


class PackedBlocks(torch.utils.data.Dataset):
    """A view of tokenized rows as blocks of `block_size` tokens. Only an incomplete last block is dropped.

    The tokens stay in the data set's storage (memory-mapped on disk). A block is cut out when it is read.

    Args:
        rows: a data set with a column `input_ids`, as `tokenize` returns it.
        block_size: tokens per example.

    Raises:
        SettingsError: there are fewer tokens than one block.
    """

    def __init__(self, rows: datasets.Dataset, block_size: int, name: str = "training"):
        column = rows.with_format("arrow")[:]["input_ids"]  # views, not copies
        # .flatten() and not .values: for a slice, the latter returns the whole array
        self.chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self.starts = [0, *accumulate(len(chunk) for chunk in self.chunks)]
        self.block_size = block_size
        if self.num_tokens < block_size:
            raise SettingsError(
                f"the {name} text has {self.num_tokens} tokens, less than one block of {block_size}. "
                f"Give more text{' (--validation_percent)' if name == 'validation' else ''}, "
                f"or set --block_size to at most {self.num_tokens}."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, including those of an incomplete last block."""
        return self.starts[-1]

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin, end = index * self.block_size, (index + 1) * self.block_size
        parts = []
        chunk = bisect_right(self.starts, begin) - 1
        while begin < end:
            start = self.starts[chunk]
            part = self.chunks[chunk][begin - start : end - start]
            parts.append(part)
            begin += len(part)
            chunk += 1
        input_ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}  # the model shifts the labels

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Number of occurrences of each token: `(vocab_size,)`, int64."""
        return sum(np.bincount(chunk, minlength=vocab_size) for chunk in self.chunks)


def pack(
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str = "text",
    rows_are_lines: bool = False,
    num_workers: int | None = None,
    name: str = "training",
) -> PackedBlocks | datasets.IterableDataset:
    """Tokenize rows and cut the tokens into blocks: `{"input_ids": (block_size,), "labels": (block_size,)}`, int64.

    A stream remains a stream. There, an incomplete block is dropped every 1,000 rows instead of once.
    """
    settings = {"tokenizer": tokenizer, "text_column": text_column, "rows_are_lines": rows_are_lines}
    settings["version"] = TOKENIZATION
    columns = rows.column_names or list(next(iter(rows)))
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.map(tokenize, batched=True, remove_columns=columns, fn_kwargs=settings)
        return rows.map(_cut, batched=True, remove_columns=["input_ids"], fn_kwargs={"block_size": block_size})
    rows = rows.map(
        tokenize,
        batched=True,
        remove_columns=columns,
        fn_kwargs=settings,
        num_proc=num_workers,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        desc=f"Tokenizing {name} text",
    )
    return PackedBlocks(rows, block_size, name)


def tokenize(
    batch: dict,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    rows_are_lines: bool,
    version: int = TOKENIZATION,
) -> dict:
    """Token ids of each row, with the tokenizer's end-of-text token, if it has one, at the end of each document.

    That token occurs nowhere else: a document that mentions it does not end there.
    """
    texts = [text or "" for text in batch[text_column]]
    ends = batch.get(ENDS_DOCUMENT) or [not rows_are_lines] * len(texts)
    ids = encode_texts(tokenizer, texts)
    if tokenizer.eos_token_id is not None:
        ids = [[*row, tokenizer.eos_token_id] if end else row for row, end in zip(ids, ends, strict=True)]
    return {"input_ids": ids}


def _cut(batch: dict, block_size: int) -> dict:
    tokens = [token for row in batch["input_ids"] for token in row]
    blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

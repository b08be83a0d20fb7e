# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""From text to tokens to blocks: nothing lost, nothing added but the ends of documents."""

import json

import datasets
import numpy as np
import pytest
from training_helpers import private_cache, some_text  # noqa: F401  a fixture

from modeling_peer.console.errors import SettingsError
from modeling_peer.data import packing
from modeling_peer.data.corpus import DataArguments, load_corpus
from modeling_peer.data.packing import PackedBlocks, pack
from modeling_peer.data.tokenizers import byte_tokenizer, train_byte_level_bpe

pytestmark = pytest.mark.usefixtures("private_cache")


def documents_corpus(folder, texts, **settings):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return load_corpus(DataArguments(train_file=str(folder / "rows.jsonl"), validation_percent=0.0, **settings))


def test_blocks_are_the_documents_end_to_end_each_closed_by_the_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    texts = ["first", "", "second document", "é"]
    blocks = pack(documents_corpus(tmp_path, texts).train, tokenizer, block_size=4)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert blocks.num_tokens == len(ids)
    packed = [token for block in blocks for token in block["input_ids"].tolist()]
    assert packed == ids[: len(ids) // 4 * 4]
    assert all(block["labels"].tolist() == block["input_ids"].tolist() for block in blocks)


def test_lines_of_one_text_are_not_closed(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["one\n", None, "two\n"]})
    blocks = pack(rows, byte_tokenizer(), block_size=8, rows_are_lines=True)
    assert byte_tokenizer().decode(blocks[0]["input_ids"]) == "one\ntwo\n"
    assert blocks.num_tokens == 8


@pytest.mark.parametrize("block_size", [2, 7, 30, 31])  # within a chunk, across one boundary, across several, all
def test_a_block_may_span_the_chunks_that_a_data_set_is_stored_in(block_size):
    pieces = [datasets.Dataset.from_dict({"input_ids": [list(range(i, i + 5)), [i]]}) for i in (0, 10, 20, 30, 40)]
    rows = datasets.concatenate_datasets(pieces).select(range(10))
    rows = datasets.concatenate_datasets([rows, datasets.Dataset.from_dict({"input_ids": [[99]]})])
    flat = [token for row in rows["input_ids"] for token in row]
    blocks = PackedBlocks(rows, block_size)
    expected = [flat[i : i + block_size] for i in range(0, len(flat) - block_size + 1, block_size)]
    assert [block["input_ids"].tolist() for block in blocks] == expected
    assert blocks.token_counts(100).tolist() == np.bincount(flat, minlength=100).tolist()


def test_held_out_rows_are_not_in_the_training_blocks(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": c * 10}) for c in "abcdefghij"))
    corpus = load_corpus(DataArguments(train_file=str(tmp_path / "rows.jsonl"), validation_percent=20))
    tokenizer = byte_tokenizer()
    text = tokenizer.decode([t for b in pack(corpus.validation, tokenizer, 11) for t in b["input_ids"]])
    assert set(text.replace(tokenizer.eos_token, "")) == {"i", "j"}
    text = tokenizer.decode([t for b in pack(corpus.train, tokenizer, 11) for t in b["input_ids"]])
    assert set(text.replace(tokenizer.eos_token, "")) == set("abcdefgh")


def test_a_stream_gives_the_same_blocks_as_the_stored_text(tmp_path):
    tokenizer = byte_tokenizer()
    texts = [some_text(50, seed) for seed in range(5)]
    stored = pack(documents_corpus(tmp_path, texts).train, tokenizer, 32)
    stream = pack(documents_corpus(tmp_path, texts, streaming=True).train, tokenizer, 32)
    assert [list(b["input_ids"]) for b in stream] == [b["input_ids"].tolist() for b in stored]


def test_tokens_that_an_older_release_kept_on_disk_are_not_taken_for_todays(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": ["abcd"] * 3}).save_to_disk(tmp_path / "rows")
    today = byte_tokenizer()
    with monkeypatch.context() as older:
        older.setattr(packing, "TOKENIZATION", packing.TOKENIZATION - 1)
        older.setattr(packing, "encode_texts", lambda tokenizer, texts: [[7, 7] for _ in texts])
        assert pack(datasets.load_from_disk(tmp_path / "rows"), today, 3)[0]["input_ids"].tolist()[:2] == [7, 7]
    blocks = pack(datasets.load_from_disk(tmp_path / "rows"), today, 4)
    assert today.decode(blocks[0]["input_ids"]) == "abcd"


def test_text_shorter_than_a_block_is_refused_with_both_numbers(tmp_path):
    corpus = documents_corpus(tmp_path, ["abc"])
    with pytest.raises(SettingsError, match=r"has 4 tokens, less than one block of 16.*--block_size to at most 4"):
        pack(corpus.train, byte_tokenizer(), 16)


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_byte_level_tokenizers_give_every_text_back(vocab_size):
    tokenizer = train_byte_level_bpe([some_text()], vocab_size) if vocab_size > 257 else byte_tokenizer()
    text = "tab\t, two  spaces, \r\n, naïve café, 漢字 🙂, \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == vocab_size
    num_tokens = len(tokenizer(some_text())["input_ids"])
    num_bytes = len(some_text().encode("utf-8"))
    assert num_tokens == num_bytes if vocab_size == 257 else num_tokens < num_bytes / 2


def test_learning_a_tokenizer_twice_gives_the_same_tokens():
    first, second = (train_byte_level_bpe([some_text()], 300).get_vocab() for _ in range(2))
    assert first == second


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size \(200\) must be at least 257"):
        train_byte_level_bpe(["text"], 200)

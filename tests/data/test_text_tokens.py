# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Text is data: whatever it says, its bytes become tokens, and no special token comes of it."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.packing import tokenize
from modeling_peer.data.tokenizers import (
    byte_tokenizer,
    encode_prompt,
    encode_texts,
    train_byte_level_bpe,
)
from modeling_peer.evaluation import perplexity
from modeling_peer.evaluation.generation import GenerationArguments, continue_texts
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.evaluation.unigram import unigram_bits_per_byte

TEXTS = [
    "tokens such as <|endoftext|> close a document",
    "<|endoftext|>",
    "<|mask|><|endoftext|><|mask|>",
    "almost: <|endoftext| |endoftext|> <<|mask|>>",
    " a space before",
    "  \t\r\n and blanks after \n",
    "\ufeffa mark of byte order",
    "\x00 and \x00\x7f",
    "🙂👩‍👩‍👧 naïve 漢字",
    "e\u0301 is not é",
    "",
]


class Disobedient(PreTrainedTokenizerFast):
    """Finds special tokens whatever it is asked, as tokenizers that come with checkpoints do."""

    def _encode_plus(self, *args, split_special_tokens=None, **kwargs):
        return super()._encode_plus(*args, split_special_tokens=False, **kwargs)


class WithoutTheOption(PreTrainedTokenizerFast):
    """Refuses to be asked, and finds special tokens."""

    def _encode_plus(self, *args, split_special_tokens=None, **kwargs):
        if split_special_tokens:
            raise ValueError("split_special_tokens is not supported")
        return super()._encode_plus(*args, **kwargs)


def reloaded(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def gpt2_like(kind=PreTrainedTokenizerFast):
    """As of GPT-2: one token is unknown, begins and ends."""
    backend = byte_tokenizer()._tokenizer
    token = "<|endoftext|>"
    return kind(tokenizer_object=backend, bos_token=token, eos_token=token, unk_token=token)


def llama_like():
    """As of Llama: bytes that no token has are tokens of their own, and a space comes before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<|endoftext|>", "<|mask|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(["the text that it knows: <|>_ endoftext mask " * 9], trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    words.add_special_tokens({"mask_token": "<|mask|>"})
    return words


TOKENIZERS = {
    "bytes": lambda folder: byte_tokenizer(with_mask=True),
    "trained": lambda folder: train_byte_level_bpe(TEXTS * 9, 400, with_mask=True),
    "bytes, reloaded": lambda folder: reloaded(folder, byte_tokenizer(with_mask=True)),
    "trained, reloaded": lambda folder: reloaded(folder, train_byte_level_bpe(TEXTS * 9, 400, with_mask=True)),
    "GPT-2's kind": lambda folder: gpt2_like(),
    "one that disobeys": lambda folder: gpt2_like(Disobedient),
    "one that cannot be asked": lambda folder: gpt2_like(WithoutTheOption),
}


@pytest.fixture(params=TOKENIZERS, ids=str)
def tokenizer(request, tmp_path):
    return TOKENIZERS[request.param](tmp_path)


def test_every_text_comes_back_from_its_tokens_and_ends_once(tokenizer):
    rows = tokenize({"text": TEXTS}, tokenizer, "text", False)["input_ids"]
    for text, row in zip(TEXTS, rows, strict=True):
        assert row[-1] == tokenizer.eos_token_id
        assert not set(row[:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(row[:-1], clean_up_tokenization_spaces=False) == text
        if len(tokenizer) < 260:
            assert len(row) - 1 == len(text.encode("utf-8")), "one token a byte"


def test_asking_for_text_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer("a<|endoftext|>")["input_ids"]
    encode_texts(tokenizer, TEXTS)
    assert tokenizer("a<|endoftext|>")["input_ids"] == before
    assert encode_texts(tokenizer, []) == []


def test_a_tokenizer_of_llamas_kind_reads_special_tokens_as_text_too():
    words = llama_like()
    for text, row in zip(TEXTS[:4], encode_texts(words, TEXTS[:4]), strict=True):
        assert not set(row) & {words.eos_token_id, words.mask_token_id}
        assert words.decode(row) == text


def test_tokens_that_somebody_added_and_that_are_not_special_stay_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    (row,) = encode_texts(tokenizer, ["<tool><|endoftext|>"])
    assert row[0] == tokenizer.convert_tokens_to_ids("<tool>")
    assert len(row) == 1 + len("<|endoftext|>")


def test_a_special_token_that_cannot_be_read_as_text_is_refused_by_name():
    tokenizer = gpt2_like(Disobedient)
    tokenizer.add_special_tokens({"sep_token": "|"})  # too short to be cut
    with pytest.raises(ValueError, match=r"Disobedient reads '\|' in a text as special tokens"):
        encode_texts(tokenizer, ["a|b"])


@pytest.mark.parametrize("text", ["\ud83d", "a\udc80b"])
def test_half_a_character_is_refused_wherever_text_becomes_tokens(text):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"half a character, '.u[0-9a-f]{4}' at"):
        encode_texts(tokenizer, ["fine", text])
    with pytest.raises(SettingsError, match="--prompt: a text holds half a character"):
        continue_texts(model(), tokenizer, [text], GenerationArguments(model="unused"))


def model(vocab_size=300):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    peer = {"num_sub_keys": 4, "num_retrieval_heads": 1, "num_experts_per_head": 2, "query_dim": 8}
    return PeerForCausalLM(PeerConfig(vocab_size=vocab_size, num_key_value_heads=1, **sizes, **peer)).eval()


@pytest.mark.parametrize("kind", ["bytes", "GPT-2's kind"])
def test_bits_per_byte_are_of_every_byte_that_the_text_has(tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    network = model(300)
    torch.nn.init.zeros_(network.lm_head.weight)
    num_bytes = sum(len(text.encode("utf-8")) for text in TEXTS)
    measured = CausalPerplexity().compute(data=TEXTS, model=network, tokenizer=tokenizer, show_progress=False)
    assert measured["num_bytes"] == measured["num_tokens"] == num_bytes
    assert measured["bits_per_byte"] == pytest.approx(math.log2(300))
    baseline = unigram_bits_per_byte(np.zeros(len(tokenizer)), TEXTS, tokenizer)  # all tokens alike
    assert baseline == pytest.approx(math.log2(len(tokenizer)))


def test_perplexity_refuses_a_tokenizer_that_would_leave_bytes_out():
    with pytest.raises(ValueError, match=r"Disobedient reads '<\|endoftext\|>' in a text as special tokens"):
        CausalPerplexity().compute(data=TEXTS, model=model(), tokenizer=gpt2_like(Disobedient))


@pytest.mark.parametrize("text", ["🙂", "é", "a", "\ufffd", " x"])
@pytest.mark.parametrize("build", [lambda: byte_tokenizer()._tokenizer, lambda: llama_like()._tokenizer])
def test_the_token_that_is_context_only_counts_the_bytes_that_it_has(text, build):
    # without a start token: the first byte of a character is one byte, though alone it decodes to a mark of three
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build())
    tokens, scored = perplexity._with_start_token(text + "bc", tokenizer)
    first = tokenizer.convert_ids_to_tokens(tokens[0])
    if first.startswith("▁"):  # the space that this kind puts before a text is no byte of it
        assert scored <= len((text + "bc").encode("utf-8"))
    else:
        assert scored == len((text + "bc").encode("utf-8")) - 1


def test_a_prompt_is_text_and_has_around_it_what_the_tokenizer_puts_there(tokenizer):
    ids = encode_prompt(tokenizer, "ask <|endoftext|>")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "ask <|endoftext|>"
    with_start = llama_like()
    with_start._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", with_start.eos_token_id)]
    )
    ids = encode_prompt(with_start, "ask <|endoftext|>")
    assert ids[0] == with_start.eos_token_id
    assert ids.count(with_start.eos_token_id) == 1
    assert with_start.decode(ids, skip_special_tokens=True) == "ask <|endoftext|>"


def test_a_continuation_begins_with_the_prompt_as_it_was_written():
    arguments = GenerationArguments(model="unused", max_new_tokens=1)
    (text,) = continue_texts(model(257), byte_tokenizer(), ["a <|endoftext|> b"], arguments)
    assert text.startswith("a <|endoftext|> b")

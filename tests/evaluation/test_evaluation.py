# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Perplexity and bits per byte against a dumb oracle, for PEER and for models that are not ours."""

import math

import evaluate
import numpy as np
import pytest
import torch
from training_helpers import REPOSITORY, TINY_LLAMA, TINY_PEER
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from modeling_peer import PeerConfig
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.evaluation.unigram import unigram_bits_per_byte

PEER_CONFIG = PeerConfig(**{name: value for name, value in TINY_PEER.items() if name != "model_type"})
LLAMA_CONFIG = LlamaConfig(**{name: value for name, value in TINY_LLAMA.items() if name != "model_type"})
GPT2_CONFIG = GPT2Config(
    vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
)
TEXTS = ["The cat sat.\n", "", "naïve café", "x"]


def build(kind):
    config = {"peer": PEER_CONFIG, "llama": LLAMA_CONFIG, "gpt2": GPT2_CONFIG}[kind]
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def nats_one_token_at_a_time(model, tokenizer, text, context_length, stride):
    """Oracle: one forward pass for each token, on the context that the window rule gives it."""
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    nats = 0.0
    for position in range(1, len(ids)):  # the token to predict
        begin = 0
        while position > begin + context_length:
            begin += stride
        logits = model(torch.tensor([ids[begin:position]])).logits[0, -1]
        nats -= torch.log_softmax(logits.double(), -1)[ids[position]].item()
    return nats


@pytest.mark.parametrize("kind", ["peer", "llama", "gpt2"])
@pytest.mark.parametrize(
    ("context_length", "stride"),
    [
        (64, 32),  # every text fits one window
        (5, 2),  # windows overlap, the stride does not divide the length
        (4, 4),  # no overlap
        (3, 1),  # as much context as the window allows
    ],
)
def test_every_token_is_scored_once_with_the_context_before_it(kind, context_length, stride):
    model, tokenizer = build(kind).eval(), byte_tokenizer()
    nats = sum(nats_one_token_at_a_time(model, tokenizer, text, context_length, stride) for text in TEXTS)
    num_bytes = sum(len(text.encode("utf-8")) for text in TEXTS)
    measured = CausalPerplexity().compute(
        data=TEXTS, model=model, tokenizer=tokenizer, context_length=context_length, stride=stride, batch_size=3
    )
    assert measured["num_tokens"] == measured["num_bytes"] == num_bytes  # one token a byte
    # float32 logits of batched and single passes differ in the last bits
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary():
    model = build("peer")
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = CausalPerplexity().compute(data=["é" * 50], model=model, tokenizer=byte_tokenizer())
    assert measured["perplexity"] == pytest.approx(300)
    assert measured["bits_per_byte"] == pytest.approx(math.log2(300))
    assert measured["num_bytes"] == 100


def test_evaluate_loads_the_measurement_from_its_file_and_a_model_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = str(REPOSITORY / "modeling_peer" / "evaluation" / "perplexity.py")
    loaded = evaluate.load(path, module_type="measurement")
    settings = {"data": TEXTS, "context_length": 8, "show_progress": False}
    from_folder = loaded.compute(model=str(tmp_path / "model"), **settings)
    direct = CausalPerplexity().compute(model=model, tokenizer=byte_tokenizer(), **settings)
    assert from_folder == pytest.approx(direct)


def test_scoring_leaves_the_model_in_its_mode_and_its_statistics_alone():
    model = build("peer").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CausalPerplexity().compute(data=TEXTS, model=model, tokenizer=byte_tokenizer())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_start_token_the_first_token_and_its_bytes_are_not_counted():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer)
    measured = CausalPerplexity().compute(data=["abc", "d", "ef"], model=build("llama"), tokenizer=tokenizer)
    assert (measured["num_tokens"], measured["num_bytes"]) == (3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 9, "context_length": 8}, r"stride \(9\) must be from 1 to context_length \(8\)"),
        ({"stride": -1}, r"stride \(-1\) must be from 1"),
        ({"context_length": 65}, r"context_length \(65\) exceeds the model's 64 positions"),
        ({"context_length": 0}, r"context_length \(0\) must be at least 1"),
        ({"stride": 0}, r"stride \(0\) must be from 1"),
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"data": [""]}, "nothing to score in 1 text: each is empty"),
        ({"tokenizer": None}, "needs its tokenizer too"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_numbers(settings, message):
    defaults = {"data": TEXTS, "model": build("llama"), "tokenizer": byte_tokenizer()}
    with pytest.raises(ValueError, match=message):
        CausalPerplexity().compute(**{**defaults, **settings})


@pytest.mark.parametrize("logit", [math.nan, math.inf, 1e30])
def test_a_model_that_diverged_has_no_perplexity(logit):
    model = build("llama")
    torch.nn.init.constant_(model.lm_head.weight, logit)
    model.lm_head.weight.data[1::2].neg_()
    with pytest.raises(ValueError, match="nats per token: the model diverged"):
        CausalPerplexity().compute(data=["abcdefgh"], model=model, tokenizer=byte_tokenizer())


def test_a_model_without_a_number_of_positions_takes_any_context():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2))
    settings = {"data": ["abc"], "model": model, "tokenizer": byte_tokenizer()}
    assert CausalPerplexity().compute(**settings)["context_length"] == 1024
    assert CausalPerplexity().compute(**settings, context_length=2000)["context_length"] == 2000


def test_unigram_bits_per_byte_is_the_entropy_of_the_counts():
    tokenizer = byte_tokenizer()
    counts = np.zeros(257, dtype=np.int64)
    ids = tokenizer("aab")["input_ids"]
    np.add.at(counts, ids, 1)
    # add-one smoothing: a has 3 of 260, b 2 of 260
    expected = -(2 * math.log2(3 / 260) + math.log2(2 / 260)) / 3
    assert unigram_bits_per_byte(counts, ["aab", ""], tokenizer) == pytest.approx(expected)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Transformers' text pipelines on a saved checkpoint: each gives what its model computes."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import modeling_peer
from modeling_peer.data.tokenizers import byte_tokenizer

TEXTS = ["PEER retrieves experts.", "One neuron each, a million of them!"]


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """Saves a model of this class with a tokenizer; returns the folder and the model."""

    def build(class_name, **fields):
        tokenizer = byte_tokenizer(with_mask="is_causal" in fields)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = tiny_config(vocab_size=len(tokenizer), num_labels=3, initializer_range=0.3, **special, **fields)
        model = getattr(modeling_peer, class_name)(config).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path), model

    return build


@torch.no_grad()
def outputs_of(model, folder, text):
    return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt"))


def test_text_generation(checkpoint):
    folder, model = checkpoint("PeerForCausalLM")
    write = pipeline("text-generation", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, (written,) in zip(TEXTS, write(TEXTS, max_new_tokens=5, do_sample=False, batch_size=2), strict=True):
        prompt = tokenizer(text, return_tensors="pt")
        (tokens,) = model.generate(**prompt, max_new_tokens=5, do_sample=False)
        assert written["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_fill_mask(checkpoint):
    folder, model = checkpoint("PeerForMaskedLM", is_causal=False)
    fill = pipeline("fill-mask", folder)
    text = f"PEER retrieves{fill.tokenizer.mask_token}experts."
    place = fill.tokenizer(text)["input_ids"].index(fill.tokenizer.mask_token_id)
    scores = outputs_of(model, folder, text).logits[0, place].softmax(-1)
    best = fill(text, top_k=4)
    assert [entry["token"] for entry in best] == scores.topk(4).indices.tolist()
    assert [entry["score"] for entry in best] == pytest.approx(scores.topk(4).values.tolist(), rel=1e-4)


def test_text_classification(checkpoint):
    folder, model = checkpoint("PeerForSequenceClassification")
    classify = pipeline("text-classification", folder)
    for text, found in zip(TEXTS, classify(TEXTS, top_k=None, batch_size=2), strict=True):
        scores = outputs_of(model, folder, text).logits[0].softmax(-1)
        expected = {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)


def test_token_classification(checkpoint):
    folder, model = checkpoint("PeerForTokenClassification")
    label_tokens = pipeline("token-classification", folder)
    for text in TEXTS:
        scores, labels = outputs_of(model, folder, text).logits[0].softmax(-1).max(-1)
        found = label_tokens(text, ignore_labels=[])
        assert [entry["entity"] for entry in found] == [model.config.id2label[label] for label in labels.tolist()]
        assert [entry["score"] for entry in found] == pytest.approx(scores.tolist(), abs=1e-5)


def test_feature_extraction(checkpoint):
    folder, model = checkpoint("PeerModel")
    for text in TEXTS:
        features = torch.tensor(pipeline("feature-extraction", folder)(text))
        torch.testing.assert_close(features, outputs_of(model, folder, text).last_hidden_state, rtol=1e-4, atol=1e-5)

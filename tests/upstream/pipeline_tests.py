# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Stands in for `tests/pipelines/`: what each text pipeline must return for a tiny model.

`PipelineTesterMixin` loads the model and its tokenizer, asks for a pipeline and examples, checks one by one through
`run_pipeline_test`, then runs the examples in batches itself.
"""

import math

import pytest
from transformers import pipeline

HALF_PRECISION = 2e-3  # three probabilities, each rounded to the 11 bits of a float16


class _PipelineTests:
    task = None
    examples = ["PEER retrieves experts.", "One neuron each, a million of them!"]
    options = {}

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        made = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **processors, **self.options)
        return made, self.examples


class FeatureExtractionPipelineTests(_PipelineTests):
    task = "feature-extraction"

    def run_pipeline_test(self, features, examples):
        for text in examples:
            (rows,) = features(text)
            assert len(rows) == len(features.tokenizer(text)["input_ids"])
            assert all(len(row) == features.model.config.hidden_size for row in rows)
            assert all(math.isfinite(value) for row in rows for value in row)


class TextClassificationPipelineTests(_PipelineTests):
    task = "text-classification"

    def run_pipeline_test(self, classify, examples):
        labels = set(classify.model.config.id2label.values())
        for scores in classify(examples, top_k=None):
            assert {entry["label"] for entry in scores} == labels
            assert sum(entry["score"] for entry in scores) == pytest.approx(1.0, abs=HALF_PRECISION)
        best = classify(examples[0])[0]
        assert best == classify(examples[0], top_k=None)[0]


class TokenClassificationPipelineTests(_PipelineTests):
    task = "token-classification"

    def run_pipeline_test(self, label_tokens, examples):
        labels = set(label_tokens.model.config.id2label.values())
        for text in examples:
            entities = label_tokens(text, ignore_labels=[])
            assert len(entities) == len(label_tokens.tokenizer(text)["input_ids"])
            for entity in entities:
                assert entity["entity"] in labels
                assert 0.0 <= entity["score"] <= 1.0
            spans = label_tokens(text, aggregation_strategy="simple", ignore_labels=[])
            assert (spans[0]["start"], spans[-1]["end"]) == (0, len(text))


class TextGenerationPipelineTests(_PipelineTests):
    task = "text-generation"

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        # short, and never cut by an end-of-sequence token that a random model may emit
        model.generation_config.update(max_new_tokens=4, eos_token_id=None, do_sample=False)
        return super().get_test_pipeline(model, tokenizer, dtype=dtype, **processors)

    def run_pipeline_test(self, generate, examples):
        for text in examples:
            ((full,), (new,)) = (generate(text), generate(text, return_full_text=False))
            assert full["generated_text"] == text + new["generated_text"]
            (tokens,) = generate(text, return_tensors=True)
            prompt = generate.tokenizer(text)["input_ids"]
            assert tokens["generated_token_ids"][: len(prompt)] == prompt
            assert len(tokens["generated_token_ids"]) == len(prompt) + 4
        sampled = generate(examples[0], do_sample=True, num_return_sequences=3)
        assert len(sampled) == 3


class ZeroShotClassificationPipelineTests(_PipelineTests):
    task = "zero-shot-classification"
    candidate_labels = ["physics", "poetry", "sport"]
    options = {"candidate_labels": candidate_labels}

    def run_pipeline_test(self, classify, examples):
        for result in classify(examples):
            assert set(result["labels"]) == set(self.candidate_labels)
            assert sum(result["scores"]) == pytest.approx(1.0, abs=HALF_PRECISION)
            assert result["scores"] == sorted(result["scores"], reverse=True)
        independent = classify(examples[0], multi_label=True)
        assert all(0.0 <= score <= 1.0 for score in independent["scores"])

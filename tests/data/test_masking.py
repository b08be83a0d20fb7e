# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Masked language models: what is masked, how it is scored, and a run from text to a model that fills masks."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from training_helpers import (
    TINY_PEER,
    logged_losses,
    private_cache,  # noqa: F401  a fixture
    run_script,
    some_text,
    train,
    write_inputs,
)
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

from modeling_peer import PeerForMaskedLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.masking import MaskedBlocks
from modeling_peer.data.tokenizers import END_OF_TEXT, MASK, byte_tokenizer, train_byte_level_bpe
from modeling_peer.evaluation.masked_perplexity import masked_perplexity

pytestmark = pytest.mark.usefixtures("private_cache")
TINY_SOFT_MOE = TINY_PEER | {"is_causal": False, "sparse_mlp": "soft_moe", "num_moe_experts": 4}


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path, TINY_PEER | {"is_causal": False})


@pytest.fixture
def blocks():
    """40 blocks of 64 tokens, each with an end of text."""
    tokens = torch.randint(10, 250, (40, 64))
    tokens[:, 7] = 0
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


@pytest.mark.parametrize("make", [byte_tokenizer, partial(train_byte_level_bpe, [some_text()], 300)])
def test_a_tokenizer_has_a_mask_where_it_is_asked_for(make):
    tokenizer = make(with_mask=True)
    assert tokenizer.mask_token == MASK
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [END_OF_TEXT, MASK]
    assert tokenizer.decode(tokenizer("naïve café")["input_ids"]) == "naïve café"
    assert make().mask_token is None


def test_masks_follow_from_seed_epoch_and_block_alone(blocks):
    def masked(seed=0, epoch=0, order=range(40)):
        examples = MaskedBlocks(blocks, byte_tokenizer(with_mask=True), 0.3, seed)
        examples.epoch = epoch
        rows = {index: examples[index] for index in order}
        return [torch.stack([rows[index][name] for index in range(40)]) for name in ("input_ids", "labels")]

    input_ids, labels = masked()
    original = torch.stack([block["input_ids"] for block in blocks])
    assert all(map(torch.equal, masked(order=reversed(range(40))), (input_ids, labels)))
    for other in (masked(seed=1), masked(epoch=1)):
        assert not torch.equal(other[1], labels)
    chosen = labels != -100
    assert torch.equal(labels[chosen], original[chosen])
    assert torch.equal(input_ids[~chosen], original[~chosen])
    assert not chosen[:, 7].any()
    assert chosen.float().mean() == pytest.approx(0.3, abs=0.04)
    # 80 % are the mask, and half of the others what they were
    assert (input_ids[chosen] == 1).float().mean() == pytest.approx(0.8, abs=0.06)
    assert (input_ids[chosen] == original[chosen]).float().mean() == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 1.0])
def test_every_token_is_scored_once_by_what_stays_visible(blocks, share):
    num_rounds = math.ceil(1 / share)
    tokens = torch.stack([block["input_ids"] for block in blocks])
    batches = [tokens[start : start + 16] for start in (0, 16, 32) for _ in range(num_rounds)]
    seen = []

    class Model(torch.nn.Module):
        """Half of the likelihood for the right token."""

        device = torch.device("cpu")

        def forward(self, input_ids):
            truth = batches[len(seen)]
            seen.append(input_ids == 1)
            assert torch.equal(input_ids, truth.masked_fill(seen[-1], 1))
            likelihood = torch.full((*input_ids.shape, 250), 0.5 / 249)
            return SimpleNamespace(logits=likelihood.scatter_(-1, truth.unsqueeze(-1), 0.5).log())

    tokenizer = byte_tokenizer(with_mask=True)
    measured = masked_perplexity(Model(), tokenizer, tokens, share, batch_size=16, show_progress=False)
    assert measured == {"perplexity": pytest.approx(2.0), "num_tokens": 40 * 63, "num_rounds": num_rounds}
    for start in range(0, len(seen), num_rounds):
        readings = torch.stack(seen[start : start + num_rounds])
        assert torch.equal(readings.sum(0), (batches[start] != 0).long())  # the end of text is not scored
        assert (readings.float().mean(-1) <= share + 1 / 64).all()


@pytest.mark.parametrize("config", [TINY_PEER | {"is_causal": False}, TINY_SOFT_MOE], ids=["peer", "soft_moe"])
def test_a_run_learns_and_leaves_a_model_that_fills_masks(tmp_path, config):
    words = write_inputs(tmp_path, config)
    out = tmp_path / "out"
    result = train(words, output_dir=out, max_steps=60, eval_strategy="steps", eval_steps=30, masking_probability=0.3)
    assert type(result.model) is PeerForMaskedLM
    losses = logged_losses(out)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.summary["validation_perplexity"] < 40  # of 258 tokens
    assert "validation_bits_per_byte" not in result.summary
    assert math.isfinite(result.summary["eval_loss"])

    assert type(AutoModelForMaskedLM.from_pretrained(out)) is PeerForMaskedLM
    (best, *_) = pipeline("fill-mask", str(out))(f"the cat s{MASK}t on a mat")
    assert best["token_str"] in "abcdefghijklmnopqrstuvwxyz "
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert 'pipeline("fill-mask"' in card.content
    assert "perplexity per masked token" in card.content
    assert "causal" not in card.content.split("## Use")[0]
    with pytest.raises(ValueError, match="PeerForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(out)


def test_evaluations_use_the_same_masks_and_epochs_new_ones(tmp_path, inputs):
    """With a rate of nearly zero, losses change with the masks alone."""
    words = [word for word in inputs if not word.startswith("--learning_rate=")]
    (tmp_path / "text.txt").write_text(some_text(30))  # four blocks, one step: an epoch
    (tmp_path / "held_out.txt").write_text(some_text(100, seed=1))
    options = {"validation_file": tmp_path / "held_out.txt", "eval_strategy": "steps", "eval_steps": 1}
    options |= {"model_overrides": "query_norm=none"}  # running statistics would change, too
    train(words, output_dir=tmp_path / "out", learning_rate=1e-12, max_steps=4, **options)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["epoch"] == 4
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert evaluated == pytest.approx([evaluated[0]] * 4, abs=1e-5)
    assert len({round(loss, 3) for loss in logged_losses(tmp_path / "out")}) == 4


def test_every_epoch_reaches_data_loader_workers_that_stay(blocks):
    examples = MaskedBlocks(blocks, byte_tokenizer(with_mask=True), 0.3)
    loader = torch.utils.data.DataLoader(examples, batch_size=40, num_workers=1, persistent_workers=True)
    labels = []
    for epoch in (0, 1, 0):
        examples.epoch = epoch
        labels += [batch["labels"] for batch in loader]
    assert torch.equal(labels[0], labels[2])
    assert not torch.equal(labels[0], labels[1])


def test_every_block_has_something_to_predict(blocks):
    examples = MaskedBlocks(blocks, byte_tokenizer(with_mask=True), 1e-6)
    for index, block in enumerate(blocks):
        example = examples[index]
        (position,) = (example["labels"] != -100).nonzero()
        assert example["labels"][position] == block["input_ids"][position] != 0
        assert example["input_ids"][position] == 1


def test_text_shorter_than_a_block_is_scored_as_a_shorter_block(tmp_path, inputs):
    summary = train(inputs, output_dir=tmp_path / "out", max_steps=1, max_evaluation_bytes=20).summary
    # the end of text that closes the document is not scored
    assert summary["validation_num_tokens"] == 20


def test_a_resumed_run_sees_the_masks_that_it_would_have_seen(tmp_path, inputs):
    (tmp_path / "text.txt").write_text(some_text(200))
    train(inputs, output_dir=tmp_path / "whole", max_steps=12)
    train(inputs, output_dir=tmp_path / "halves", max_steps=7, save_steps=7)
    train(inputs, output_dir=tmp_path / "halves", max_steps=12, resume_from_checkpoint="last")
    assert logged_losses(tmp_path / "halves") == pytest.approx(logged_losses(tmp_path / "whole"), rel=1e-4)


def test_what_cannot_be_masked_is_refused(tmp_path, inputs):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = [word for word in inputs if not word.startswith("--tokenizer")]
    with pytest.raises(SettingsError, match=r"is_causal=false.*no mask token. Use --tokenizer train or bytes"):
        train(words, output_dir=tmp_path / "a", max_steps=1, tokenizer=tmp_path / "tokenizer")
    with pytest.raises(SettingsError, match="--streaming"):
        train(inputs, output_dir=tmp_path / "b", max_steps=1, streaming=True)
    for share in (0, 1):
        with pytest.raises(SettingsError, match=rf"--masking_probability \({share}.*above 0 and below 1"):
            train(inputs, output_dir=tmp_path / "c", max_steps=1, masking_probability=share)


@pytest.mark.slow
def test_the_plain_loop_says_that_it_masks_nothing(tmp_path, inputs):
    process = run_script("train_lm_accelerate.py", *inputs, "--output_dir", str(tmp_path / "d"), "--max_steps", "1")
    assert process.returncode != 0
    assert "this loop masks nothing" in process.stderr

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PEER says to Transformers what this release calls things, and stops where it cannot."""

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from modeling_peer import PeerForCausalLM
from modeling_peer.transformers_names_peer import (
    CACHE,
    CACHE_NAMES,
    TESTED_RELEASES,
    argument_name,
    require_arguments,
    require_fields,
    require_methods,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "sparse"])).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (2, 12))


@pytest.fixture
def warned():
    """Warnings that Transformers logs, those that it says only once in a process included."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_is_read_and_extended_under_either_name(model, tokens, name, kind, warned):
    cache = kind(config=model.config, max_cache_len=12) if kind is StaticCache else kind(config=model.config)
    expected = model(tokens, use_cache=False).logits
    pieces = [model(piece, **{name: cache}).logits for piece in tokens.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert int(cache.get_seq_length()) == 12
    assert not warned


@torch.no_grad()
def test_generation_uses_no_name_that_this_release_gave_up(model, tokens, warned):
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, eos_token_id=None)
    outputs = model(tokens, use_cache=True)
    assert outputs[CACHE] is getattr(outputs, CACHE)
    assert not [message for message in warned if "deprecated" in message]


def test_one_cache_under_a_known_name(model, tokens):
    cache = DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="not both"):
        model(tokens, cache=cache, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(TypeError, match=rf"kv_store= holds a cache.*pass it as {CACHE}="):
        model(tokens, kv_store=cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_attention_that_forgets_the_cache_is_an_error_and_no_other_text(model, tokens, kind, monkeypatch):
    forward = LlamaAttention.forward

    def of_another_release(self, *args, **kwargs):
        kwargs.pop(CACHE)  # renamed there, and swallowed by **kwargs here
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", of_another_release)
    cache = kind(config=model.config, max_cache_len=32) if kind is StaticCache else kind(config=model.config)
    message = rf"left the cache at 0 tokens, where 0 and 12 new .* transformers {transformers.__version__}"
    with pytest.raises(RuntimeError, match=message):
        model(tokens, **{CACHE: cache})
    with pytest.raises(RuntimeError, match="left the cache"):
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3)
    assert torch.isfinite(model(tokens, use_cache=False).logits).all()


def test_a_cache_that_gradient_checkpointing_takes_away_is_named(model, tokens):
    model.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"gradient checkpointing.*use_cache=False and no cache"):
        model(tokens, **{CACHE: DynamicCache(config=model.config)})
    model(tokens, labels=tokens).loss.backward()


def _renamed(hidden_states, kv_store=None, **kwargs):
    """What a callee of a later release may look like: `**kwargs` takes the old name."""


@pytest.mark.parametrize(
    ("look_up", "missing"),
    [
        (lambda: argument_name(_renamed, *CACHE_NAMES), "_renamed has no argument cache or past_key_values; it has"),
        (lambda: require_arguments(_renamed, "hidden_states", "attention_mask"), "no argument attention_mask"),
        (lambda: require_methods(LlamaAttention, "forward", "extend_cache"), "LlamaAttention has no extend_cache"),
        (lambda: require_fields(transformers.modeling_outputs.BaseModelOutput, "memory"), "has no field memory"),
    ],
)
def test_a_name_that_is_gone_is_refused_with_the_release_and_the_way_out(look_up, missing):
    way_out = rf"transformers {transformers.__version__}.*{missing}.*transformers>=.*update modeling_peer"
    with pytest.raises(ImportError, match=way_out):
        look_up()


def test_the_releases_that_errors_advise_are_those_that_are_supported():
    oldest = re.search(r"transformers>=([\d.]+),", (ROOT / "setup.cfg").read_text())[1]
    newest = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert (oldest, newest) == TESTED_RELEASES


def test_every_method_of_trainer_that_is_overridden_is_looked_up():
    from modeling_peer.training.language_model_trainer import LanguageModelTrainer
    from modeling_peer.training.trainer import OVERRIDDEN

    ours = {
        name
        for owner in LanguageModelTrainer.__mro__
        if owner.__module__.startswith("modeling_peer.")
        for name, value in vars(owner).items()
        if callable(value) and not name.startswith("__")
    }
    assert {name for name in ours if hasattr(transformers.Trainer, name)} <= set(OVERRIDDEN)


def test_the_old_name_of_the_cache_is_deprecated_where_transformers_has_a_new_one(tiny_config):
    model, tokens = PeerForCausalLM(tiny_config()).eval(), torch.randint(1, 99, (1, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(tokens, past_key_values=DynamicCache(config=model.config))
        model(tokens, **{CACHE: DynamicCache(config=model.config)})
    found = [str(one.message) for one in caught if "is deprecated" in str(one.message)]
    assert found == ["`past_key_values` is deprecated for PEER models. Use `cache` instead."] * (CACHE == "cache")

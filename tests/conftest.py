# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Fixtures shared by the tests."""

import os

import pytest
import torch

# Without a GPU its kernels run in Triton's interpreter; Triton looks here when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from modeling_peer import PeerConfig


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Mark as slow: all cases but the first (`slow_but_first`), Triton without a GPU (`slow_in_the_interpreter`)."""
    seen = set()
    for item in items:
        if item.get_closest_marker("slow_but_first"):
            name = item.nodeid.partition("[")[0]
            if name in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(name)
        in_interpreter = "triton" in item.name.partition("[")[2] and not torch.cuda.is_available()
        if in_interpreter and item.get_closest_marker("slow_in_the_interpreter"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Builds the smallest configuration that still has every part; keywords override."""

    def build(**overrides):
        sizes = {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_sub_keys": 8,
            "num_retrieval_heads": 2,
            "num_experts_per_head": 4,
            "query_dim": 16,
            "num_hash_heads": 2,
            "num_rows_per_hash_head": 30,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
        }
        return PeerConfig(**{**sizes, **overrides})

    return build


@pytest.fixture
def poisoned_memory():
    """Whatever a kernel forgets to write is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

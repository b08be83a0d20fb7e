"""Fixtures shared by the tests."""

import pytest
import torch

from modeling_peer import PeerConfig


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
            "max_position_embeddings": 128,
            "pad_token_id": 0,
        }
        return PeerConfig(**{**sizes, **overrides})

    return build

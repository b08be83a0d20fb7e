# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Whatever a checkpoint lacks is initialised as in a new model, whichever tensor it is."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2CLS, ACT2FN

from modeling_peer import (
    PeerForCausalLM,
    PeerForMaskedLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
)
from modeling_peer.modeling_peer import ACTIVATIONS_WITH_TENSORS

MIXTURE = {"num_moe_experts": 4, "moe_intermediate_size": 16}
MODELS = {
    "peer, batch_norm": (PeerForCausalLM, {"gated_experts": True}),
    "rms_norm": (PeerForCausalLM, {"query_norm": "rms_norm", "share_sub_keys": False}),
    "layer_norm": (PeerForCausalLM, {"query_norm": "layer_norm", "parallel_dense_mlp": True}),
    "an activation with a weight": (PeerForCausalLM, {"query_norm": "none", "expert_act": "prelu"}),
    "an activation with four": (PeerForCausalLM, {"query_norm": "none", "expert_act": "xielu"}),
    "biases, tied": (PeerForCausalLM, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "memory": (PeerForCausalLM, {"sparse_mlp": "product_key_memory", "gated_memory": True}),
    "hashed memory beside PEER": (PeerForCausalLM, {"parallel_hashed_memory": True}),
    "hashed memory": (PeerForCausalLM, {"sparse_mlp": "hashed_memory"}),
    "noisy_top_k": (PeerForCausalLM, {"sparse_mlp": "top_k_moe", **MIXTURE}),
    "switch": (PeerForCausalLM, {"sparse_mlp": "top_k_moe", "moe_router": "switch", **MIXTURE}),
    "expert_choice": (PeerForCausalLM, {"sparse_mlp": "expert_choice_moe", **MIXTURE}),
    "soft, masked": (PeerForMaskedLM, {"sparse_mlp": "soft_moe", "is_causal": False, **MIXTURE}),
    "cp": (PeerForCausalLM, {"sparse_mlp": "multilinear_moe", **MIXTURE}),
    "tensor_ring": (PeerForCausalLM, {"sparse_mlp": "multilinear_moe", "multilinear_form": "tensor_ring", **MIXTURE}),
    "sequences": (PeerForSequenceClassification, {}),
    "tokens": (PeerForTokenClassification, {}),
    "questions": (PeerForQuestionAnswering, {}),
}


@pytest.fixture
def poisoned_empty(monkeypatch):
    """What is allocated and not written is NaN, as it may be in memory that was used before."""
    empty_like = torch.empty_like

    def poisoned(tensor, *args, **kwargs):
        new = empty_like(tensor, *args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() and not new.is_meta else new

    monkeypatch.setattr(torch, "empty_like", poisoned)


def assert_initialised_as(name, value, fresh):
    assert torch.isfinite(value).all(), name
    assert value.shape == fresh.shape
    if fresh.unique().numel() == 1 or not fresh.is_floating_point():
        assert torch.equal(value, fresh), name
    else:
        # As wide, by numbers drawn anew. Of 30 numbers, the least there are here, the standard deviation is known
        # to one part in eight.
        assert 0.4 < value.std() / fresh.std() < 2.5, name
        assert (value.mean() - fresh.mean()).abs() < fresh.std(), name


def test_every_activation_with_tensors_is_known():
    with_tensors = {type(ACT2FN[name]) for name in ACT2CLS if ACT2FN[name].state_dict()}
    assert with_tensors == set(ACTIVATIONS_WITH_TENSORS)


@pytest.mark.parametrize(("model_class", "options"), MODELS.values(), ids=MODELS.keys())
def test_each_tensor_that_is_missing_is_initialised_and_the_others_are_loaded(
    tiny_config, tmp_path, poisoned_empty, model_class, options
):
    torch.manual_seed(1)
    fresh = model_class(tiny_config(num_hidden_layers=1, **options)).state_dict()
    model = model_class(tiny_config(num_hidden_layers=1, **options))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.uniform_(2, 3) if tensor.is_floating_point() else tensor.fill_(2)  # of no initialisation
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    for missing in saved:
        save_file({name: value for name, value in saved.items() if name != missing}, file, {"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = model_class.from_pretrained(tmp_path)
        for name, tensor in loaded.state_dict().items():
            if name == missing or (name not in saved and missing == "model.embed_tokens.weight"):  # tied to it
                assert_initialised_as(name, tensor, fresh[name])
            elif name in saved:
                assert torch.equal(tensor, saved[name]), f"{name}, without {missing}"
        for name, buffer in loaded.named_buffers():  # those that no checkpoint has
            assert torch.isfinite(buffer).all(), name


@pytest.mark.parametrize(
    ("query_norm", "change"),
    [
        ("batch_norm", {"num_retrieval_heads": 4}),  # the sub-keys stay
        ("batch_norm", {"query_dim": 8}),
        ("rms_norm", {"query_dim": 8}),
        ("layer_norm", {"query_dim": 8}),
    ],
    ids=str,
)
def test_mismatched_sizes_of_a_query_norm_are_initialised(tiny_config, tmp_path, poisoned_empty, query_norm, change):
    model = PeerForCausalLM(tiny_config(query_norm=query_norm)).train()
    model(torch.randint(1, 99, (4, 9)))
    model.save_pretrained(tmp_path)
    changed = tiny_config(query_norm=query_norm, **change)
    loaded = PeerForCausalLM.from_pretrained(tmp_path, config=changed, ignore_mismatched_sizes=True)
    fresh, saved = PeerForCausalLM(changed).state_dict(), model.state_dict()
    mismatched = [name for name in saved if saved[name].shape != fresh[name].shape]
    assert any("query_norm" in name for name in mismatched)
    for name in mismatched:
        assert_initialised_as(name, loaded.state_dict()[name], fresh[name])

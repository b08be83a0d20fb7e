# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What tests of exporters share: PEER and a Llama of the same sizes, and what an exported one has to compute."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerForCausalLM, quantise_expert_tables

KINDS = ("llama", "peer")
VARIANTS = {
    "int8": {},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "product_key_memory": {"sparse_mlp": "product_key_memory"},
    "Memory+": {"sparse_mlp": "product_key_memory", "gated_memory": True},
    "hashed_memory": {"sparse_mlp": "hashed_memory"},
    "top_k_moe": {"sparse_mlp": "top_k_moe"},
    "expert_choice_moe": {"sparse_mlp": "expert_choice_moe"},
    "multilinear_moe": {"sparse_mlp": "multilinear_moe"},
}


def with_variants(*names):
    """The kinds, and these variants of PEER, which are slow."""
    return [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in names)]


def build(kind, tiny_config, **overrides):
    """A Llama fails where an exporter does not work here, whatever PEER does."""
    config = tiny_config(**VARIANTS.get(kind, {}), **overrides)
    if kind != "llama":
        model = PeerForCausalLM(config).eval()
        return quantise_expert_tables(model, kind) if kind == "int8" else model
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "pad_token_id")
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names})).eval()


def inputs_of(num_tokens=7):
    tokens = torch.randint(1, 99, (1, num_tokens))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}


def export_and_compare(exporter, config, model, tolerance):
    """Export with one of Transformers' exporters; logits are those of the model, on other tokens too."""
    exported = exporter.export(model, inputs_of(), config=config)
    if isinstance(exported, torch.export.ExportedProgram):  # of releases whose exporters return that
        exported = exported.module()
    for inputs in (inputs_of(), inputs_of()):
        with torch.no_grad():
            expected = model(**inputs).logits
        del inputs["use_cache"]
        logits = torch.as_tensor(exported(**inputs)["logits"])
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def exporters():
    """Transformers' package of exporters, which older releases lack."""
    return pytest.importorskip("transformers.exporters", reason="this Transformers has no exporters")

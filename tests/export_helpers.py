# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What tests of exporters share: PEER and a Llama of the same sizes, and what an exported one has to compute."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerForCausalLM

KINDS = ("llama", "peer")


def build(kind, tiny_config, **overrides):
    """A Llama fails where an exporter does not work here, whatever PEER does."""
    config = tiny_config(**overrides)
    if kind == "peer":
        return PeerForCausalLM(config).eval()
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

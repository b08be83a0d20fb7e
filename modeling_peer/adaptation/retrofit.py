# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Retrofit: a trained dense model becomes a PEER model, with PEER layers beside some of its MLPs.

    dense = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    model = retrofit(dense, num_sub_keys=256)
    print(compare_logits(dense, model))
    model.save_pretrained("smollm-peer")

The new layers add zero at first, so both have the same logits. From then on it is an ordinary PEER model with
`parallel_dense_mlp`. Models of other shapes take PEER layers as an adapter: `peft_method.py`.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_peer import PeerForCausalLM
from modeling_peer.adaptation.added_layers import (
    LAYER_FIELDS,
    build_layer,
    check_readers,
    checked_config,
    chosen_layers,
)
from modeling_peer.adaptation.dense_checkpoints import as_peer_fields, share_weights
from modeling_peer.adaptation.mlp_inputs import input_covariances
from modeling_peer.console.errors import nearest

# Fields of PeerConfig that a new layer may have in a PEER model: those of the layer, and what concerns all of them.
MODEL_FIELDS = (*LAYER_FIELDS, "share_expert_tables", "balance_loss", "router_aux_loss_coef")
# Random tokens of a receipt: sequences, and tokens of each.
SAMPLE_SHAPE = (4, 64)


@torch.no_grad()
def retrofit(
    model: PreTrainedModel,
    layers: Iterable[int] | None = None,
    num_sub_keys: int = 256,
    readers: str = "random",
    ignored_fields: Iterable[str] = (),
    sample: torch.Tensor | None = None,
    **layer_fields: Any,
) -> PeerForCausalLM:
    """A PEER model with the weights of a dense one, and new PEER layers beside some of its MLPs.

    It shares the dense model's parameters, so memory holds them once. Training one trains the other. It has the same
    dtype, device, mode and attention implementation, and trains the parameters that the dense model trains.

    Args:
        model: a Llama (SmolLM is one), a Mistral without a window, or a Qwen2, for causal language modelling.
        layers: numbers of the decoder layers that get a PEER layer; unset, the middle one, as in `PeerConfig`.
        num_sub_keys: n; each pool has n² experts.
        readers: how the reading vectors of experts start: `"random"` as in a new model; `"neurons"`, the MLP's own;
            or `"inputs"`, drawn with the covariance of what the MLP reads on `sample`.
        ignored_fields: fields of the model's configuration that are known to have no effect.
        sample: token ids of a text, `(num_sequences, sequence_length)`, for `readers="inputs"` only; at least as many
            tokens as the model is wide.
        layer_fields: other fields of `PeerConfig` for the new layers, of `MODEL_FIELDS`.

    Raises:
        ValueError: the model is of another shape, is quantised, adapted or offloaded, has a field that PEER cannot
            represent, or there is no such layer. The model is as it was then.
    """
    for name in layer_fields:
        if name not in MODEL_FIELDS:
            known = nearest(name, MODEL_FIELDS) or f" Known: {', '.join(MODEL_FIELDS)}."
            raise ValueError(f"{name!r} is no field of a new PEER layer.{known}")
    fields = as_peer_fields(model, tuple(ignored_fields))
    _check_tied_embeddings(model)
    chosen = chosen_layers(layers, fields["num_hidden_layers"])
    embeddings = model.get_input_embeddings().weight
    config = checked_config(
        **fields,
        mlp_layer_types=["sparse" if i in chosen else "dense" for i in range(fields["num_hidden_layers"])],
        parallel_dense_mlp=True,
        num_sub_keys=num_sub_keys,
        **layer_fields,
        dtype=embeddings.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    if (sample is not None) != (readers == "inputs"):
        raise ValueError(
            f"readers={readers!r} takes no sample of text. Leave sample out, or use readers='inputs'."
            if sample is not None
            else "readers='inputs' needs a text to read: give sample, token ids (num_sequences, sequence_length)."
        )
    mlps = {number: model.model.layers[number].mlp for number in chosen}
    for mlp in mlps.values():
        check_readers(readers, mlp, config.hidden_size)
    covariances = [None] * len(mlps)
    if readers == "inputs":
        covariances = input_covariances(model, list(mlps.values()), sample)
    with torch.device("meta"):
        new = PeerForCausalLM(config)
    share_weights(model, new, [f"model.layers.{number}.mlp" for number in chosen])
    for (number, mlp), covariance in zip(mlps.items(), covariances, strict=True):
        layer = build_layer(config, mlp, readers, covariance).to(embeddings.dtype)
        if config.share_expert_tables and number != chosen[0]:
            layer.experts = new.model.layers[chosen[0]].mlp.experts
        new.model.layers[number].mlp = layer
    new.model.rotary_emb = LlamaRotaryEmbedding(config).to(embeddings.device)
    for name, buffer in model.model.rotary_emb.named_buffers():  # which a cast of the whole model rounds
        setattr(new.model.rotary_emb, name, buffer.clone())
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.train(model.training)


def _check_tied_embeddings(model: PreTrainedModel) -> None:
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied != bool(model.config.tie_word_embeddings):
        raise ValueError(
            f"tie_word_embeddings={model.config.tie_word_embeddings}, but the input and output embeddings are "
            f"{'one tensor' if tied else 'two tensors'}: a saved checkpoint would not load as this model. Set the "
            "field to what the model is."
        )


@torch.no_grad()
def compare_logits(
    source: PreTrainedModel, model: PreTrainedModel, tokens: torch.Tensor | None = None
) -> dict[str, Any]:
    """The receipt of a retrofit: how far the logits of two models are apart, in evaluation.

    Args:
        tokens: `(num_sequences, sequence_length)`; unset, random tokens of a fixed seed.

    Returns:
        `tokens` (how many, and of what), `largest_difference`, `largest_logit`, both in absolute value, and
        `equal`: whether all logits are the same, bit for bit.
    """
    kind = "text"
    if tokens is None:
        kind = "random"
        num_sequences, length = SAMPLE_SHAPE
        shape = (num_sequences, min(length, model.config.max_position_embeddings))
        tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    modes = source.training, model.training
    source.eval(), model.eval()
    difference, largest, equal = 0.0, 0.0, True
    try:
        for sequence in tokens.to(source.device).split(1):
            expected, got = (one(sequence, use_cache=False).logits for one in (source, model))
            difference = max(difference, (expected.double() - got.double()).abs().max().item())
            largest = max(largest, expected.abs().max().item())
            equal &= torch.equal(expected, got)
    finally:
        source.train(modes[0]), model.train(modes[1])
    return {
        "tokens": f"{tokens.numel()} {kind}",
        "largest_difference": difference,
        "largest_logit": largest,
        "equal": equal,
    }

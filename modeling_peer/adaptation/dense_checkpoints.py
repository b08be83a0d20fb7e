# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Dense models that a PEER decoder can represent: which these are, and the fields of their configurations.

A PEER decoder has Llama's blocks. Mistral without a window is Llama. Qwen2 is Llama with biases of queries, keys and
values. PEER's `attention_bias` also has one of the attention's output, and there zeros are exact.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_peer.configuration_peer import PeerConfig

LLAMA_SHAPED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
# Fields with the same name and meaning in PeerConfig.
CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
# Fields that the modelling code of these models does not read, and what popular checkpoints note in theirs.
NOT_READ = (
    "_commit_hash",
    "auto_map",
    "is_llama_config",
    "max_window_layers",  # only with a window
    "pretraining_tp",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "use_sliding_window",  # `sliding_window` is None without it
)


def as_peer_fields(model: nn.Module, ignored_fields: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of `PeerConfig` that describe a dense model, in a new dict.

    Args:
        ignored_fields: fields of the configuration that are known to have no effect and are left out.

    Raises:
        ValueError: the model is not one of `LLAMA_SHAPED`, is quantised, adapted, offloaded or sharded, or has a field
            that PEER cannot represent.
    """
    _check_model(model)
    config = model.config
    fields = {name: copy.deepcopy(getattr(config, name)) for name in CARRIED if hasattr(config, name)}
    fields["attention_dropout"] = fields.get("attention_dropout") or 0.0
    if isinstance(model, Qwen2ForCausalLM):
        fields["attention_bias"] = True
    _check_other_fields(config, ignored_fields)
    rope_type = (fields.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"rope_parameters has rope_type {rope_type!r}, which this release of Transformers does not have for Llama "
            f"(default, {', '.join(ROPE_INIT_FUNCTIONS)})."
        )
    return fields


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "model_type", None) == PeerConfig.model_type:
        raise ValueError(f"{name} is a PEER model already. Its layers are chosen when it is made (mlp_layer_types).")
    if type(model) not in LLAMA_SHAPED:
        known = ", ".join(one.__name__ for one in LLAMA_SHAPED)
        raise ValueError(
            f"{name} cannot become a PEER checkpoint: that needs one of {known}, unchanged. For any other causal "
            "model, put PEER layers into an adapter: modeling_peer.adaptation.peft_method.PeerAdapterConfig. Merge or "
            "unload adapters first."
        )
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"{name} is quantised, and a PEER model has plain weights. Load the float checkpoint, or put PEER layers "
            "into an adapter (PeerAdapterConfig), which takes a quantised base."
        )
    for parameter_name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
            kind = "on meta" if parameter.is_meta else f"a {type(parameter).__name__} of {parameter.dtype}"
            raise ValueError(
                f"{parameter_name} is {kind}: only plain float weights in memory can be shared. Load the model on one "
                "device, without offloading, sharding or quantisation."
            )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError(f"{name} is spread over several devices. Load it on one, and place the result afterwards.")


def _check_other_fields(config: PreTrainedConfig, ignored_fields: tuple[str, ...]) -> None:
    known = {*CARRIED, *NOT_READ, *PreTrainedConfig().to_dict(), *ignored_fields}
    for name, value in config.to_dict().items():
        if name in known or value is None or value is False:
            continue
        if name == "sliding_window":
            raise ValueError(
                f"sliding_window={value}: a PEER decoder has no window, so a token would see more than in this model. "
                "Set sliding_window to None in its configuration if no text will be longer, or use the adapter "
                "(PeerAdapterConfig)."
            )
        if name == "layer_types" and set(value) == {"full_attention"}:
            continue
        raise ValueError(
            f"{name}={value!r}: a PEER decoder has no such field. If it has no effect on this model, name it in "
            "ignored_fields; otherwise use the adapter (PeerAdapterConfig)."
        )


def share_weights(source: PreTrainedModel, target: PreTrainedModel, new_modules: list[str]) -> None:
    """Put the parameters of `source` into `target`, which was built on `meta`. They are shared, not copied.

    Args:
        new_modules: names of modules of `target` that `source` does not have.

    Raises:
        ValueError: `source` has parameters that `target` has no place for, or lacks some.
    """
    given = dict(source.named_parameters(remove_duplicate=False))
    places = {
        _name_in_source(name): name
        for name, _ in target.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{new}.") for new in new_modules)
    }
    no_place = sorted(given.keys() - places.keys())
    lacking = sorted(name for name in places.keys() - given.keys() if not name.endswith("self_attn.o_proj.bias"))
    if no_place or lacking:
        raise ValueError(
            f"{type(source).__name__} is changed: it has {no_place[:3] or 'nothing'} that a PEER decoder has no place "
            f"for, and lacks {lacking[:3] or 'nothing'}. Merge or unload adapters, and undo other changes."
        )
    for name, place in places.items():
        owner = target.get_submodule(place.rpartition(".")[0])
        parameter = given.get(name)
        if parameter is None:  # Qwen2 has no bias there, so a bias of zero changes nothing
            weight = owner.weight
            zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            parameter = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        elif parameter.shape != owner._parameters[place.rpartition(".")[2]].shape:
            raise ValueError(
                f"{name} is {tuple(parameter.shape)}, which does not fit the configuration of {type(source).__name__}."
            )
        owner.register_parameter(place.rpartition(".")[2], parameter)


def _name_in_source(name: str) -> str:
    return name.replace(".dense_mlp.", ".mlp.")

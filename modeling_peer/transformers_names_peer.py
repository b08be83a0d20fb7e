# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Names of Transformers' arguments, outputs and methods, checked at import.

Most functions of Transformers accept `**kwargs`, so they silently ignore a keyword that a release renamed. 5.24
renamed `past_key_values` to `cache` in attention, masks, generation and outputs. A model that still passed
`past_key_values` lost its cache. This module reads each function's signature and raises if a name is missing.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRotaryEmbedding

# The releases on which `make test-releases` ran. Later ones may work; if not, the checks below raise.
TESTED_RELEASES = ("5.17", "5.24")
CACHE_NAMES = ("cache", "past_key_values")  # newest first


def argument_name(function: Callable, *names: str) -> str:
    """The first of `names` that is an argument of `function` itself, under any decorators.

    Raises:
        ImportError: `function` has none of them.
    """
    known = inspect.signature(function).parameters
    for name in names:
        if name in known:
            return name
    raise _unsupported(f"{function.__qualname__} has no argument {' or '.join(names)}; it has {', '.join(known)}")


def require_arguments(function: Callable, *names: str) -> None:
    """Raise ImportError unless `function` has each of `names` as an argument."""
    for name in names:
        argument_name(function, name)


def require_methods(owner: type, *names: str) -> None:
    """Raise ImportError unless `owner` has each of `names`: an override of a removed method is never called."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _unsupported(f"{owner.__qualname__} has no {', '.join(missing)}")


def require_fields(output: type, *names: str) -> None:
    """Raise ImportError unless the dataclass `output` has each of `names`."""
    missing = sorted(set(names) - {field.name for field in dataclasses.fields(output)})
    if missing:
        raise _unsupported(f"{output.__qualname__} has no field {', '.join(missing)}")


def _unsupported(difference: str) -> ImportError:
    oldest, newest = TESTED_RELEASES
    return ImportError(
        f"PEER's code does not work with transformers {transformers.__version__}: {difference}. Install a tested "
        f"release, transformers>={oldest},<={newest}.99. Or update modeling_peer, and save checkpoints with the old "
        "code again."
    )


# The cache of keys and values: one name in all functions that take or return it.
CACHE = argument_name(LlamaAttention.forward, *CACHE_NAMES)

_CALLED = {
    LlamaAttention.forward: ("hidden_states", "attention_mask", "position_embeddings"),
    # Gradient checkpointing removes the cache from a layer's arguments by its name in Llama's layer.
    LlamaDecoderLayer.forward: (CACHE,),
    LlamaRotaryEmbedding.forward: ("position_ids",),
    create_causal_mask: ("config", "inputs_embeds", "attention_mask", "position_ids", CACHE),
    DynamicCache.__init__: ("config",),
    Cache.get_seq_length: (),
    GenerationMixin.prepare_inputs_for_generation: ("input_ids", CACHE),
    # The Generic heads pass arguments to the decoder under the names of their own.
    GenericForSequenceClassification.forward: ("input_ids", "attention_mask", "position_ids", "labels", CACHE),
    GenericForTokenClassification.forward: ("input_ids", "attention_mask", "position_ids", "labels", CACHE),
    GenericForQuestionAnswering.forward: ("input_ids", "attention_mask", "start_positions", "end_positions", CACHE),
    # Trainer passes `num_items_in_batch` to a model's forward, which passes it to the loss.
    ForCausalLMLoss: ("logits", "labels", "vocab_size", "num_items_in_batch", "shift_labels"),
    ForMaskedLMLoss: ("logits", "labels", "vocab_size", "num_items_in_batch"),
}
for _function, _names in _CALLED.items():
    require_arguments(_function, *_names)
for _output in (BaseModelOutputWithPast, CausalLMOutputWithPast):
    require_fields(_output, CACHE, "hidden_states", "attentions")
# Methods that PeerPreTrainedModel overrides, and private ones that it calls.
require_methods(
    PreTrainedModel,
    *("_init_weights", "get_correct_experts_implementation", "set_experts_implementation"),
    *("prepare_distribute_model", "maybe_distribute_model", "init_parallel_plans", "get_expanded_tied_weights_keys"),
    *("gather_sharded_state_dict_for_save", "should_save_on_this_rank", "barrier_after_gathered_checkpoint_save"),
    *("_get_files_timestamps", "_upload_modified_files", "resize_token_embeddings"),
)


def one_cache(cache: object | None, past_key_values: object | None, others: dict) -> object | None:
    """The cache of a call, which may name it as any release does.

    Args:
        others: the call's other keywords. None of them may be a cache, because it would be ignored.

    Raises:
        TypeError: two caches, or one under a name that PEER does not know.
    """
    unknown = [name for name, value in others.items() if isinstance(value, Cache)]
    if unknown:
        raise TypeError(f"{unknown[0]}= holds a cache that PEER would not read: pass it as {CACHE}=.")
    if cache is not None and past_key_values is not None:
        raise TypeError("Pass the cache once, as cache= or as past_key_values=, not both.")
    if past_key_values is not None and CACHE == "cache" and not torch.compiler.is_compiling():
        # as Llama's forward does, in these releases
        warnings.warn(
            "`past_key_values` is deprecated for PEER models. Use `cache` instead.", FutureWarning, stacklevel=3
        )
    return past_key_values if cache is None else cache


def cache_argument(cache: object | None) -> dict[str, object | None]:
    """`cache` as a keyword for Llama's attention."""
    # Before 5.24 the paged cache of continuous batching was not a `Cache`, and was passed beside it under this name.
    return {CACHE if cache is None or isinstance(cache, Cache) else "cache": cache}


__all__ = ["CACHE", "cache_argument", "one_cache", "require_arguments", "require_methods"]

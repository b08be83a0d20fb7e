# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The names under which Transformers takes and returns things, looked up at import.

Most calls of Transformers end in `**kwargs`, so a keyword that a release renamed is swallowed and the model goes on
without it. 5.24 renamed `past_key_values` to `cache` in attention, masks, generation and outputs: a model that went on
saying `past_key_values` forgot the past. Here each callee's signature is read, and a name that is not there raises.
"""

import dataclasses
import inspect
from collections.abc import Callable

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

# The releases on which `make test-releases` ran; later ones may work, and refuse below if they do not.
TESTED_RELEASES = ("5.17", "5.24")
CACHE_NAMES = ("cache", "past_key_values")  # newest first


def argument_name(function: Callable, *names: str) -> str:
    """The first of `names` that `function` takes as an argument of its own, decorators looked through.

    Raises:
        ImportError: it takes none of them.
    """
    known = inspect.signature(function).parameters
    for name in names:
        if name in known:
            return name
    raise _unsupported(f"{function.__qualname__} takes no argument {' or '.join(names)}, but {', '.join(known)}")


def require_arguments(function: Callable, *names: str) -> None:
    """Raise ImportError unless `function` takes each of `names`."""
    for name in names:
        argument_name(function, name)


def require_methods(owner: type, *names: str) -> None:
    """Raise ImportError unless `owner` has each of `names`: an override of a method that is gone is never called."""
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
        f"This code of PEER does not fit transformers {transformers.__version__}: {difference}. Install a release it "
        f"was tested with, transformers>={oldest},<={newest}.99, or update modeling_peer and save checkpoints that "
        "carry the old code again."
    )


# The cache of keys and values: one name for all that take it or return it.
CACHE = argument_name(LlamaAttention.forward, *CACHE_NAMES)

_CALLED = {
    LlamaAttention.forward: ("hidden_states", "attention_mask", "position_embeddings"),
    # Gradient checkpointing takes the cache from a layer's arguments by the name that Llama's layer has.
    LlamaDecoderLayer.forward: (CACHE,),
    LlamaRotaryEmbedding.forward: ("position_ids",),
    create_causal_mask: ("config", "inputs_embeds", "attention_mask", "position_ids", CACHE),
    DynamicCache.__init__: ("config",),
    Cache.get_seq_length: (),
    GenerationMixin.prepare_inputs_for_generation: ("input_ids", CACHE),
    # The Generic heads call the decoder by the names that they take themselves.
    GenericForSequenceClassification.forward: ("input_ids", "attention_mask", "position_ids", "labels", CACHE),
    GenericForTokenClassification.forward: ("input_ids", "attention_mask", "position_ids", "labels", CACHE),
    GenericForQuestionAnswering.forward: ("input_ids", "attention_mask", "start_positions", "end_positions", CACHE),
    # Trainer hands `num_items_in_batch` to a model's forward, which hands it to the loss.
    ForCausalLMLoss: ("logits", "labels", "vocab_size", "num_items_in_batch", "shift_labels"),
    ForMaskedLMLoss: ("logits", "labels", "vocab_size", "num_items_in_batch"),
}
for _function, _names in _CALLED.items():
    require_arguments(_function, *_names)
for _output in (BaseModelOutputWithPast, CausalLMOutputWithPast):
    require_fields(_output, CACHE, "hidden_states", "attentions")
# Methods that PeerPreTrainedModel overrides, or calls though they are private.
require_methods(
    PreTrainedModel,
    *("_init_weights", "get_correct_experts_implementation", "set_experts_implementation"),
    *("prepare_distribute_model", "maybe_distribute_model", "init_parallel_plans", "get_expanded_tied_weights_keys"),
    *("gather_sharded_state_dict_for_save", "should_save_on_this_rank", "barrier_after_gathered_checkpoint_save"),
    *("_get_files_timestamps", "_upload_modified_files"),
)


def one_cache(cache: object | None, past_key_values: object | None, others: dict) -> object | None:
    """The cache of a call that may name it as any release does.

    Args:
        others: the call's other keywords, none of which may hold a cache: nobody would read it.

    Raises:
        TypeError: two caches, or one under a name that PEER does not know.
    """
    unknown = [name for name, value in others.items() if isinstance(value, Cache)]
    if unknown:
        raise TypeError(f"{unknown[0]}= holds a cache that PEER would not read: pass it as {CACHE}=.")
    if cache is not None and past_key_values is not None:
        raise TypeError("Pass the cache once, as cache= or as past_key_values=, not both.")
    return past_key_values if cache is None else cache


def cache_argument(cache: object | None) -> dict[str, object | None]:
    """`cache` as a keyword for Llama's attention."""
    # Before 5.24 the paged cache of continuous batching was no `Cache`, and found beside it by this name.
    return {CACHE if cache is None or isinstance(cache, Cache) else "cache": cache}


__all__ = ["CACHE", "cache_argument", "one_cache", "require_arguments", "require_methods"]

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The PEER decoder and its heads: Llama's blocks, with a PEER layer where `mlp_layer_types` is "sparse".

`sparse_mlp` can put one of the layers that PEER is compared with in its place.
"""

import importlib.machinery
import inspect
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from itertools import chain

import torch
import transformers
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2CLS
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# A checkpoint has a copy of this file. If its folder is first on sys.path, as the working directory is, then `import
# modeling_peer` finds that copy instead of the package. The files beside it then become a package of another name.
if __name__ == "modeling_peer":
    __package__ = "modeling_peer_of_checkpoint"
    __spec__ = importlib.machinery.ModuleSpec(f"{__package__}.modeling_peer", None)
    sys.modules[__package__] = types.ModuleType(__package__)
    sys.modules[__package__].__path__ = [os.path.dirname(os.path.abspath(__file__))]

from .auto_classes_peer import import_package, register_names
from .auxiliary_losses_peer import AuxiliaryLosses, share_of_step
from .checkpoint_peer import PeerCheckpoints
from .configuration_peer import PRODUCT_KEY_MLPS, TABLE_MLPS, PeerConfig
from .experts_peer import PeerExperts
from .grown_pools_peer import grown_pools_of
from .masks_peer import fit_attention_mask, num_cached, split_prepared_mask
from .outputs_peer import (
    PeerCausalLMOutputWithPast,
    PeerMaskedLMOutput,
    PeerModelOutputWithPast,
    PeerQuestionAnsweringModelOutput,
    PeerSequenceClassifierOutputWithPast,
    PeerTokenClassifierOutput,
)
from .parallel_peer import EXPERT_ROWS, require_dense_gradients
from .query_norms_peer import (
    Float32Module,
    freeze_running_statistics,
    keep_statistics_in_generation,
    statistics_as_in_evaluation,
)
from .retrieval_peer import PeerRetrieval
from .row_formats_peer import row_width
from .sparse_mlps_peer import has_own_initialization, sparse_mlp_class
from .token_context_peer import TokenContext
from .transformers_names_peer import CACHE, CACHE_NAMES, cache_argument, one_cache

# Activations whose tensors Transformers would leave uninitialised if the checkpoint lacks them.
ACTIVATIONS_WITH_TENSORS = tuple(ACT2CLS[name] for name in ("prelu", "xielu") if name in ACT2CLS)

# Optional outputs of a forward. The first belongs to Transformers' own mixtures of experts.
RECORDABLE = ("output_router_logits", "output_expert_ids", "output_expert_gates")


class PeerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = LlamaAttention(config, layer_idx)
        self.self_attn.is_causal = config.is_causal  # SDPA reads it when there is no mask
        build = partial(sparse_mlp_class(config.sparse_mlp), initialize=False) if self.is_sparse else LlamaMLP
        self.mlp = build(config)
        self.mlp_reads_tokens = self.is_sparse and config.sparse_mlp == "hashed_memory"
        self.dense_mlp = LlamaMLP(config) if self.is_sparse and config.parallel_dense_mlp else None
        self.hashed_memory = None
        if self.is_sparse and config.parallel_hashed_memory:
            self.hashed_memory = sparse_mlp_class("hashed_memory")(config, initialize=False)
        grown = grown_pools_of(config, layer_idx)
        self.grown_pools = nn.ModuleList(map(build, grown)) if grown else None
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_mask: torch.Tensor | None = None,
        with_aux_losses: bool = False,
        tokens: TokenContext | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states and, `with_aux_losses` and if there are any, the sum of those losses.

        `tokens` are for a hashed memory.

        The other keywords, including the cache, go to attention.
        """
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        aux_losses = AuxiliaryLosses() if with_aux_losses else None
        inputs = (hidden_states, token_mask, aux_losses) if self.is_sparse else (hidden_states,)
        own_tokens = None if tokens is None else replace(tokens, layer=self.layer_idx)
        output = self.mlp(*inputs, tokens=own_tokens) if self.mlp_reads_tokens else self.mlp(*inputs)
        if self.hashed_memory is not None:
            output = output + self.hashed_memory(*inputs, tokens=own_tokens)
        for pool in self.grown_pools or ():
            output = output + pool(hidden_states, token_mask, aux_losses)
        if self.dense_mlp is not None:
            output = output + self.dense_mlp(hidden_states)
        hidden_states = residual + output
        if aux_losses is None or aux_losses.total is None:
            return hidden_states
        # Returned, because only return values of a checkpointed (reentrant) forward have a gradient.
        return hidden_states, aux_losses.total


class PeerPreTrainedModel(PeerCheckpoints, PreTrainedModel):
    """What all PEER models have in common."""

    config: PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PeerDecoderLayer,
        "attentions": LlamaAttention,
        "expert_ids": OutputRecorder(PeerRetrieval, index=1),
        "expert_gates": OutputRecorder(PeerRetrieval, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if has_own_initialization(type(module)):
            module.reset_parameters()
        elif isinstance(module, ACTIVATIONS_WITH_TENSORS):
            for name, tensor in type(module)().state_dict().items():
                init.copy_(getattr(module, name), tensor)

    def freeze_running_statistics(self, frozen: bool = True):
        """Freeze the running statistics, which training forwards update without a gradient, or unfreeze them.

        These are the statistics of the queries' BatchNorm and the thresholds of `expert_choice_moe`. While they are
        frozen, the layer computes the same in training as in evaluation. Its parameters train as before.

        A new model updates them. A model from `from_pretrained` has them frozen, which suits fine-tuning. Policy and
        reference are then the same function, and gradients do not depend on how a batch is split. To continue
        pretraining, call this with `frozen=False`.
        """
        freeze_running_statistics(self, frozen)

    def train_only_newest_pool(self):
        """Freeze everything but the pool that was grown last (`PeerConfig.grown_pools`), in all of its layers.

        The older pools then stay as they are, running statistics included. Call it before an optimizer is made.

        Returns:
            The model.

        Raises:
            ValueError: the model has no grown pools.
        """
        pools = self.config.grown_pools
        if not pools:
            raise ValueError(f"{type(self).__name__} has no grown pools. grow(model, ...) or `peer grow` adds one.")
        self.requires_grad_(False)
        for number in pools[-1]["layers"]:
            self.base_model.layers[number].grown_pools[-1].requires_grad_(True)
        return self

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str | None:
        # Transformers knows only the names for its coarse mixtures. `None` stays: PEER chooses at each call.
        return sparse_mlp_class(self.config.sparse_mlp).check_experts_implementation(requested_experts)

    def set_experts_implementation(self, experts_implementation: str | dict[str, str | None] | None):
        """Choose the implementation of the sparse layers from now on; `None` lets PEER choose."""
        # Transformers switches only models that accept all of its own names. It looks for a decorator in their file.
        if isinstance(experts_implementation, dict):
            experts_implementation = experts_implementation.get("", self.config._experts_implementation)
        self.config._experts_implementation = self.get_correct_experts_implementation(experts_implementation)

    def requires_grad_(self, requires_grad: bool = True):
        """Like `nn.Module.requires_grad_`, but quantised expert tables stay frozen: integers have no gradient."""
        frozen = {
            id(p) for module in self.modules() if isinstance(module, PeerExperts) for p in module.frozen_tables()
        }
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
        return self

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Like `PreTrainedModel.resize_token_embeddings`. Hashed memories know the new tokens, too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if hasattr(module, "resize_vocabulary"):
                module.resize_vocabulary(self.config.vocab_size)
        return embeddings

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Like `PreTrainedModel.num_parameters`. It is the same for all formats of expert tables.

        Two numbers of int4 in a byte count as two, and the scales of rows do not count.
        """
        counted = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:  # quantised tables are frozen
            return counted
        pools = (module for module in self.modules() if isinstance(module, PeerExperts))
        stored = {id(one): one for pool in pools for one in pool.frozen_tables()}.values()
        numbers = sum(len(one) * row_width(one) for one in stored if one.dim() == 2)
        return counted - sum(one.numel() for one in stored) + numbers

    def _collect_aux_losses(self, has_labels: bool, weight: float | None = None) -> AuxiliaryLosses | None:
        """Collector of the layers' auxiliary losses; None in generation and in evaluation without labels.

        Args:
            weight: their weight in the loss of this call; `None` for the configuration's `router_aux_loss_coef`.
        """
        wanted = self.config.has_aux_losses and (self.training or has_labels)
        return AuxiliaryLosses(self.config.router_aux_loss_coef if weight is None else weight) if wanted else None

    def _add_aux_losses(self, outputs, aux_losses: AuxiliaryLosses | None, share: torch.Tensor | float = 1.0):
        """Set `aux_loss` in a head's outputs and add it to their loss.

        There it is weighted by the collector's weight and by this micro-batch's share of the step.
        """
        if aux_losses is None or aux_losses.total is None:
            return outputs
        outputs["aux_loss"] = aux_losses.total
        if outputs.loss is not None:
            weighted = aux_losses.weight * share * aux_losses.total
            outputs["loss"] = outputs.loss + weighted.to(outputs.loss.device)
        return outputs

    def _check_recorded(self, options: dict, head: str | None = None):
        """Raise ValueError if `output_...` options request an output that is not recorded here.

        The options are those of a forward or of the configuration. Transformers would return an empty tuple, or
        nothing.

        Args:
            head: name of a head that does not return what the decoder recorded.
        """
        wanted = {name for name in RECORDABLE if options.get(name, getattr(self.config, name, False))}
        if "output_router_logits" in wanted:
            raise ValueError(
                "output_router_logits=True: no PEER model keeps router logits, which would score every expert for "
                "every token. Leave it unset; output_expert_ids=True and output_expert_gates=True give the retrieved "
                "experts and their gates."
            )
        if wanted and self.config.sparse_mlp not in PRODUCT_KEY_MLPS:
            raise ValueError(
                f"{min(wanted)}=True records what product keys retrieve, and sparse_mlp={self.config.sparse_mlp!r} "
                f"has none ({', '.join(PRODUCT_KEY_MLPS)} do). Leave it unset."
            )
        if wanted and head is not None:
            raise ValueError(
                f"{min(wanted)}=True: {head} returns no retrieved experts. Call its decoder, model.model(...), or "
                "PeerForCausalLM."
            )

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        prepared = super().prepare_distribute_model(distributed_config, *args, **kwargs)
        # Transformers' own choice would send every expert its input, so each token hundreds of times.
        if getattr(prepared[0], "ep_implementation", None) == "auto":
            prepared = (replace(prepared[0], ep_implementation=EXPERT_ROWS), *prepared[1:])
        return prepared

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        if model.config.row_sparse_gradients and distributed_config is not None:
            require_dense_gradients(distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)


class PeerModel(PeerPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: PeerConfig):
        # Checked again: `from_pretrained(..., num_hidden_layers=2)` changes fields after the first check.
        config.validate_architecture()
        super().__init__(config)
        # A negative id means none, and Transformers warns of it. torch would count it from the end.
        self.padding_idx = None if (config.pad_token_id or 0) < 0 else config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([PeerDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._tied_weights_keys = self._shared_tables()
        # Only the modules this model has: Transformers treats a name that matches nothing as a typo.
        float32_modules = {name for name, module in self.named_modules() if isinstance(module, Float32Module)}
        self._keep_in_fp32_modules_strict = {name.rpartition(".")[2] for name in float32_modules}
        self.post_init()

    def init_parallel_plans(self):
        super().init_parallel_plans()
        # The configuration's plans name every MLP and table a PEER model can have. Keep the entries of this model.
        names = {re.sub(r"\.\d+", ".*", name) for name, _ in chain(self.named_modules(), self.named_parameters())}
        if self.config.sparse_mlp not in TABLE_MLPS:  # the plans shard rows; other experts are replicated
            names.discard("layers.*.mlp.experts")
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in names}
        self._ep_plan = {name: style for name, style in self._ep_plan.items() if name in names}
        if self.config._attn_implementation == "sglang":  # it refuses a plan with a style that it does not know
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if style != EXPERT_ROWS}

    def _shared_tables(self) -> dict[str, str]:
        """Map each expert table of the later sparse layers to the first sparse layer's table it shares."""
        sparse = [i for i, layer in enumerate(self.layers) if layer.is_sparse]
        if not self.config.share_expert_tables or not sparse:
            return {}
        first = self.layers[sparse[0]]
        pools = {"mlp.experts": first.mlp.experts}
        if first.hashed_memory is not None:
            pools["hashed_memory.experts"] = first.hashed_memory.experts
        names = [f"{pool}.{name}" for pool, module in pools.items() for name, _ in module.named_parameters()]
        return {f"layers.{i}.{name}": f"layers.{sparse[0]}.{name}" for i in sparse[1:] for name in names}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Transformers ties only if `tie_word_embeddings` is set. Shared expert tables do not depend on it.
        return dict(self._tied_weights_keys)

    @merge_with_config_defaults
    @capture_outputs
    @keep_statistics_in_generation
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        aux_losses: AuxiliaryLosses | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerModelOutputWithPast:
        """
        Args:
            input_ids: `(batch_size, sequence_length)`; or give `inputs_embeds`
                `(batch_size, sequence_length, hidden_size)`.
            attention_mask: `(batch_size, past + sequence_length)`, 0 for padding, or any mask Transformers takes.
            position_ids: `(batch_size, sequence_length)`.
            cache: keys and values of the tokens before these. Transformers before 5.24 calls it `past_key_values`;
                both names work.
            aux_losses: collects the sparse layers' auxiliary losses. With `None` they are not computed.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or no token at all.
            RuntimeError: attention did not extend the cache.
        """
        cache = one_cache(cache, past_key_values, kwargs)
        self._check_recorded(kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        elif self.config.has_hashed_memory:
            raise ValueError("hashed_memory looks up what the tokens are: pass input_ids in place of inputs_embeds.")
        batch_size, length = inputs_embeds.shape[:2]
        if 0 in (batch_size, length):
            raise ValueError(f"The input is empty: {batch_size} sequences of {length} tokens.")
        num_heads = self.config.num_attention_heads
        attention_mask = fit_attention_mask(attention_mask, batch_size, length, num_heads, cache)
        # A non-causal model has nothing to cache: each new token changes the states of all earlier ones.
        if use_cache and self.config.is_causal and cache is None:
            cache = DynamicCache(config=self.config)
        cached_before = num_cached(cache)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(length, device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)
        attention_mask, token_mask = split_prepared_mask(attention_mask, length, cache)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        if self.config.has_hashed_memory:
            kwargs["tokens"] = TokenContext(input_ids, position_ids, cache)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                token_mask=token_mask,
                with_aux_losses=aux_losses is not None,
                **cache_argument(cache),
                **kwargs,
            )
            if isinstance(hidden_states, tuple):
                hidden_states, aux_loss = hidden_states
                aux_losses.add(aux_loss)
        if cached_before is not None and num_cached(cache) != cached_before + length:
            raise RuntimeError(
                f"Attention left the cache at {num_cached(cache)} tokens, where {cached_before} and "
                f"{length} new ones were expected: what follows would forget them. In training with "
                "gradient checkpointing Transformers takes the cache away: pass use_cache=False and no cache. "
                f"Otherwise this code does not fit transformers {transformers.__version__}: update modeling_peer."
            )
        return PeerModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class PeerLanguageModel(PeerPreTrainedModel):
    """The decoder with a head that scores every token of the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PeerConfig):
        super().__init__(config)
        self.model = PeerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class PeerForCausalLM(PeerLanguageModel, GenerationMixin):
    """A language model that predicts the next token."""

    def __init__(self, config: PeerConfig):
        if not config.is_causal:
            raise ValueError(
                f"{type(self).__name__} predicts the next token, which a model with is_causal=False has already seen. "
                "Set is_causal=True, or take PeerForMaskedLM or a classification head."
            )
        super().__init__(config)

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with statistics_as_in_evaluation(self):
            return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        # some releases find out in a thread of their own, which then dies, and a server with it
        if self.config.has_hashed_memory:
            raise ValueError(
                "A hashed memory reads earlier tokens, and Transformers' continuous batching keeps none for it. Use "
                "generate(), or `peer serve` without --continuous-batching."
            )
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        output_expert_ids: bool | None = None,
        output_expert_gates: bool | None = None,
        router_aux_loss_coef: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch_size, sequence_length)`; -100 for tokens without a loss. The model shifts them.
            logits_to_keep: compute logits only for this many last positions (0: for all), or for these positions:
                `(num_positions,)`, `(batch_size, num_positions)`, or a boolean `(batch_size, sequence_length)`.
            output_expert_ids, output_expert_gates: see [`PeerModelOutputWithPast`].
            router_aux_loss_coef: weight of the auxiliary losses in `loss`; the configuration's by default. With 0,
                `loss` is the cross-entropy alone.

        The other arguments are those of [`PeerModel`].
        """
        aux_losses = self._collect_aux_losses(labels is not None, router_aux_loss_coef)
        outputs: PeerModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            aux_losses=aux_losses,
            past_key_values=past_key_values,
            **_asked_for(output_expert_ids=output_expert_ids, output_expert_gates=output_expert_gates),
            **kwargs,
        )
        logits = self.lm_head(_positions_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        results = PeerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            expert_ids=outputs.expert_ids,
            expert_gates=outputs.expert_gates,
        )
        share = share_of_step(labels, **kwargs) if aux_losses is not None else 1.0
        return self._add_aux_losses(results, aux_losses, share)


class PeerForMaskedLM(PeerLanguageModel):
    """A language model that predicts masked tokens from the tokens on both sides (`is_causal=False`)."""

    def __init__(self, config: PeerConfig):
        if config.is_causal:
            raise ValueError(
                f"{type(self).__name__} predicts a token from both its sides, and a model with is_causal=True sees "
                "one. Set is_causal=False, or take PeerForCausalLM."
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        router_aux_loss_coef: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerMaskedLMOutput:
        """
        Args:
            labels: `(batch_size, sequence_length)`, the original token where one was masked, elsewhere -100. Not
                shifted.
            router_aux_loss_coef: see [`PeerForCausalLM`].

        The other arguments are those of [`PeerModel`].
        """
        aux_losses = self._collect_aux_losses(labels is not None, router_aux_loss_coef)
        outputs: PeerModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            aux_losses=aux_losses,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        results = PeerMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            expert_ids=outputs.expert_ids,
            expert_gates=outputs.expert_gates,
        )
        share = share_of_step(labels, shift_labels=labels, **kwargs) if aux_losses is not None else 1.0
        return self._add_aux_losses(results, aux_losses, share)


def _asked_for(**options: bool | None) -> dict[str, bool]:
    """The options that were given; the configuration decides the others."""
    return {name: value for name, value in options.items() if value is not None}


def _positions_to_keep(hidden_states: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    # Transformers has this function too, but not in the oldest release we support.
    if isinstance(positions, int):
        return hidden_states[:, -positions:]
    if positions.dim() == 2 and positions.dtype != torch.bool:
        return torch.take_along_dim(hidden_states, positions.unsqueeze(-1), dim=1)
    return hidden_states[positions] if positions.dim() == 2 else hidden_states[:, positions]


def _with_aux_losses(forward: Callable, output_class: type) -> Callable:
    """Add the auxiliary losses to the loss of one of Transformers' Generic heads.

    Such a `forward` passes keywords on to the base model, but it drops outputs of the base model it does not know.
    """
    names = list(inspect.signature(forward).parameters)[1:]  # without self

    @wraps(forward)
    @can_return_tuple
    def forward_with_aux_losses(self, *args, router_aux_loss_coef: float | None = None, **kwargs):
        kwargs |= dict(zip(names, args, strict=False))
        self._check_recorded(kwargs, head=type(self).__name__)
        has_labels = any(kwargs.get(name) is not None for name in ("labels", "start_positions"))
        aux_losses = self._collect_aux_losses(has_labels, router_aux_loss_coef)
        outputs = output_class(**forward(self, **kwargs, aux_losses=aux_losses, return_dict=True))
        return self._add_aux_losses(outputs, aux_losses)

    return forward_with_aux_losses


# The Generic classes supply `forward`. Their `__init__` would build the base model through AutoModel. That asks for
# consent to run code a second time if the model was loaded from a folder's code. Their losses are means over a
# micro-batch whatever `num_items_in_batch` is (transformers#47688), so Trainer must divide them by the accumulation
# steps.
class PeerForSequenceClassification(GenericForSequenceClassification, PeerPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding."""

    accepts_loss_kwargs = False
    forward = _with_aux_losses(GenericForSequenceClassification.forward, PeerSequenceClassifierOutputWithPast)

    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PeerForTokenClassification(GenericForTokenClassification, PeerPreTrainedModel):
    """The decoder with a classifier on every token."""

    accepts_loss_kwargs = False
    forward = _with_aux_losses(GenericForTokenClassification.forward, PeerTokenClassifierOutput)

    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class PeerForQuestionAnswering(GenericForQuestionAnswering, PeerPreTrainedModel):
    """The decoder with a span head: start and end logits of every token."""

    accepts_loss_kwargs = False
    forward = _with_aux_losses(GenericForQuestionAnswering.forward, PeerQuestionAnsweringModelOutput)

    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.model = PeerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


register_names(PeerConfig.model_type)

__all__ = [
    "PeerForCausalLM",
    "PeerForMaskedLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerModel",
    "PeerPreTrainedModel",
]


if __name__ == "modeling_peer":
    import_package(__name__, os.path.dirname(os.path.abspath(__file__)))

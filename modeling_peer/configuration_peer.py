# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerConfig: every size and option of a PEER model, and the checks that reject impossible ones."""

import difflib
import json
import math
import os
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2CLS
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging
from transformers.utils.type_validators import interval

from .grown_pools_peer import check_grown_pools, check_retrieval
from .travelling_code_peer import SPARSE_MLP_CLASSES, keep_own_layers

if TYPE_CHECKING:
    # Never imported. Transformers copies the files that a source text imports, so a configuration saved by itself
    # comes with the code that its `auto_map` names.
    from .modeling_peer import PeerForCausalLM  # noqa: F401

# The layers available where the `mlp_layer_types` entry is "sparse".
SPARSE_MLPS = tuple(SPARSE_MLP_CLASSES)
# Those that retrieve by product keys.
PRODUCT_KEY_MLPS = ("peer", "product_key_memory")
# Those whose experts are rows of large tables, which a token reads few of.
TABLE_MLPS = (*PRODUCT_KEY_MLPS, "hashed_memory")

# Every numeric field except token ids is in one of these two tables; a test checks that.
# Integers: the least value. Kernels and file formats count in 32 bits along one axis.
LARGEST_SIZE = 2**31 - 1
LEAST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 1,
    "num_sub_keys": 1,
    "num_retrieval_heads": 1,
    "num_experts_per_head": 1,
    "query_dim": 2,
    "num_moe_experts": 1,
    "moe_intermediate_size": 1,
    "num_moe_experts_per_token": 1,
    "num_slots_per_expert": 1,
    "max_ngram_size": 2,
    "num_hash_heads": 1,
    "num_rows_per_hash_head": 1,
    "ngram_dim": 1,
    "ngram_conv_size": 1,
    "chunk_size_feed_forward": 0,
}
LARGEST_NUM_LAYERS = 2**16
# Real numbers: the interval, whether its lower end is outside, and what to try.
INTERVALS = {
    "initializer_range": (0, 1, False, "0.02"),
    "rms_norm_eps": (0, math.inf, True, "1e-6"),
    "attention_dropout": (0, 1, False, "0"),
    "classifier_dropout": (0, 1, False, "0"),
    "expert_dropout": (0, 1, False, "0"),
    "expert_init_gain": (0, math.inf, True, "4, or 1"),
    "router_aux_loss_coef": (0, math.inf, False, "0.01, or 0 to leave auxiliary losses out of the loss"),
    "moe_capacity_factor": (0, math.inf, True, "1.25"),
}
# The least capacity factor of `expert_choice_moe`, which rounds it to a fraction of thousandths.
LEAST_CAPACITY_FACTOR = 1e-3

logger = logging.get_logger(__name__)


@strict
class PeerConfig(PreTrainedConfig):
    r"""
    Configuration of a decoder in which some feed-forward layers are PEER layers (He 2024, arXiv:2407.04153).

    A PEER layer has `num_sub_keys**2` experts of one neuron each. Every token retrieves
    `num_retrieval_heads * num_experts_per_head` of them by product keys. The other fields are those of
    [`LlamaConfig`].

    Args:
        > Which layers are sparse, and what stands there

        mlp_layer_types (`list[str]`, *optional*):
            `"sparse"` or `"dense"` for each layer. Unset, the middle layer is sparse and the others are dense, as in
            the paper (block 6 of 12).
        sparse_mlp (`str`, *optional*, defaults to `"peer"`):
            The layer used in the sparse layers: `"peer"`, or one that it is compared with. Those are
            `"product_key_memory"`, which has PEER's sizes, `"hashed_memory"`, `"top_k_moe"`, `"expert_choice_moe"`,
            `"soft_moe"` (with `is_causal=False`) and `"multilinear_moe"`.
        parallel_dense_mlp (`bool`, *optional*, defaults to `False`):
            Keep the dense MLP beside the sparse one and add the two outputs. The paper replaces the dense MLP.
        parallel_hashed_memory (`bool`, *optional*, defaults to `False`):
            Put a hashed memory beside each sparse layer and add the two outputs.

        > Retrieval: product keys, queries and gates

        num_sub_keys (`int`, *optional*, defaults to 1024):
            Sub-keys per codebook, n. The pool has n² experts.
        num_retrieval_heads (`int`, *optional*, defaults to 8):
            Independent query networks, h. They share the experts.
        num_experts_per_head (`int`, *optional*, defaults to 16):
            Experts each head retrieves, k; at most `num_sub_keys`.
        query_dim (`int`, *optional*, defaults to 256):
            Width of one head's query, both halves together. The paper does not state it. This is the value in the
            product-key memory notebook it cites.
        share_sub_keys (`bool`, *optional*):
            One pair of codebooks for all heads rather than one pair per head. Unset, it is as in the papers: `True`
            for PEER, `False` for product-key memory.
        query_norm (`str`, *optional*, defaults to `"batch_norm"`):
            Normalisation of the queries: `"batch_norm"` (paper), `"rms_norm"`, `"layer_norm"` or `"none"`.
        gate_activation (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` over the k scores of one head (paper), or `"sigmoid"` of each score.

        > Experts

        expert_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the single neuron: any Transformers activation, or `"identity"`. The paper gives ReLU and
            GELU as examples and does not say which it used.
        gated_experts (`bool`, *optional*, defaults to `False`):
            GLU experts, `act(x · gate) * (x · down) * up`, with a third table.
        share_expert_tables (`bool`, *optional*, defaults to `False`):
            All sparse layers use and train the same experts. Each layer has its own queries and sub-keys, or router.
        expert_dropout (`float`, *optional*, defaults to 0.0):
            Probability of dropping each expert that a token retrieved, in training.
        num_kept_experts (`int`, *optional*):
            Experts of each pool that have rows in the tables; unset, all have. The others are retrieved as before and
            add nothing. [`adaptation.slicing.slice_experts`] and `peer slice` write such a checkpoint and set this
            field; which experts were kept is in its tensors `experts.row_of_expert`. A new model keeps the first ones.
        expert_init_gain (`float`, *optional*, defaults to 4.0):
            Standard deviation of the pre-activations at initialisation; the paper states no initialisation.
        row_sparse_gradients (`bool`, *optional*, defaults to `False`):
            Whether gradients of the expert tables are sparse tensors of the rows that a step retrieved. Memory and
            time of a step then depend on those rows and not on the size of the pool. The optimizer must accept such
            gradients: [`modeling_peer.optim.RowSparseAdamW`]. With `experts_implementation="cpu"` the rows are
            computed only when they are read, and that optimizer does not read them.
        expert_table_format (`str`, *optional*):
            How the rows of the expert tables are stored: `"int8"`, `"int4"` (two to a byte) or `"float8_e4m3"`, each
            with one float32 scale per row. Unset, they are plain floats. Quantised tables are frozen.
            [`quantise_expert_tables`] and `peer quantise` write them, and set this field. It is a field of ours, not a
            method in `quantization_config`, because Transformers skips an unknown method with a warning and raises
            when one is registered twice. An unknown format is refused here.

        > Growth: pools of experts that were added to a trained model

        grown_pools (`list[dict]`, *optional*):
            Pools of experts beside the first one of PEER layers, oldest first. Each entry has `layers`, the numbers of
            those layers, and the pool's own `num_sub_keys`, `num_retrieval_heads`, `num_experts_per_head`, `query_dim`
            and `query_norm`. All other fields are those of the model. [`adaptation.growth.grow`] and `peer grow` add
            pools and set this field. A new pool adds zero until it is trained.

        > Auxiliary losses

        balance_loss (`str`, *optional*):
            Auxiliary loss that evens out the use of rows and columns of the grid of experts: `"switch"` or
            `"uniformity"` ([`balance_loss_peer.balance_loss`]). The paper has none. In training, and whenever
            labels are given, `aux_loss` is its sum over the sparse layers, without padding. A `loss` includes
            `router_aux_loss_coef * aux_loss`, in evaluation too, as in Transformers' mixtures of experts. A Trainer
            that computes the loss itself (`label_smoothing_factor`, `compute_loss_func`) must add it.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the auxiliary losses in `loss`. The Switch Transformer uses 0.01; Monet's uniformity loss
            uses 0.001.

        > Product-key memory

        gated_memory (`bool`, *optional*, defaults to `False`):
            Product-key memory multiplies its output by `silu(x W_1)` and projects the product, as Memory+ does
            ([`PeerProductKeyMemory`]).

        > Hashed n-gram memory

        max_ngram_size (`int`, *optional*, defaults to 3):
            Longest n-gram, N, that addresses rows. There are rows for n = 2 to N ([`PeerHashedMemory`]).
        num_hash_heads (`int`, *optional*, defaults to 8):
            Hashes of each n-gram, K, each with a table of its own. A token reads `(N - 1) * K` rows.
        num_rows_per_hash_head (`int`, *optional*, defaults to 131072):
            Rows of a table. Each table takes a prime number of its own, from this one on.
        ngram_dim (`int`, *optional*):
            Width of the rows of one token, side by side; unset, `hidden_size`. It must be a multiple of `(N - 1) * K`.
        ngram_conv_size (`int`, *optional*, defaults to 4):
            Taps of the causal convolution, whose dilation is N. With 1, it reads no earlier token.

        > Coarse mixtures of experts

        num_moe_experts (`int`, *optional*, defaults to 8):
            Number of coarse experts, each an MLP, in the mixtures (`top_k_moe`, `expert_choice_moe`, `soft_moe`,
            `multilinear_moe`).
        moe_intermediate_size (`int`, *optional*):
            Width of one coarse expert; unset, `intermediate_size`.
        num_moe_experts_per_token (`int`, *optional*, defaults to 2):
            Coarse experts of one token in a `top_k_moe` with the router `"noisy_top_k"`. With 1 the router learns
            from its load loss only.
        moe_router (`str`, *optional*, defaults to `"noisy_top_k"`):
            Router of `top_k_moe`: `"noisy_top_k"` with importance and load losses (Shazeer et al. 2017), or
            `"switch"` with one expert, a capacity and its balance loss (Fedus et al. 2021). `router_aux_loss_coef` is
            the weight of the losses of both.
        moe_capacity_factor (`float`, *optional*):
            Capacity of one expert, divided by the number of tokens it would get if all got the same. It applies to
            `"switch"` in training (unset, 1.25). In `expert_choice_moe` it is the mean number of experts of a token
            (unset, 2).
        num_slots_per_expert (`int`, *optional*, defaults to 1):
            Slots of each `soft_moe` expert, per sequence.

        > Multilinear mixtures

        multilinear_form (`str`, *optional*, defaults to `"cp"`):
            How `multilinear_moe` factorises the tensor of its experts: `"cp"` or `"tensor_ring"`.
        multilinear_ranks (`list[int]`, *optional*):
            Ranks of the factors: one for `"cp"` (unset, 3/4 of `hidden_size`), three for `"tensor_ring"` (unset, 4, 4
            and a fifth of `hidden_size`).

        > Masked language models and heads

        is_causal (`bool`, *optional*, defaults to `True`):
            Whether a token sees only those before it. `False` is for masked language models and classifiers, and
            `soft_moe` needs it. There is no cache then, and `position_ids` that restart do not separate packed
            sequences.
        classifier_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the head of [`PeerForTokenClassification`].

    ```python
    >>> from modeling_peer import PeerConfig, PeerForCausalLM

    >>> config = PeerConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_sub_keys=128)
    >>> config.num_peer_experts, config.num_active_experts, config.mlp_layer_types
    (16384, 128, ['dense', 'sparse', 'dense', 'dense'])
    >>> model = PeerForCausalLM(config)
    ```"""

    model_type = "peer"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "expert_ids", "expert_gates", "aux_loss"]
    # Expert tables are sharded by rows (parallel_peer.py). Retrieval is replicated.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.dense_mlp.gate_proj": "colwise",
        "layers.*.dense_mlp.up_proj": "colwise",
        "layers.*.dense_mlp.down_proj": "rowwise",
        "layers.*.mlp.experts": "expert_rows",
        "layers.*.grown_pools.*.experts": "expert_rows",
        "layers.*.hashed_memory.experts": "expert_rows",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.down_embed": "expert_rows",
        "layers.*.mlp.experts.up_embed": "expert_rows",
        "layers.*.mlp.experts.gate_embed": "expert_rows",
        "layers.*.mlp.experts.down_scale": "expert_rows",
        "layers.*.mlp.experts.up_scale": "expert_rows",
        "layers.*.mlp.experts.gate_scale": "expert_rows",
        "layers.*.mlp.experts": "ep_dispatch_experts",
        "layers.*.grown_pools.*.experts.down_embed": "expert_rows",
        "layers.*.grown_pools.*.experts.up_embed": "expert_rows",
        "layers.*.grown_pools.*.experts.gate_embed": "expert_rows",
        "layers.*.grown_pools.*.experts.down_scale": "expert_rows",
        "layers.*.grown_pools.*.experts.up_scale": "expert_rows",
        "layers.*.grown_pools.*.experts.gate_scale": "expert_rows",
        "layers.*.grown_pools.*.experts": "ep_dispatch_experts",
        "layers.*.hashed_memory.experts.up_embed": "expert_rows",
        "layers.*.hashed_memory.experts.up_scale": "expert_rows",
        "layers.*.hashed_memory.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    classifier_dropout: int | float = interval(min=0.0, max=1.0)(default=0.0)

    mlp_layer_types: list[str] | None = None
    sparse_mlp: str = "peer"
    parallel_dense_mlp: bool = False
    parallel_hashed_memory: bool = False
    num_sub_keys: int = 1024
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_dim: int = 256
    share_sub_keys: bool | None = None
    query_norm: Literal["batch_norm", "rms_norm", "layer_norm", "none"] = "batch_norm"
    gate_activation: Literal["softmax", "sigmoid"] = "softmax"
    expert_act: str = "gelu"
    gated_experts: bool = False
    share_expert_tables: bool = False
    expert_dropout: int | float = interval(min=0.0, max=1.0)(default=0.0)
    num_kept_experts: int | None = None
    grown_pools: list[dict] | None = None
    expert_init_gain: int | float = 4.0
    row_sparse_gradients: bool = False
    expert_table_format: Literal["int8", "int4", "float8_e4m3"] | None = None
    balance_loss: Literal["switch", "uniformity"] | None = None
    router_aux_loss_coef: int | float = 0.01

    gated_memory: bool = False
    max_ngram_size: int = 3
    num_hash_heads: int = 8
    num_rows_per_hash_head: int = 131072
    ngram_dim: int | None = None
    ngram_conv_size: int = 4
    num_moe_experts: int = 8
    moe_intermediate_size: int | None = None
    num_moe_experts_per_token: int = 2
    moe_router: Literal["noisy_top_k", "switch"] = "noisy_top_k"
    moe_capacity_factor: int | float | None = None
    num_slots_per_expert: int = 1
    multilinear_form: Literal["cp", "tensor_ring"] = "cp"
    multilinear_ranks: list[int] | None = None
    is_causal: bool = True

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)  # 0 heads: refused below
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mlp_layer_types is None:
            num_layers = min(self.num_hidden_layers, LARGEST_NUM_LAYERS)  # more: refused below
            middle = (num_layers - 1) // 2
            self.mlp_layer_types = ["sparse" if i == middle else "dense" for i in range(num_layers)]
        if self.share_sub_keys is None:
            self.share_sub_keys = self.sparse_mlp != "product_key_memory"
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.ngram_dim is None:
            self.ngram_dim = self.hidden_size
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Like `PreTrainedConfig.get_config_dict`, but a missing file is an error.

        There it means the defaults, which are 2.3 billion parameters.

        Raises:
            OSError: there is no config.json, or it is empty.
        """
        fields, others = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields.keys() - {"_commit_hash"}:  # which older releases add
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json, or an empty one, so the sizes of the model are "
                "unknown. If a save there was cut off, save again. Otherwise pass config=PeerConfig(...) with the "
                "sizes of the weights."
            )
        return fields, others

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Like `PreTrainedConfig.save_pretrained`, with the code of the layers that this configuration has.

        Raises:
            ValueError: this is the code of a checkpoint, and lacks the layer that `sparse_mlp` names.
        """
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if self._auto_class is not None:  # the code was saved too
            keep_own_layers(save_directory, self.sparse_mlp_names)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        if self._auto_class is not None:
            keep_own_layers(working_dir, self.sparse_mlp_names)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "PeerConfig":
        """The configuration of a preset (`peer presets` lists them), with fields overridden.

        Raises:
            ValueError: there is no preset of this name, or the package is not installed: presets are not copied
                into checkpoints.
        """
        try:
            folder = files("modeling_peer") / "configuration" / "models"
        except ModuleNotFoundError as error:
            raise ValueError(f"preset {name!r} comes with the package, which is not installed.") from error
        presets = {path.name.removesuffix(".json"): path for path in folder.iterdir() if path.name.endswith(".json")}
        if name not in presets:
            raise ValueError(_unknown_name("preset", name, tuple(sorted(presets))))
        fields = json.loads(presets[name].read_text(encoding="utf-8"))
        fields.pop("model_type")
        return cls(**{**fields, **overrides})

    @property
    def has_aux_losses(self) -> bool:
        """Whether the sparse layers have auxiliary losses: balance losses or router losses."""
        return self.balance_loss is not None or self.sparse_mlp == "top_k_moe"

    @property
    def sparse_mlp_names(self) -> tuple[str, ...]:
        """Names of the layers that stand in the sparse layers, side by side."""
        return (self.sparse_mlp, "hashed_memory") if self.parallel_hashed_memory else (self.sparse_mlp,)

    @property
    def has_hashed_memory(self) -> bool:
        """Whether a layer of this model looks up rows by tokens."""
        return "sparse" in self.mlp_layer_types and "hashed_memory" in self.sparse_mlp_names

    @property
    def layer_types(self) -> list[str]:
        """What the cache keeps of each layer, in Transformers' words.

        A hashed memory needs the last tokens. A cache keeps them where the layer is `"hybrid"`, beside its keys and
        values. Without a hashed memory, reading it raises AttributeError, so `hasattr` is false.
        """
        if not self.has_hashed_memory:
            raise AttributeError(f"{type(self).__name__} without hashed_memory has no layer_types.")
        return ["hybrid" if kind == "sparse" else "full_attention" for kind in self.mlp_layer_types]

    @property
    def number_of_conv_states(self) -> int:
        """States that the cache keeps of a `"hybrid"` layer: tokens and, for a convolution, values."""
        return 1 if self.ngram_conv_size == 1 else 2

    @property
    def num_ngram_tables(self) -> int:
        """Tables of a hashed memory, of which a token reads a row each: `(max_ngram_size - 1) * num_hash_heads`."""
        return (self.max_ngram_size - 1) * self.num_hash_heads

    @property
    def num_peer_experts(self) -> int:
        """Experts in the pool of one sparse layer, `num_sub_keys**2`."""
        return self.num_sub_keys**2

    @property
    def num_expert_rows(self) -> int:
        """Rows of each expert table: `num_kept_experts`, or one for each expert of the pool."""
        return self.num_peer_experts if self.num_kept_experts is None else self.num_kept_experts

    @property
    def num_active_experts(self) -> int:
        """Experts used by one token in one sparse layer, all heads together."""
        return self.num_retrieval_heads * self.num_experts_per_head

    @property
    def multilinear_factor_ranks(self) -> list[int]:
        """`multilinear_ranks`, or the defaults if unset."""
        if self.multilinear_ranks is not None:
            return self.multilinear_ranks
        if self.multilinear_form == "cp":
            return [max(1, 3 * self.hidden_size // 4)]
        return [4, 4, max(1, self.hidden_size // 5)]

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` after construction and before saving."""
        self._validate_numbers()
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): choose sizes that divide."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key-value head serves a whole group of query heads."
            )
        if self.head_dim < 2 or self.head_dim % 2 != 0:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even and at least 2: rotary embeddings turn pairs of features. "
                f"Try {max(2, self.head_dim + self.head_dim % 2)}; unset, it is hidden_size / num_attention_heads."
            )
        self._validate_layer_names()
        self._validate_retrieval()
        self._validate_hashed_memory()
        self._validate_mixtures()
        check_grown_pools(self)
        self._validate_total_sizes()
        for message in self._what_cannot_learn():
            logger.warning_once(message)

    def _validate_numbers(self):
        """Check each number on its own."""
        for name, least in LEAST_SIZES.items():
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):  # `@strict` skips Transformers' own fields
                raise ValueError(f"{name} must be an integer, got {size!r}.")
            most = LARGEST_NUM_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
            if name in ("query_dim", "head_dim") and size < least:
                continue  # refused below, with the reason
            if not least <= size <= most:
                bound = f"at least {least}" if size < least else f"at most {most}"
                raise ValueError(f"{name} must be {bound}, got {size}.")
        for name, (least, most, least_excluded, example) in INTERVALS.items():
            value = getattr(self, name)
            if value is None and name == "moe_capacity_factor":
                continue
            enough = value > least if least_excluded else value >= least
            if not (enough and value <= most and math.isfinite(value)):
                bound = f"{'above' if least_excluded else 'at least'} {least}"
                bound += f" and at most {most}" if math.isfinite(most) else ""
                finite = "" if math.isfinite(value) else " and finite"
                raise ValueError(f"{name} must be {bound}{finite}, got {value}: try {example}.")
        for name, value in (self.rope_parameters or {}).items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
                if is_number and not (math.isfinite(number) and number > 0):
                    raise ValueError(f"rope_parameters[{name!r}] must be above 0 and finite, got {number}.")
        self._validate_token_numbers()

    def _validate_token_numbers(self):
        # Some checkpoints have ids outside the vocabulary (-1: none), so Transformers only warns of them. Ids that
        # cannot mean anything are refused.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and abs(token) > LARGEST_SIZE:
                    raise ValueError(f"{name} is {token}: no vocabulary has such a token. Leave it unset for none.")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id ({self.pad_token_id}) must be below vocab_size ({self.vocab_size}): its embedding is "
                "zero, so it must have one. Raise vocab_size, or set pad_token_id to None."
            )

    def _validate_total_sizes(self):
        """Check the element counts of the largest tensors, which torch holds in 64 bits."""
        mixture = max(self.num_moe_experts, self.num_slots_per_expert) * self.moe_intermediate_size
        for fields, rows in (
            ("num_sub_keys**2", self.num_peer_experts),
            ("num_moe_experts * moe_intermediate_size", mixture),
            # the next prime is less than twice a number
            ("2 * num_ngram_tables * num_rows_per_hash_head", 2 * self.num_ngram_tables * self.num_rows_per_hash_head),
        ):
            if rows * self.hidden_size >= 2**63:
                raise ValueError(
                    f"{fields} ({rows}) times hidden_size ({self.hidden_size}) is {rows * self.hidden_size}: a tensor "
                    "has at most 2**63 - 1 elements. Lower one."
                )

    def _what_cannot_learn(self) -> list[str]:
        """One or two sentences on each choice that is allowed but leaves parameters without a gradient."""
        found = [
            f"{name}={getattr(self, name)} drops all of it in training, so nothing before it learns. Lower it."
            for name in ("attention_dropout", "classifier_dropout")
            if getattr(self, name) == 1
        ]
        if self.vocab_size == 1:
            found.append("vocab_size=1: with a single token there is nothing to predict, and the loss is always 0.")
        if "sparse" not in self.mlp_layer_types:
            return found
        if self.sparse_mlp in PRODUCT_KEY_MLPS:
            return found + self._what_cannot_learn_of_retrieval()
        return found + self._what_cannot_learn_of_mixtures()

    def _what_cannot_learn_of_retrieval(self) -> list[str]:
        found = []
        weighs = self.balance_loss is not None and self.router_aux_loss_coef > 0
        if self.num_experts_per_head == 1 and self.gate_activation == "softmax":
            found.append(
                "num_experts_per_head=1 with gate_activation='softmax': the gate of a single expert is always 1, so "
                f"the query network and the sub-keys {'learn of balance_loss only' if weighs else 'do not learn'}. "
                "Set gate_activation='sigmoid', or num_experts_per_head to 2 or more."
            )
        if self.balance_loss is not None and not weighs:
            found.append(
                f"balance_loss={self.balance_loss!r} with router_aux_loss_coef=0: the loss is computed and weighs "
                "nothing. Raise router_aux_loss_coef, or leave balance_loss unset."
            )
        if self.query_norm == "layer_norm" and self.query_dim == 2:
            found.append(
                "query_norm='layer_norm' with query_dim=2: LayerNorm makes (1, -1) or (-1, 1) of any two numbers, so "
                "query_proj hardly learns. Raise query_dim."
            )
        if self.expert_dropout == 1:
            found.append("expert_dropout=1 drops every expert in training, so none learns. Lower it.")
        return found

    def _what_cannot_learn_of_mixtures(self) -> list[str]:
        if self.num_moe_experts == 1 and self.sparse_mlp != "soft_moe":  # its slots choose among tokens
            return [
                f"num_moe_experts=1 with sparse_mlp={self.sparse_mlp!r}: the only expert's gate is always 1, so the "
                "router does not learn. Set num_moe_experts to 2 or more."
            ]
        if self.num_moe_experts == 2 and self.sparse_mlp == "multilinear_moe":
            return [
                "num_moe_experts=2 with sparse_mlp='multilinear_moe': LayerNorm makes (1, -1) or (-1, 1) of any two "
                "logits, so the router hardly learns. Set num_moe_experts to 3 or more."
            ]
        noisy_top_k = self.sparse_mlp == "top_k_moe" and self.moe_router == "noisy_top_k"
        if noisy_top_k and self.num_moe_experts_per_token == 1:
            learns = "learns of its load loss only" if self.router_aux_loss_coef > 0 else "does not learn"
            return [
                "num_moe_experts_per_token=1 with moe_router='noisy_top_k': the gate of a single expert is always 1, "
                f"so the router {learns}. Set num_moe_experts_per_token to 2 or more, or moe_router='switch'."
            ]
        return []

    def _validate_layer_names(self):
        # Transformers checks `mlp_layer_types` only in configurations that also have `layer_types`.
        unknown = sorted(set(self.mlp_layer_types) - {"sparse", "dense"})
        if unknown:
            raise ValueError(
                f'mlp_layer_types has {unknown}: each entry must be "sparse" or "dense"; '
                f"what stands in the sparse layers is named by sparse_mlp, one of {list(SPARSE_MLPS)}."
            )
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types names {len(self.mlp_layer_types)} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}: give one entry per layer, or leave it unset to make the middle one sparse."
            )
        if self.sparse_mlp not in SPARSE_MLPS:
            raise ValueError(_unknown_name("sparse_mlp", self.sparse_mlp, SPARSE_MLPS))
        for field, activations in (("hidden_act", tuple(ACT2CLS)), ("expert_act", ("identity", *ACT2CLS))):
            if getattr(self, field) not in activations:
                raise ValueError(_unknown_name(field, getattr(self, field), activations))

    def _validate_retrieval(self):
        check_retrieval(self)
        if self.num_kept_experts is not None and not 1 <= self.num_kept_experts <= self.num_peer_experts:
            raise ValueError(
                f"num_kept_experts ({self.num_kept_experts}) must be from 1 to num_sub_keys**2 "
                f"({self.num_peer_experts}). Leave it unset to keep all."
            )

    def _validate_hashed_memory(self):
        if "hashed_memory" not in self.sparse_mlp_names:
            return
        if self.ngram_dim % self.num_ngram_tables != 0:
            tables = self.num_ngram_tables
            raise ValueError(
                f"ngram_dim ({self.ngram_dim}) is not a multiple of (max_ngram_size - 1) * num_hash_heads ({tables}), "
                f"the rows that share it. Try {max(1, self.ngram_dim // tables) * tables}."
            )
        row_width = self.ngram_dim // self.num_ngram_tables
        if self.expert_table_format == "int4" and row_width % 2:
            raise ValueError(
                "expert_table_format='int4' packs two numbers into a byte, so the width of a row, ngram_dim / "
                f"((max_ngram_size - 1) * num_hash_heads) = {row_width}, must be even. Use 'int8', or another "
                "ngram_dim."
            )
        if self.sparse_mlp == "hashed_memory" and self.parallel_hashed_memory:
            raise ValueError(
                "parallel_hashed_memory=True puts a hashed memory beside another layer, and sparse_mlp is "
                "'hashed_memory' itself. Leave it unset."
            )

    def _validate_mixtures(self):
        if self.balance_loss is not None and self.sparse_mlp not in PRODUCT_KEY_MLPS:
            raise ValueError(
                f"balance_loss={self.balance_loss!r} evens out product keys, which sparse_mlp={self.sparse_mlp!r} "
                f"does not have ({', '.join(PRODUCT_KEY_MLPS)} do). Leave balance_loss unset."
            )
        for name in ("gated_experts", "expert_dropout", "num_kept_experts"):
            if getattr(self, name) and self.sparse_mlp not in PRODUCT_KEY_MLPS:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for what product keys retrieve, and "
                    f"sparse_mlp={self.sparse_mlp!r} has none ({', '.join(PRODUCT_KEY_MLPS)} do). Leave it unset."
                )
        for name in ("row_sparse_gradients", "expert_table_format"):
            if getattr(self, name) and not set(self.sparse_mlp_names) & set(TABLE_MLPS):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for tables that a token reads few rows of, and "
                    f"sparse_mlp={self.sparse_mlp!r} has none ({', '.join(TABLE_MLPS)} do). Leave it unset."
                )
        if self.expert_table_format == "int4" and self.hidden_size % 2:
            raise ValueError(
                f"expert_table_format='int4' packs two numbers into a byte, so hidden_size ({self.hidden_size}) must "
                "be even. Use 'int8', or another hidden_size."
            )
        if self.share_expert_tables and self.sparse_mlp == "multilinear_moe":
            raise ValueError(
                "share_expert_tables=True: sparse layers share their experts, and a multilinear_moe has none apart "
                "from its factors. Leave it unset, or choose another sparse_mlp."
            )
        if self.gated_experts and self.sparse_mlp == "product_key_memory":
            raise ValueError(
                "gated_experts=True gates neurons, and the values of a product-key memory have none. Leave it unset; "
                "gated_memory=True gates what the memory puts out."
            )
        if self.gated_memory and self.sparse_mlp != "product_key_memory":
            raise ValueError(
                f"gated_memory=True gates a product-key memory, but sparse_mlp is {self.sparse_mlp!r}. Leave it "
                'unset, or set sparse_mlp="product_key_memory".'
            )
        if self.sparse_mlp == "soft_moe" and self.is_causal:
            raise ValueError(
                "sparse_mlp='soft_moe' mixes all tokens of a sequence, later ones included, so a causal model would "
                "see what it is to predict. Use it with is_causal=False, in PeerForMaskedLM or under a classification "
                "head, or choose another sparse_mlp."
            )
        noisy_top_k = self.sparse_mlp == "top_k_moe" and self.moe_router == "noisy_top_k"
        if noisy_top_k and self.num_moe_experts_per_token > self.num_moe_experts:
            raise ValueError(
                f"num_moe_experts_per_token ({self.num_moe_experts_per_token}) exceeds num_moe_experts "
                f"({self.num_moe_experts}): a token cannot use more experts than there are. Lower one."
            )
        factor = self.moe_capacity_factor
        if self.sparse_mlp == "expert_choice_moe" and factor is not None and factor < LEAST_CAPACITY_FACTOR:
            raise ValueError(
                f"moe_capacity_factor ({factor}) must be at least {LEAST_CAPACITY_FACTOR} in an expert_choice_moe: it "
                "is the mean number of experts of a token, and below that experts would choose no token. Try 2."
            )
        wanted = 1 if self.multilinear_form == "cp" else 3
        ranks = self.multilinear_ranks
        if ranks is not None and (len(ranks) != wanted or not 1 <= min(ranks) <= max(ranks) <= LARGEST_SIZE):
            raise ValueError(
                f"multilinear_ranks is {ranks}, but the form {self.multilinear_form!r} has {wanted}, "
                f"each at least 1 and at most {LARGEST_SIZE}. Leave it unset for the defaults."
            )


def _unknown_name(field: str, name: str, known: tuple[str, ...]) -> str:
    """Message for a `name` that is unknown to `field`, with the nearest known one."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{field}={name!r} is unknown.{hint} Known: {', '.join(known)}."


__all__ = ["PeerConfig"]

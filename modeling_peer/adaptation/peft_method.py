# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PEER layers as an adapter of PEFT, for any causal model whose decoder layers have an MLP.

    import modeling_peer.adaptation.peft_method  # registers the method "PEER" with PEFT
    from modeling_peer.adaptation.peft_method import PeerAdapterConfig

    model = get_peft_model(base, PeerAdapterConfig(num_sub_keys=128))  # the logits of `base`, until it is trained
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")

A `PeerLayer` beside the MLP reads what the MLP reads and adds to what it returns. The adapter's file has the queries,
the sub-keys and the tables. It cannot be merged: an MLP has no place for retrieval.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

try:
    from peft import PeftConfig
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import PeftType, register_peft_method
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ModuleNotFoundError(
        "PEER adapters need PEFT, which is not installed. It comes with the extra 'finetune'.", name="peft"
    ) from error

from modeling_peer.adaptation.added_layers import (
    LAYER_FIELDS,
    build_layer,
    check_readers,
    checked_config,
    chosen_layers,
    find_decoder_mlps,
    read_as_inputs,
)
from modeling_peer.adaptation.mlp_inputs import hidden_states_of, input_covariances
from modeling_peer.configuration_peer import PeerConfig
from modeling_peer.layer_peer import PeerLayer

METHOD = "peer"


@dataclass
class PeerAdapterConfig(PeftConfig):
    """Configuration of an adapter of PEER layers. The fields not named here are those of [`PeerConfig`].

    Args:
        layers: numbers of the decoder layers that get a PEER layer; unset, the middle one.
        mlp_name: what the decoder layers call their MLP.
        readers: how the reading vectors of experts start: `"random"`, or `"neurons"`, the MLP's own. To draw them
            with the covariance of the MLP's inputs, call `start_from_inputs` on the result of `get_peft_model`.
        query_norm: `"rms_norm"`, `"layer_norm"` or `"none"`. Not the paper's `"batch_norm"`: an MLP is not told which
            tokens are padding, so padding would enter the statistics, and its statistics would change in generation.
        modules_to_save: other modules of the model that train and are saved whole, such as `["lm_head"]`.
        target_modules: names of the MLPs, filled in when the adapter is put into a model.
    """

    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers; unset, the middle one."})
    mlp_name: str = field(default="mlp", metadata={"help": "What decoder layers call their MLP."})
    num_sub_keys: int = field(default=256, metadata={"help": "n: each pool has n * n experts."})
    num_retrieval_heads: int = field(default=8, metadata={"help": "Independent query networks."})
    num_experts_per_head: int = field(default=16, metadata={"help": "Experts that each head retrieves."})
    query_dim: int = field(default=256, metadata={"help": "Width of one head's query."})
    share_sub_keys: bool = field(default=True, metadata={"help": "One pair of codebooks for all heads."})
    query_norm: str = field(default="rms_norm", metadata={"help": "rms_norm, layer_norm or none."})
    gate_activation: str = field(default="softmax", metadata={"help": "softmax or sigmoid."})
    expert_act: str = field(default="gelu", metadata={"help": "Activation of an expert."})
    gated_experts: bool = field(default=False, metadata={"help": "GLU experts, with a third table."})
    expert_dropout: float = field(default=0.0, metadata={"help": "Probability of dropping a retrieved expert."})
    expert_init_gain: float = field(default=4.0, metadata={"help": "Scale of pre-activations at the start."})
    row_sparse_gradients: bool = field(
        default=False, metadata={"help": "Sparse gradients of the tables, for modeling_peer.optim.RowSparseAdamW."}
    )
    readers: str = field(default="random", metadata={"help": "random, or neurons."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Filled in: names of the MLPs."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.PEER
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        if self.query_norm == "batch_norm":
            raise ValueError(
                "query_norm='batch_norm' does not work in an adapter: the base model does not tell its MLPs which "
                "tokens are padding, and its generation would change the statistics. Use 'rms_norm'."
            )

        if self.readers == "inputs":
            raise ValueError(
                "readers='inputs' needs a text, and a configuration has none. Leave readers='random', and call "
                "modeling_peer.adaptation.peft_method.start_from_inputs(model, tokens) on what get_peft_model returns."
            )

    def peer_config(self, hidden_size: int, initializer_range: float) -> PeerConfig:
        """The configuration of one PEER layer in a model of this width."""
        fields = {name: getattr(self, name) for name in ("num_sub_keys", *LAYER_FIELDS)}
        return checked_config(
            hidden_size=hidden_size,
            num_attention_heads=1,
            head_dim=2,  # no attention is built
            num_hidden_layers=1,
            initializer_range=initializer_range,
            **fields,
        )


class PeerAdapterLayer(nn.Module, BaseTunerLayer):
    """An MLP, and beside it one `PeerLayer` per adapter. The outputs of the active ones are added to the MLP's."""

    adapter_layer_names = ("peer_layers",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.peer_layers = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, config: PeerConfig, readers: str, inference_mode: bool) -> None:
        """Put a new PEER layer beside the MLP, and make it the active one."""
        layer = build_layer(config, self.base_layer, readers)
        self.peer_layers[adapter_name] = layer.train(self.base_layer.training)
        self.set_adapter(adapter_name, inference_mode=inference_mode)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        active = [name for name in self.active_adapters if name in self.peer_layers]
        if self.disable_adapters or not active:
            return output
        hidden_states = hidden_states_of(args, kwargs)
        added = sum(self._run(self.peer_layers[name], hidden_states) for name in active)
        if torch.is_tensor(output):
            return output + added.to(output.dtype)
        if isinstance(output, tuple) and output and torch.is_tensor(output[0]):  # mixtures return router logits too
            return (output[0] + added.to(output[0].dtype), *output[1:])
        raise TypeError(
            f"{type(self.base_layer).__name__} returns a {type(output).__name__}. A PEER layer can be added to a "
            "tensor, or to the first one of a tuple."
        )

    @staticmethod
    def _run(layer: PeerLayer, hidden_states: torch.Tensor) -> torch.Tensor:
        # the base may be bfloat16 and the adapter float32
        return layer(hidden_states.to(layer.retrieval.query_proj.weight.dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        _refuse_merging()

    def unmerge(self) -> None:
        _refuse_merging()


def _refuse_merging() -> None:
    raise ValueError(
        "A PEER adapter cannot be merged: a token retrieves its experts, and an MLP has no place for that. Keep the "
        "adapter, or remove it (unload()). To have one checkpoint, start from modeling_peer.adaptation.retrofit "
        "(Llama, Mistral, Qwen2)."
    )


class PeerAdapterModel(BaseTuner):
    """Puts PEER layers into a model and manages them: what PEFT calls a tuner."""

    prefix = f"{METHOD}_"
    tuner_layer_cls = PeerAdapterLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args, **kwargs):
        _check_base(model)  # first: PEFT would put the new configuration into that of another adapter
        super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Check everything, name the MLPs, and let PEFT replace them.

        Raises:
            ValueError: the model has no such MLPs, or fields do not fit. It is as it was.
        """
        config = self.peft_config[adapter_name]
        names = {part for name, _ in model.named_modules() for part in name.split(".")}
        if adapter_name in names | _names_in_layer():
            raise ValueError(f"the adapter's name {adapter_name!r} is that of a module. Choose another one.")
        mlps = find_decoder_mlps(model, config.mlp_name)
        if config.target_modules is None:
            chosen = chosen_layers(config.layers, len(mlps))
            targets = [mlp for mlp in mlps if mlp.layer in chosen]
        else:  # as an earlier call filled it in
            targets = [mlp for mlp in mlps if mlp.name in list(config.target_modules)]
        if config.target_modules is not None and len(targets) < len(config.target_modules):
            raise ValueError(
                f"target_modules is {config.target_modules}, and the MLPs of {type(model).__name__} are named "
                f"{mlps[0].name} and so on. Leave target_modules unset and give layers."
            )
        peer_config = config.peer_config(*_width_and_range(model))
        for mlp in targets:
            module = mlp.module.base_layer if isinstance(mlp.module, PeerAdapterLayer) else mlp.module
            check_readers(config.readers, module, peer_config.hidden_size)
        config.layers, config.target_modules = [mlp.layer for mlp in targets], [mlp.name for mlp in targets]
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        layer = target if isinstance(target, PeerAdapterLayer) else PeerAdapterLayer(target)
        layer.add(
            adapter_name,
            peft_config.peer_config(*_width_and_range(self.model)),
            peft_config.readers,
            peft_config.inference_mode,
        )
        if adapter_name not in self.active_adapters:
            layer.peer_layers[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        _refuse_merging()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the adapter float32, or give it the dtype of the model, with `autocast_adapter_dtype=False`."""
        if autocast_adapter_dtype:
            return
        dtype = getattr(self.model, "dtype", torch.float32)
        for module in self.model.modules():
            if isinstance(module, PeerAdapterLayer) and adapter_name in module.peer_layers:
                module.peer_layers[adapter_name].to(dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the name before the last part, and a PEER layer has modules in modules.
        head, separator, tail = key.rpartition(f".peer_layers.{adapter_name}.")
        if separator:
            return f"{head}.peer_layers.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


@torch.no_grad()
def start_from_inputs(model: nn.Module, tokens: torch.Tensor, adapter_name: str = "default") -> None:
    """Draw the reading vectors of a new adapter with the covariance of what its MLPs read on a sample of text.

    Call it after `get_peft_model` or `add_adapter`, before training. The logits stay as they are.

    Args:
        tokens: `(num_sequences, sequence_length)`, without padding; at least as many tokens as the model is wide.

    Raises:
        ValueError: there is no such adapter, it is trained, or the sample does not fit. Nothing is changed then.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, PeerAdapterLayer) and adapter_name in module.peer_layers
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER adapter {adapter_name!r}.")
    new = [layer.peer_layers[adapter_name] for layer in layers]
    if any(layer.experts.up_embed.any() for layer in new):
        raise ValueError(
            f"the adapter {adapter_name!r} is trained: other reading vectors would change what it computes. Call "
            "start_from_inputs on a new adapter."
        )
    covariances = input_covariances(model, [layer.base_layer for layer in layers], tokens)
    for layer, covariance in zip(new, covariances, strict=True):
        read_as_inputs(layer, covariance)


def _check_base(model: nn.Module) -> None:
    """Raise ValueError if this is not a causal model of Transformers without adapters."""
    name = type(model).__name__
    others = {type(module).__name__ for module in model.modules() if isinstance(module, BaseTunerLayer)}
    if others - {PeerAdapterLayer.__name__}:
        raise ValueError(
            f"{name} has another adapter already ({', '.join(sorted(others))}). Merge or unload it first."
        )
    if others:
        raise ValueError(
            f"{name} has a PEER adapter already. Add another with add_adapter(name, config), or unload() the first."
        )
    if getattr(getattr(model, "config", None), "model_type", None) is None:
        raise ValueError(f"{name} has no configuration of Transformers. Adapt a causal model of Transformers.")
    if not _is_causal_model(model):
        raise ValueError(
            f"{name} is not a causal language model of Transformers: PEER adapters are for AutoModelForCausalLM."
        )


def _names_in_layer() -> set[str]:
    """Names of the parts of a PEER layer, which keys of an adapter's file contain."""
    config = PeerConfig(num_sub_keys=16, gated_experts=True, query_norm="rms_norm")
    with torch.device("meta"):
        return {part for name, _ in PeerLayer(config).named_parameters() for part in name.split(".")}


def _is_causal_model(model: nn.Module) -> bool:
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return type(model).__name__ in names or type(model).__name__.endswith("ForCausalLM")


def _width_and_range(model: nn.Module) -> tuple[int, float]:
    config = model.config.get_text_config()
    return config.hidden_size, getattr(config, "initializer_range", None) or 0.02


def _register() -> None:
    """Make PEFT know the method. A second import of this file replaces the classes of the first."""
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise ImportError("this PEFT is too old for PEER adapters: update it (0.21.2 works).")
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(METHOD.upper())
    if known is not None:
        if known.__module__ != __name__ or known.__qualname__ != PeerAdapterConfig.__qualname__:
            raise ImportError(
                f"PEFT has a method {METHOD.upper()!r} already: {known.__module__}.{known.__qualname__}. Ours "
                "cannot be used beside it."
            )
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            del mapping[PeftType.PEER]
    _add_peft_type(METHOD.upper())
    register_peft_method(name=METHOD, config_cls=PeerAdapterConfig, model_cls=PeerAdapterModel)


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which has no way to be extended.

    Its members are strings. Every use of one is as a key or a string.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


_register()

__all__ = ["PeerAdapterConfig", "PeerAdapterLayer", "PeerAdapterModel", "start_from_inputs"]

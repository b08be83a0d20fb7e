# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models, configurations and tokenizers by preset, folder or Hub id, with errors that name the cause."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig

import modeling_peer
from modeling_peer.console.command_line import Overrides, parse_arguments
from modeling_peer.console.errors import SettingsError, nearest, require_numbers
from modeling_peer.console.files import find_file
from modeling_peer.console.names import PRESETS_FOLDER, locate_model, locate_tokenizer, preset_files

NEXT_TOKEN = "the next token"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Weights that do not fit the configuration raise RuntimeError, damaged ones SafetensorError.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError, AttributeError)
TOO_LARGE = re.compile(r"allocate memory|out of memory|[Oo]verflow|Storage size|MemoryError|too large")
# fields of the wrong type, or with impossible numbers
CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, MemoryError)
CONFIG_ERRORS += (StrictDataclassError,)


@dataclass
class CheckpointArguments:
    """The checkpoint, and how it is loaded."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint folder or Hub id, PEER or not."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights. auto: the stored type."})
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "Implementation of the experts: eager, or a registered name. Unset: PEER chooses."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model code of the checkpoint. Read it first."}
    )

    def __post_init__(self):
        require_numbers(self)

    def load(
        self, model: str | None = None, tokenizer: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """`load_checkpoint` of `self.model`, or of `model` in its place."""
        return load_checkpoint(
            model or self.model, tokenizer, self.dtype, self.experts_implementation, self.trust_remote_code
        )


def parse_with_checkpoint(cls: type, words: Sequence[str]) -> Any:
    """Arguments of a class with the field `model`; a first word without dashes is the model."""
    words = list(words)
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    return parse_arguments(cls, words)


@dataclass
class ModelArguments:
    """Model and tokenizer."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "For new weights: a configuration (.json file, or the name of one in configuration/models). "
            "For fine-tuning: a checkpoint folder or Hub id."
        },
    )
    model_overrides: Overrides = field(
        default_factory=Overrides,
        metadata={
            "nargs": "+",
            "action": "extend",  # repeated uses add up, on the command line and in the recipe
            "help": "Configuration fields to change, as key=value pairs or one JSON object: "
            'num_sub_keys=64 \'mlp_layer_types=["dense", "sparse"]\'. Added to those of the recipe.',
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "'train': byte-level BPE learned from the training text. 'bytes': one token per byte. "
            "Otherwise a tokenizer folder or Hub id. Unset: the checkpoint's own, or 'train' for a new model."
        },
    )
    tokenizer_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Tokens to learn with tokenizer 'train'. Unset: the configuration's vocab_size."},
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "Which code runs the experts: eager, or a registered name. Unset: PEER picks."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the stored weights. Use float32 with mixed precision (--bf16)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the checkpoint. Read that code first."}
    )

    def __post_init__(self):
        require_numbers(self)
        self.model_overrides = Overrides(self.model_overrides)


def is_new_model(model: str | None) -> bool:
    """Whether `model` names a configuration rather than a checkpoint: a preset's name, or a .json file."""
    return model is not None and (model in preset_files() or (model.endswith(".json") and not Path(model).is_dir()))


def load_preset(model: str, overrides: dict | None = None) -> PreTrainedConfig:
    """Read a configuration from JSON (any `model_type` known to AutoConfig), with fields overridden.

    Raises:
        SettingsError: the file or a field does not exist, or fields do not fit together.
    """
    path = find_file(model, PRESETS_FOLDER, ".json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # from JSON or from UTF-8
        raise SettingsError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise SettingsError(f"{path} must be a JSON object with a model_type, such as 'peer'.")
    fields |= overrides or {}
    model_type = fields.pop("model_type")
    try:
        default = AutoConfig.for_model(model_type)
        _require_known_fields(fields, default)
        return AutoConfig.for_model(model_type, **fields)
    except SettingsError:
        raise
    except CONFIG_ERRORS as error:
        raise SettingsError(f"{path}{f' with {overrides}' if overrides else ''}: {error}") from error


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The configuration of the new model or of the checkpoint, with overrides applied."""
    if arguments.model is None:
        raise SettingsError(
            "--model is missing. Name a configuration (configuration/models/*.json), a checkpoint or a Hub id."
        )
    overrides = arguments.model_overrides
    if is_new_model(arguments.model):
        return load_preset(arguments.model, overrides)
    try:
        source = locate_model(arguments.model, trained=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
        _require_known_fields(overrides, config)
        return AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code, **overrides)
    except CONFIG_ERRORS as error:
        raise SettingsError(f"cannot open {arguments.model!r}: {error}") from error


def check_dtype(name: str) -> str:
    """Return `name` if weights can have this dtype; otherwise raise SettingsError."""
    if name not in DTYPES:
        raise SettingsError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}.{nearest(name, DTYPES)}")
    return name


def load_checkpoint(
    model: str | None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Raises:
        SettingsError: the checkpoint does not exist, or is not a causal language model.
    """
    if not model:
        raise SettingsError("--model is missing. Name a checkpoint folder or a Hub id.")
    options = {"dtype": check_dtype(dtype), "trust_remote_code": trust_remote_code}
    if experts_implementation:
        options["experts_implementation"] = experts_implementation
    try:
        source = locate_model(model, trained=True)
        network = AutoModelForCausalLM.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise SettingsError(f"cannot load {model!r}: {cause_of(error)}") from error
    loaded = open_tokenizer(tokenizer or model, trust_remote_code)
    if tokenizer:
        require_own_vocabulary(loaded, tokenizer, source, trust_remote_code)
    require_embeddings(loaded, network.get_input_embeddings().num_embeddings, "Use the checkpoint's own tokenizer.")
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), loaded


def own_model_class(config: PreTrainedConfig, name: str, function: str) -> type[PreTrainedModel]:
    """The class of this package that a checkpoint's configuration names.

    Args:
        name: of the checkpoint, for the message.
        function: what to call instead on a loaded model.

    Raises:
        SettingsError: the package has no such class.
    """
    class_name = (config.architectures or ["PeerForCausalLM"])[0]
    model_class = getattr(modeling_peer, class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise SettingsError(
            f"{name!r} is a {class_name}, which modeling_peer does not have. Load it, and call {function} and "
            "save_pretrained."
        )
    return model_class


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class of the language model that a configuration describes."""
    return AutoModelForMaskedLM if predicts_masked_tokens(config) else AutoModelForCausalLM


def predicts_masked_tokens(config: PreTrainedConfig) -> bool:
    """Whether a language model of this configuration is a masked one, which means not causal."""
    return not getattr(config, "is_causal", True)


def objective(config: PreTrainedConfig, masking_probability: float) -> str:
    """A description of what a language model of this configuration learns to predict."""
    if predicts_masked_tokens(config):
        return f"masked tokens, {100 * masking_probability:g} % at a time"
    return NEXT_TOKEN


def open_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(locate_tokenizer(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library has no error class of its own
        raise SettingsError(f"cannot load a tokenizer from {source!r}: {error}") from error


def require_own_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, model: str, trust_remote_code: bool) -> None:
    """Raise SettingsError if the checkpoint has a tokenizer whose tokens differ from those of `tokenizer`."""
    try:
        own = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError):
        return
    given = tokenizer.get_vocab()
    if differing := sorted(token for token in own.keys() | given.keys() if own.get(token) != given.get(token)):
        raise SettingsError(
            f"tokenizer {name!r} has {len(given)} tokens, the one of {model!r} {len(own)}; {len(differing)} differ, "
            f"such as {', '.join(map(repr, differing[:3]))}. Use the checkpoint's own: leave --tokenizer unset."
        )


def require_embeddings(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, way_out: str) -> None:
    """Raise SettingsError if a token has no embedding."""
    if len(tokenizer) > num_embeddings:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings} embeddings. {way_out}"
        )


def cause_of(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # advice for code, which a command line cannot follow
        return (
            "the weights do not fit the configuration; the report above has both shapes. Overrides cannot change the "
            "size of a weight of a checkpoint."
        )
    return str(error)


def _require_known_fields(fields: dict, config: PreTrainedConfig) -> None:
    # a configuration accepts any field, so a misspelt one would have no effect
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | set(config.to_dict())
    known.add("auto_map")  # of a checkpoint with code
    for name in fields:
        if name not in known:
            raise SettingsError(f"{type(config).__name__} has no field {name!r}.{nearest(name, known)}")

"""The network and the tokenizer a recipe asks for: new from a configuration, or loaded from a checkpoint."""

import dataclasses
import json
import re
from pathlib import Path

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

import modeling_peer  # noqa: F401  registers PEER with the Auto classes
from modeling_peer.console.command_line import parse_overrides
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.files import find_file
from modeling_peer.training.data import Corpus
from modeling_peer.training.masking import predicts_masked_tokens
from modeling_peer.training.names import PRESETS_FOLDER, locate_model, locate_tokenizer, preset_files
from modeling_peer.training.parallelism import launched_sharding, new_sharded_model
from modeling_peer.training.recipes import ModelArguments
from modeling_peer.training.tokenizers import (
    byte_tokenizer,
    require_embeddings,
    require_own_vocabulary,
    train_byte_level_bpe,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# a checkpoint's weights that do not fit its configuration are a RuntimeError, damaged ones a SafetensorError
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError, AttributeError)
TOO_LARGE = re.compile(r"allocate memory|out of memory|[Oo]verflow|Storage size|MemoryError|too large")
# fields of another type, or such that no number of them can be had
CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, MemoryError)
CONFIG_ERRORS += (StrictDataclassError,)


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class of the language model that a configuration describes."""
    return AutoModelForMaskedLM if predicts_masked_tokens(config) else AutoModelForCausalLM


def is_new_model(model: str | None) -> bool:
    """Whether `model` names a configuration rather than a checkpoint: a preset's name, or a .json file."""
    return model is not None and (model in preset_files() or (model.endswith(".json") and not Path(model).is_dir()))


def load_preset(model: str, overrides: dict | None = None) -> PreTrainedConfig:
    """Read a configuration from JSON (any `model_type` known to AutoConfig), with fields overridden.

    Raises:
        SettingsError: no such file or field, or fields that do not fit each other.
    """
    path = find_file(model, PRESETS_FOLDER, ".json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
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
    """The configuration of the new model or of the checkpoint, overrides applied."""
    if arguments.model is None:
        raise SettingsError(
            "--model is missing: a configuration (configuration/models/*.json), a checkpoint or a Hub id."
        )
    overrides = parse_overrides(arguments.model_overrides)
    if is_new_model(arguments.model):
        return load_preset(arguments.model, overrides)
    try:
        source = locate_model(arguments.model, trained=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
        _require_known_fields(overrides, config)
        return AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code, **overrides)
    except CONFIG_ERRORS as error:
        raise SettingsError(f"cannot open {arguments.model!r}: {error}") from error


def load_tokenizer(
    arguments: ModelArguments, config: PreTrainedConfig, corpus: Corpus, checkpoint: str | None
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and where it comes from in words.

    Args:
        arguments: `tokenizer` says which; see its help.
        config: its vocab_size is how many tokens are learned unless the arguments say otherwise; a new tokenizer has
            a mask token if the model is to predict masked ones.
        corpus: what a new tokenizer is learned from.
        checkpoint: a run being resumed; its tokenizer is used whatever the arguments say.
    """
    wanted = arguments.tokenizer or ("train" if is_new_model(arguments.model) else arguments.model)
    if checkpoint:
        return _load_tokenizer(checkpoint, arguments.trust_remote_code), f"of the resumed run, {checkpoint}"
    with_mask = predicts_masked_tokens(config)
    if wanted == "bytes":
        return byte_tokenizer(with_mask), "one token a byte"
    if wanted == "train":
        size = arguments.tokenizer_vocab_size or config.vocab_size
        try:
            texts = (row[corpus.text_column] or "" for row in corpus.train)
            tokenizer = train_byte_level_bpe(texts, size, with_mask)
        except ValueError as error:
            raise SettingsError(f"tokenizer_{error}") from error
        return tokenizer, f"byte-level BPE learned from the training text (at most {size} asked for)"
    return _load_tokenizer(wanted, arguments.trust_remote_code), wanted


def check_dtype(name: str) -> str:
    """`name` if it is a type that weights can have, else SettingsError."""
    if name not in DTYPES:
        raise SettingsError(f"--dtype {name!r} is none of {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return name


def build_model(
    arguments: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    """New weights, or the checkpoint's; a new model's vocabulary is its tokenizer's unless overridden.

    Every process of a run calls this: the launch may want the model sharded over them.

    Args:
        folder: where processes may exchange new weights.

    Raises:
        SettingsError: the tokenizer has more tokens than the model has embeddings, or the weights cannot be loaded.
    """
    new = is_new_model(arguments.model)
    overrides = parse_overrides(arguments.model_overrides)
    if new and "vocab_size" not in overrides:
        config.vocab_size = len(tokenizer)
    if new:
        require_embeddings(tokenizer, config.vocab_size, f"Set --model_overrides vocab_size={len(tokenizer)}.")
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    else:
        name = arguments.tokenizer or arguments.model
        require_own_vocabulary(tokenizer, name, arguments.model, arguments.trust_remote_code)
        require_embeddings(tokenizer, config.vocab_size, "Use the checkpoint's own tokenizer.")
    options = {"dtype": check_dtype(arguments.dtype)}
    if arguments.experts_implementation:
        options["experts_implementation"] = arguments.experts_implementation
    sharding = launched_sharding()
    try:
        if new and sharding:
            return new_sharded_model(language_model_class(config), config, sharding, folder / "new_model", **options)
        if new:
            return language_model_class(config).from_config(config, **options)
        if sharding:
            options["distributed_config"] = sharding
        network = language_model_class(config).from_pretrained(
            locate_model(arguments.model, trained=True),
            config=config,
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )
    except (*LOADING_ERRORS, MemoryError, OverflowError) as error:
        if new and TOO_LARGE.search(f"{type(error).__name__}: {error}"):
            raise SettingsError(
                f"cannot build {arguments.model!r}{f' with {overrides}' if overrides else ''}: there is no memory for "
                f"weights of this size ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
            ) from error
        if new and isinstance(error, RuntimeError | TypeError | KeyError | AttributeError):
            raise  # nothing was loaded: not the user's doing
        raise SettingsError(
            f"cannot build {arguments.model!r}{f' with {overrides}' if overrides else ''}: {_cause(error)}"
        ) from error
    if hasattr(network, "freeze_running_statistics"):
        network.freeze_running_statistics(False)  # pretraining goes on; loading froze them, for fine-tuning
    return network


def _load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(locate_tokenizer(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise SettingsError(f"cannot load a tokenizer from {source!r}: {error}") from error


def _cause(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # advice for a program, not for a command line
        return (
            "the weights do not fit the configuration; the report above gives both shapes. Overrides of a checkpoint "
            "cannot change the size of a weight."
        )
    return str(error)


def _require_known_fields(fields: dict, config: PreTrainedConfig) -> None:
    # a configuration keeps whatever it is given, so a misspelt field would silently do nothing
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | set(config.to_dict())
    for name in fields:
        if name not in known:
            raise SettingsError(f"{type(config).__name__} has no field {name!r}.{nearest(name, known)}")


def load_checkpoint(
    model: str | None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Raises:
        SettingsError: nothing there, or not a causal language model.
    """
    if not model:
        raise SettingsError("--model is missing: a checkpoint folder or a Hub id.")
    options = {"dtype": check_dtype(dtype), "trust_remote_code": trust_remote_code}
    if experts_implementation:
        options["experts_implementation"] = experts_implementation
    try:
        source = locate_model(model, trained=True)
        network = AutoModelForCausalLM.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise SettingsError(f"cannot load {model!r}: {_cause(error)}") from error
    words = _load_tokenizer(tokenizer or model, trust_remote_code)
    if tokenizer:
        require_own_vocabulary(words, tokenizer, source, trust_remote_code)
    require_embeddings(words, network.get_input_embeddings().num_embeddings, "Use the checkpoint's own tokenizer.")
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), words

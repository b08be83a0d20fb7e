# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Network and tokenizer of a run: new from a configuration, or loaded from a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig

import modeling_peer  # noqa: F401  registers PEER with the Auto classes
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import locate_model
from modeling_peer.data.canonical_tokens import canonical_token_ids
from modeling_peer.data.corpus import Corpus
from modeling_peer.data.tokenizers import byte_tokenizer, train_byte_level_bpe
from modeling_peer.hub.loading import (
    LOADING_ERRORS,
    TOO_LARGE,
    ModelArguments,
    cause_of,
    check_dtype,
    is_new_model,
    language_model_class,
    open_tokenizer,
    predicts_masked_tokens,
    require_embeddings,
    require_own_vocabulary,
)
from modeling_peer.training.parallelism import launched_sharding, new_sharded_model


def load_tokenizer(
    arguments: ModelArguments, config: PreTrainedConfig, corpus: Corpus, checkpoint: str | None
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and a description of its origin.

    Args:
        arguments: the field `tokenizer` selects it; see its help.
        config: its vocab_size is the number of tokens to learn, unless `tokenizer_vocab_size` is set. For a masked
            language model, a new tokenizer has a mask token.
        corpus: the text that a new tokenizer is trained on.
        checkpoint: checkpoint of a resumed run. Its tokenizer is used, whatever the arguments are.

    Raises:
        SettingsError: the tokenizer cannot be loaded, or the number of tokens to learn is too small.
    """
    wanted = arguments.tokenizer or ("train" if is_new_model(arguments.model) else arguments.model)
    if checkpoint:
        return open_tokenizer(checkpoint, arguments.trust_remote_code), f"from the resumed run, {checkpoint}"
    with_mask = predicts_masked_tokens(config)
    if wanted == "bytes":
        return byte_tokenizer(with_mask), "one token per byte"
    if wanted == "train":
        size = arguments.tokenizer_vocab_size or config.vocab_size
        try:
            texts = (row[corpus.text_column] or "" for row in corpus.train)
            tokenizer = train_byte_level_bpe(texts, size, with_mask)
        except ValueError as error:
            raise SettingsError(f"tokenizer_{error}") from error
        return tokenizer, f"byte-level BPE learned from the training text (at most {size} tokens)"
    return open_tokenizer(wanted, arguments.trust_remote_code), wanted


def build_model(
    arguments: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    """A model with new weights, or with those of a checkpoint.

    A new model has as many embeddings as its tokenizer has tokens, unless vocab_size is overridden. All processes of a
    run must call this, because the launch may shard the model over them.

    Args:
        folder: a folder where processes can exchange new weights.

    Raises:
        SettingsError: the tokenizer has more tokens than the model has embeddings, or the weights cannot be loaded.
    """
    new = is_new_model(arguments.model)
    overrides = arguments.model_overrides
    if new and "vocab_size" not in overrides:
        config.vocab_size = len(tokenizer)
    if new and getattr(config, "expert_table_format", None):
        raise SettingsError(
            f"expert_table_format={config.expert_table_format!r}: quantised tables are not trained, and those of a "
            "new model are random. Train float tables, then use `peer quantise`."
        )
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
        if new:
            return _new_model(config, tokenizer, sharding, folder / "new_model", options)
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
                f"cannot build {arguments.model!r}{f' with {overrides}' if overrides else ''}: weights of this "
                f"size do not fit into memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
            ) from error
        if new and isinstance(error, RuntimeError | TypeError | KeyError | AttributeError):
            raise  # nothing was loaded, so this is a bug and not a wrong setting
        raise SettingsError(
            f"cannot build {arguments.model!r}{f' with {overrides}' if overrides else ''}: {cause_of(error)}"
        ) from error
    if hasattr(network, "freeze_running_statistics"):
        network.freeze_running_statistics(False)  # pretraining continues; loading froze them for fine-tuning
    return network


def _new_model(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, sharding, folder: Path, options: dict[str, Any]
) -> PreTrainedModel:
    """A model with new weights. A hashed memory gets one id for the tokenizer's tokens that mean the same."""
    build = language_model_class(config)
    if sharding:
        network = new_sharded_model(build, config, sharding, folder, **options)
    else:
        network = build.from_config(config, **options)
    if getattr(config, "has_hashed_memory", False):
        from modeling_peer.hashed_memory_peer import set_canonical_tokens

        set_canonical_tokens(network, canonical_token_ids(tokenizer, config.vocab_size))
    return network

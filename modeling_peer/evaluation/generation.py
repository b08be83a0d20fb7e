# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Continue prompts with any causal checkpoint: the function behind `peer generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import modeling_peer  # noqa: F401  registers PEER with the Auto classes
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import encode_prompt
from modeling_peer.hub.loading import CheckpointArguments


@dataclass
class GenerationArguments(CheckpointArguments):
    """The prompts, and the sampling of the next token."""

    prompt: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "One or more texts to continue. Special tokens in them count as text. Unset: start a document.",
        },
    )
    max_new_tokens: int = field(
        default=100, metadata={"help": "Tokens to add at most. Generation stops earlier at an end token."}
    )
    temperature: float = field(
        default=0.8,
        metadata={"help": "Divisor of the logits. Below 1 favours likely tokens. 0: always the likeliest token."},
    )
    top_k: int = field(default=50, metadata={"help": "Draw from this many likeliest tokens. 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the likeliest tokens of this total probability."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling. The same seed gives the same text."})


def generate_from_checkpoint(arguments: GenerationArguments) -> dict[str, Any]:
    """Load the model, continue every prompt, and print the texts. The result contains them, too."""
    model, tokenizer = arguments.load()
    print(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {model.device}")
    texts = continue_texts(model, tokenizer, arguments.prompt or [""], arguments)
    for text in texts:
        print(f"---\n{text}")
    print("---")
    return {"model": arguments.model, "texts": texts, "seed": arguments.seed}


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    arguments: GenerationArguments,
) -> list[str]:
    """Each prompt with its continuation.

    Prompts run one by one, without padding, so no prompt affects another through padding or batch composition.
    """
    was_training = model.training
    model.eval()
    set_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
        }
    texts = []
    for prompt in prompts:
        input_ids = _encode(prompt, tokenizer).to(model.device)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest and input_ids.shape[1] + arguments.max_new_tokens > longest:
            raise SettingsError(
                f"prompt ({input_ids.shape[1]} tokens) and max_new_tokens ({arguments.max_new_tokens}) exceed the "
                f"model's {longest} positions: shorten the prompt or lower --max_new_tokens."
            )
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=arguments.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(was_training)
    return texts


def _encode(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    try:
        ids = encode_prompt(tokenizer, prompt)
    except ValueError as error:
        raise SettingsError(f"--prompt: {error}") from error
    if (
        not ids
    ):  # Generation needs a first token. Without a begin token, the end token of a document also starts the next one.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise SettingsError("an empty prompt needs a tokenizer with a begin or end token; give a --prompt.")
        ids = [start]
    return torch.tensor([ids])

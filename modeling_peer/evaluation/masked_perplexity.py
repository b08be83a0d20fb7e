# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a masked language model."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def masked_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: torch.Tensor,
    masked_share: float = 0.15,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of every token, given the unmasked tokens of its block.

    A block is read `ceil(1 / masked_share)` times. Each time other tokens are masked, and each token is masked once.
    Salazar et al. 2020 (arXiv:1910.14659) mask one token at a time and read a block once per token. Special tokens are
    never masked, because models are not trained to predict them.

    The result is not a probability of the text. It is comparable only between masked models with the same tokenizer
    and number of rounds.

    Args:
        model: masked language model. Its training mode is the same afterwards.
        tokenizer: its tokenizer, with a mask token.
        blocks: `(num_blocks, block_size)`, int64.
        masked_share: largest share of a block's tokens that is masked at a time, above 0 and at most 1.

    Returns:
        perplexity: exp of the mean negative log-likelihood of a token.
        num_tokens: number of scored tokens.
        num_rounds: number of readings of each block.
    """
    if not 0 < masked_share <= 1:
        raise ValueError(f"masked_share ({masked_share}) must be above 0 and at most 1.")
    num_rounds = math.ceil(1 / masked_share - 1e-9)
    special_ids = torch.tensor(tokenizer.all_special_ids, device=model.device)
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    generator = torch.Generator().manual_seed(0)  # the same masks for every model
    for tokens in tqdm(blocks.split(batch_size), desc="Scoring masked tokens", disable=not show_progress):
        order = torch.rand(tokens.shape, generator=generator, device=generator.device).argsort(dim=-1).to(model.device)
        tokens = tokens.to(model.device)
        scored = ~torch.isin(tokens, special_ids)
        num_tokens += int(scored.sum())
        for number in range(num_rounds):
            masked = scored & (order % num_rounds == number)
            logits = model(input_ids=tokens.masked_fill(masked, tokenizer.mask_token_id)).logits[masked]
            nats += F.cross_entropy(logits.float(), tokens[masked], reduction="sum").item()
    model.train(was_training)
    if num_tokens == 0:
        raise ValueError("there is no token to score: the text is empty.")
    return {"perplexity": math.exp(nats / num_tokens), "num_tokens": num_tokens, "num_rounds": num_rounds}

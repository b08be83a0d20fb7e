"""Perplexity of a masked language model."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


@torch.no_grad()
def masked_perplexity(
    model: torch.nn.Module,
    blocks: Dataset,
    mask_token_id: int,
    masked_share: float = 0.15,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of every token given those of its block that are not masked with it.

    A block is read `num_rounds` times, each time with other tokens masked, until every one was. (Salazar et al. 2020,
    arXiv:1910.14659, mask one at a time, which takes as many readings as a block has tokens.) It is no probability of
    the text, and compares only with that of other masked models, at the same share and with the same tokenizer.

    Args:
        model: masked language model; left in the mode it is in.
        blocks: `{"input_ids": (block_size,)}` each.
        masked_share: of a block's tokens that are masked at a time, above 0 and at most 1.

    Returns:
        perplexity: exp of the mean negative log-likelihood of a token.
        num_tokens: how many were scored.
        num_rounds: readings of each block.
    """
    if not 0 < masked_share <= 1:
        raise ValueError(f"masked_share ({masked_share}) must be above 0 and at most 1.")
    num_rounds = math.ceil(1 / masked_share - 1e-9)
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    loader = DataLoader(blocks, batch_size=batch_size)
    for batch in tqdm(loader, desc="Scoring masked tokens", disable=not show_progress):
        input_ids = batch["input_ids"].to(model.device)
        generator = torch.Generator().manual_seed(num_tokens)  # batch by batch the same for every model
        order = torch.rand(input_ids.shape, generator=generator).argsort(dim=-1).to(model.device)
        for number in range(num_rounds):
            masked = order % num_rounds == number
            logits = model(input_ids=input_ids.masked_fill(masked, mask_token_id)).logits[masked]
            nats += F.cross_entropy(logits.float(), input_ids[masked], reduction="sum").item()
        num_tokens += input_ids.numel()
    model.train(was_training)
    return {"perplexity": math.exp(nats / num_tokens), "num_tokens": num_tokens, "num_rounds": num_rounds}

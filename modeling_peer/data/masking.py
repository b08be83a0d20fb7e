# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Masked language modelling: blocks with masked tokens, for models with bidirectional attention."""

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainerCallback

from modeling_peer.console.errors import SettingsError


class MaskedBlocks(torch.utils.data.Dataset):
    """Blocks for a masked language model: `{"input_ids": (block_size,), "labels": (block_size,)}`, int64.

    Of the tokens to predict, 80 % become the mask, 10 % another token, and 10 % stay unchanged. The labels of all
    other tokens are -100 (Devlin et al. 2019, section 3.1; arXiv:1810.04805). The choice depends only on seed, epoch
    and block. So a resumed run sees the same masks as an uninterrupted one.

    Args:
        blocks: blocks of unmasked tokens, under `input_ids`.
        probability: probability that a token must be predicted. Special tokens never are. In each block at least one
            other token is.

    Raises:
        SettingsError: the tokenizer has no mask token.
    """

    def __init__(
        self, blocks: torch.utils.data.Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int = 0
    ):
        require_mask_token(tokenizer)
        self.blocks = blocks
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # read by data-loader workers
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    @property
    def epoch(self) -> int:
        """The epoch of the current masks."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)
        self._collator.generator = generator = torch.Generator().manual_seed(int(seed[0]))
        tokens, tokenizer = self.blocks[index]["input_ids"], self._collator.tokenizer
        # a copy, because masking is in place
        input_ids, labels = (row[0] for row in self._collator.torch_mask_tokens(tokens.clone().unsqueeze(0)))
        if (labels == -100).all():  # a batch of such blocks would have no loss
            candidates = (
                (~torch.isin(tokens, torch.tensor(tokenizer.all_special_ids, device=tokens.device)))
                .nonzero()
                .flatten()
            )
            chosen = candidates[torch.randperm(len(candidates), generator=generator, device=generator.device)[:1]]
            labels[chosen], input_ids[chosen] = tokens[chosen], tokenizer.mask_token_id
        return {"input_ids": input_ids, "labels": labels}


class NewMasksEveryEpoch(TrainerCallback):
    """Sets the epoch of the training blocks; evaluation blocks keep their masks."""

    def __init__(self, blocks: MaskedBlocks):
        self.blocks = blocks

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.blocks.epoch = int(state.epoch)


def require_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise SettingsError if the tokenizer has no mask token."""
    if tokenizer.mask_token_id is None:
        raise SettingsError(
            "a model with is_causal=false learns to predict masked tokens, but the tokenizer has no mask token. Use "
            "--tokenizer train or bytes, a tokenizer with a mask token, or a causal model."
        )

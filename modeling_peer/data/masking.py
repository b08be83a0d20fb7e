# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Masked language modelling: blocks some of whose tokens are hidden from a model that sees both sides of each."""

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainerCallback

from modeling_peer.console.errors import SettingsError


class MaskedBlocks(torch.utils.data.Dataset):
    """Blocks as a masked language model takes them: `{"input_ids": (block_size,), "labels": (block_size,)}`, int64.

    Of the tokens to predict 80 % are the mask, 10 % another token, 10 % themselves, and all others' labels are -100
    (Devlin et al. 2019, section 3.1; arXiv:1810.04805). Which they are follows from seed, epoch and block alone, so a
    run that is resumed sees what it would have seen.

    Args:
        blocks: of unmasked tokens, under `input_ids`.
        probability: of a token to be predicted; special tokens are not, and at least one other of a block is.

    Raises:
        SettingsError: the tokenizer has no mask token.
    """

    def __init__(
        self, blocks: torch.utils.data.Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int = 0
    ):
        require_mask_token(tokenizer)
        self.blocks = blocks
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # seen by data-loader workers
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    @property
    def epoch(self) -> int:
        """Which epoch's masks they have."""
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
        # a copy: it is masked in place
        input_ids, labels = (row[0] for row in self._collator.torch_mask_tokens(tokens.clone().unsqueeze(0)))
        if (labels == -100).all():  # a batch of these would have no loss
            candidates = (
                (~torch.isin(tokens, torch.tensor(tokenizer.all_special_ids, device=tokens.device)))
                .nonzero()
                .flatten()
            )
            chosen = candidates[torch.randperm(len(candidates), generator=generator, device=generator.device)[:1]]
            labels[chosen], input_ids[chosen] = tokens[chosen], tokenizer.mask_token_id
        return {"input_ids": input_ids, "labels": labels}


class NewMasksEveryEpoch(TrainerCallback):
    """Tells training blocks which epoch it is; those of an evaluation keep their masks."""

    def __init__(self, blocks: MaskedBlocks):
        self.blocks = blocks

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.blocks.epoch = int(state.epoch)


def require_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise SettingsError when there is nothing to mask tokens with."""
    if tokenizer.mask_token_id is None:
        raise SettingsError(
            "a model with is_causal=false learns to predict masked tokens, and the tokenizer has no mask token: "
            "use --tokenizer train or bytes, or one with a mask_token; or leave the model causal."
        )

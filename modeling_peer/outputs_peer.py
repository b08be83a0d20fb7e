# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Outputs of PEER models: Transformers' own, plus the sparse layers' retrieved experts and auxiliary losses."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


@dataclass
class PeerModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and the retrieved experts, one entry per sparse layer.

    A layer with grown pools has an entry for its first pool, then one for each grown pool, oldest first. Sizes and ids
    are those of the pool.

    Args:
        expert_ids: with `output_expert_ids=True`; int64
            `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)` each.
        expert_gates: with `output_expert_gates=True`; the gates of those experts, float32, same shapes.
    """

    expert_ids: tuple[torch.LongTensor, ...] | None = None
    expert_gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class PeerCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, the retrieved experts of [`PeerModelOutputWithPast`], and `aux_loss`.

    `aux_loss` is the unweighted sum of the sparse layers' auxiliary losses, if they were computed.
    """

    expert_ids: tuple[torch.LongTensor, ...] | None = None
    expert_gates: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


@dataclass
class PeerMaskedLMOutput(MaskedLMOutput):
    """`MaskedLMOutput` and the additions of [`PeerCausalLMOutputWithPast`]."""

    expert_ids: tuple[torch.LongTensor, ...] | None = None
    expert_gates: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


@dataclass
class PeerSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` and the `aux_loss` of [`PeerCausalLMOutputWithPast`]."""

    aux_loss: torch.FloatTensor | None = None


@dataclass
class PeerTokenClassifierOutput(TokenClassifierOutput):
    """`TokenClassifierOutput` and the `aux_loss` of [`PeerCausalLMOutputWithPast`]."""

    aux_loss: torch.FloatTensor | None = None


@dataclass
class PeerQuestionAnsweringModelOutput(QuestionAnsweringModelOutput):
    """`QuestionAnsweringModelOutput` and the `aux_loss` of [`PeerCausalLMOutputWithPast`]."""

    aux_loss: torch.FloatTensor | None = None

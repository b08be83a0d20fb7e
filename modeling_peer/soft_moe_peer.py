# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Soft mixture of experts: every expert reads mixtures of a sequence's tokens."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .moe_experts_peer import PeerMoeExperts, check_moe_experts_implementation
from .retrieval_peer import real_tokens


class PeerSoftMoe(nn.Module):
    """Mixture without routing of single tokens (Puigcerver et al. 2023, section 2; arXiv:2308.00951).

        logits = x̂ (scale · Φ̂)ᵀ            tokens and slots, with rows of length 1, in the router only
        slots  = softmax over tokens(logits)ᵀ x                 each a convex mixture of the sequence's tokens
        y      = softmax over slots(logits) · experts(slots)    and each token's output one of the slots' outputs

    Every expert has `num_slots_per_expert` slots, whatever the length of a sequence: the work depends on the number of
    slots alone. No token is dropped, and there is nothing to balance. Each token's output depends on all tokens of its
    sequence, later ones included, so causal models refuse this layer. Padding enters no slot. As in the authors' code,
    Φ starts LeCun normal and the scale, a learned number, starts at 1. They have as many slots as tokens; here the
    number is a setting.
    """

    check_experts_implementation = staticmethod(check_moe_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        self.num_experts, self.num_slots = config.num_moe_experts, config.num_slots_per_expert
        self.slot_embed = nn.Parameter(torch.empty(self.num_experts * self.num_slots, config.hidden_size))  # Φᵀ
        # Not a scalar, because FSDP2 cannot shard scalars.
        self.scale = nn.Parameter(torch.empty(1))
        self.experts = PeerMoeExperts(config)
        if initialize:
            self.reset_parameters()
            self.experts.reset_parameters()

    def reset_parameters(self):
        init.lecun_normal_(self.slot_embed)
        init.ones_(self.scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(..., sequence_length, hidden_size)`, each sequence on its own; or one token
                `(hidden_size,)`.
            token_mask: `(..., sequence_length)`, true where a token is not padding.
            aux_losses: unused.

        Returns:
            Shape and dtype of `hidden_states`.
        """
        tokens = torch.atleast_2d(hidden_states)
        logits = self._logits(tokens)  # (..., sequence_length, slots of all experts)
        dispatched = logits
        if token_mask is not None:
            # Not -inf: a sequence of padding alone would give NaN.
            padding = ~real_tokens(token_mask, hidden_states.shape[:-1]).view(tokens.shape[:-1]).unsqueeze(-1)
            dispatched = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        slots = dispatched.softmax(dim=-2).to(tokens.dtype).mT @ tokens
        written = self._of_experts(slots)
        output = logits.softmax(dim=-1).to(written.dtype) @ written
        return output.to(hidden_states.dtype).view(hidden_states.shape)

    def _logits(self, tokens):
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with maybe_autocast(tokens.device.type, enabled=False):
            slots = self.scale.to(dtype) * _unit_length(self.slot_embed.to(dtype))
            return _unit_length(tokens.to(dtype)) @ slots.T

    def _of_experts(self, slots):
        """Run each slot through its expert, the i-th through `i // num_slots`: `(..., slots, hidden_size)`."""
        by_expert = slots.unflatten(-2, (self.num_experts, self.num_slots)).movedim(-3, 0)
        written = self.experts.of_slots(by_expert.flatten(1, -2)).view(by_expert.shape)
        return written.movedim(0, -3).flatten(-3, -2)


def _unit_length(rows: torch.Tensor) -> torch.Tensor:
    # The authors' epsilon.
    return rows * torch.rsqrt(rows.square().sum(dim=-1, keepdim=True) + 1e-6)

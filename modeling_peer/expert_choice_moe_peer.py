# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert-choice mixture: in training experts choose their tokens; elsewhere a threshold per expert decides."""

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .moe_experts_peer import PeerMoeExperts, check_moe_experts_implementation
from .query_norms_peer import RunningStatistics, is_recomputation
from .retrieval_peer import real_tokens


class PeerScoreThresholds(RunningStatistics):
    """Running mean of the lowest score that each expert chose in training, `(num_experts,)`.

    It is updated like BatchNorm's statistics.

    Args:
        num_experts: number of coarse experts.
        momentum: weight of the newest micro-batch, as in PyTorch's BatchNorm.
    """

    def __init__(self, num_experts: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.empty(num_experts, dtype=dtype))

    def reset_parameters(self):
        init.constant_(self.running_mean, 1 / len(self.running_mean))  # even scores

    def have_learned(self) -> bool:
        even = torch.full_like(self.running_mean, 1 / len(self.running_mean))
        return self.running_mean.is_meta or bool((self.running_mean != even).any())

    @torch.no_grad()
    def update(self, lowest_scores: torch.Tensor, enough: torch.Tensor):
        """Add one micro-batch to the means if it has `enough` tokens (a boolean scalar)."""
        if not is_recomputation():
            lowest_scores = torch.where(enough, lowest_scores, self.running_mean).to(self.running_mean.dtype)
            self.running_mean.lerp_(lowest_scores, self.momentum)


class PeerExpertChoiceMoe(nn.Module):
    """Mixture whose experts choose tokens, each the same number (Zhou et al. 2022; arXiv:2202.09368).

        scores = softmax over experts(x W)
        y      = Σ over the experts that chose x of  score · expert(x)

    In training, as published, `capacity = tokens · moe_capacity_factor / num_moe_experts`. Each expert takes that many
    tokens of this process's micro-batch: those that score highest with it. Tokens compete, so the experts of a token
    depend on later tokens and on other sequences. A training loss thus has seen a little of what it predicts.

    One token to decode leaves no such choice, and evaluation must not look ahead. There an expert takes every token
    that scores above its threshold, the running mean of the lowest score that it chose in training. The same holds
    where thresholds do not learn ([`RunningStatistics`]): in a loaded model, and with a frozen router. A token's
    experts then depend on that token alone, and number `moe_capacity_factor` on average.

    The thresholds are our choice. The alternative is the best experts of each token (Berges et al. 2024 evaluate with
    the best one). We compared them on 3 layers of width 64, with 8 experts in the middle one, after 1,600 steps of
    1,024 bytes of WikiText-2. The validation loss, in nats per byte and for one seed, was:

        the rule of training                      1.562
        thresholds (2.01 experts per token)       1.562
        the best two experts                      1.569
        the best one                              1.597
    """

    check_experts_implementation = staticmethod(check_moe_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        self.initializer_range = config.initializer_range
        capacity_factor = 2 if config.moe_capacity_factor is None else config.moe_capacity_factor
        # A fraction: 80 tokens · 1.1 / 8, rounded up, must be 11 for Python integers and for tensors.
        self.share_of_tokens = Fraction(capacity_factor).limit_denominator(1000) / config.num_moe_experts
        self.router = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        self.thresholds = PeerScoreThresholds(config.num_moe_experts)
        self.experts = PeerMoeExperts(config)
        if initialize:
            self.reset_parameters()
            self.experts.reset_parameters()

    def reset_parameters(self):
        init.normal_(self.router, std=self.initializer_range)
        self.thresholds.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(..., hidden_size)`.
            token_mask: `(...)`, true where a token is not padding. In training no expert chooses padding.
            aux_losses: unused, because there is nothing to balance.

        Returns:
            Shape and dtype of `hidden_states`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with maybe_autocast(tokens.device.type, enabled=False):
            scores = F.linear(tokens.to(dtype), self.router.to(dtype)).softmax(dim=-1)  # (t, experts)
        if self.training and self.thresholds.learns_with(self.router) and len(tokens) > 0:
            real = real_tokens(token_mask, hidden_states.shape[:-1])
            real = tokens.new_ones(len(tokens), dtype=torch.bool) if real is None else real
            output = self._by_choice(tokens, scores, real)
        else:
            output = self._by_thresholds(tokens, scores)
        return output.to(hidden_states.dtype).view(hidden_states.shape)

    def _by_choice(self, tokens, scores, token_mask):
        """Output of the rule of training.

        There are places for all tokens, padding included, so that shapes do not depend on the mask. Places that real
        tokens do not fill have a gate of 0.
        """
        places = min(len(tokens), self._capacity(len(tokens)))
        gates, token_ids = scores.masked_fill(~token_mask.unsqueeze(1), -1.0).T.topk(places)  # (experts, places)
        num_real = token_mask.sum()
        capacity = torch.minimum(self._capacity(num_real), num_real)
        empty = torch.arange(places, device=tokens.device) >= capacity
        # If there are too few tokens for one per expert, experts take lower scores than they would among many.
        enough = num_real * self.share_of_tokens.numerator >= self.share_of_tokens.denominator
        self.thresholds.update(gates.masked_fill(empty, torch.inf).amin(dim=-1), enough)
        written = self.experts.of_slots(tokens[token_ids]) * gates.masked_fill(empty, 0.0).unsqueeze(-1)
        return _sum_by_token(written.flatten(0, 1), token_ids.flatten(), tokens)

    def _by_thresholds(self, tokens, scores):
        chosen = scores > self.thresholds.running_mean
        if torch.compiler.is_compiling():
            # Shapes must not depend on the choice, so every expert computes every token.
            expert_ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
            return self.experts(tokens, expert_ids, scores.masked_fill(~chosen, 0.0))
        token_ids, expert_ids = chosen.nonzero(as_tuple=True)
        # One row per pair of token and expert, since tokens have unequal numbers of experts.
        written = self.experts(tokens[token_ids], expert_ids.unsqueeze(1), scores[chosen].unsqueeze(1))
        return _sum_by_token(written.to(scores.dtype), token_ids, tokens)

    def _capacity(self, num_tokens: int | torch.Tensor) -> int | torch.Tensor:
        """Number of tokens that one expert chooses among `num_tokens`, rounded up."""
        return -(-num_tokens * self.share_of_tokens.numerator // self.share_of_tokens.denominator)


def _sum_by_token(written: torch.Tensor, token_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return written.new_zeros(tokens.shape).index_add(0, token_ids, written)

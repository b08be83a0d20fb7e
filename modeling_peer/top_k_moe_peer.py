# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sparsely gated mixtures: each token runs through the few MLPs that score best in a linear map of it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .moe_experts_peer import PeerMoeExperts, check_moe_experts_implementation
from .retrieval_peer import real_tokens

# Least standard deviation of the noise, and the term that keeps CV² finite if all is 0. Both are the values of the
# authors' Tensor2Tensor.
NOISE_EPSILON = 1e-2
CV_EPSILON = 1e-10
INPUT_JITTER = 1e-2  # the Switch Transformer's
CAPACITY_FACTOR = 1.25  # the Switch Transformer works best with small ones, 1 and 1.25


class PeerTopKMoe(nn.Module):
    """Mixture of `num_moe_experts` MLPs, of which every token uses a few.

        y = Σ_k gate · e_id(x)

    `moe_router` selects the router: [`PeerNoisyTopKRouter`] or [`PeerSwitchRouter`]. In both sources an expert has one
    ReLU layer. Ours are gated MLPs, like the dense ones of this decoder, so that only the routing is compared.
    """

    check_experts_implementation = staticmethod(check_moe_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        self.router = ROUTERS[config.moe_router](config)
        self.experts = PeerMoeExperts(config)
        if initialize:
            self.router.reset_parameters()
            self.experts.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(..., hidden_size)`.
            token_mask: `(...)`, true where a token is not padding. Padding does not use an expert's capacity or enter
                the auxiliary losses.
            aux_losses: collects the router's auxiliary losses, unweighted. With `None` they are not computed.

        Returns:
            `(..., hidden_size)`, dtype of `hidden_states`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        real = real_tokens(token_mask, hidden_states.shape[:-1])
        real = tokens.new_ones(len(tokens), dtype=torch.bool) if real is None else real
        expert_ids, gates = self.router(tokens, real, aux_losses)  # (t, k) each
        return self.experts(tokens, expert_ids, gates).view(hidden_states.shape)


class PeerNoisyTopKRouter(nn.Module):
    """Noisy top-k gating (Shazeer et al. 2017, section 2.1 and appendix A; arXiv:1701.06538).

        H = x W_g + N(0, 1) · (softplus(x W_noise) + 0.01)
        gates = softmax over the k largest of H

    There is noise in training only. The auxiliary loss is CV²(importance) + CV²(load), where CV² is the variance over
    the squared mean of the experts. The importance of an expert is the sum of its gates. Its load is the expected
    number of its tokens if the noise of that expert were drawn again. In evaluation there is no noise, and the load is
    the number of its tokens: the limit of the expectation as the noise vanishes.

    Both matrices start at zero, so at first the noise alone chooses, evenly. With k = 1 the gate is always 1, and the
    router learns from the load loss only.
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.top_k = config.num_moe_experts_per_token
        self.score_weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))  # W_g
        self.noise_weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))  # W_noise

    def reset_parameters(self):
        init.zeros_(self.score_weight)
        init.zeros_(self.noise_weight)

    def forward(
        self, tokens: torch.Tensor, real: torch.Tensor, aux_losses: AuxiliaryLosses | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens: `(num_tokens, hidden_size)`.
            real: `(num_tokens,)`, false where a token is padding.

        Returns:
            expert_ids: `(num_tokens, k)`, int64, best first.
            gates: same shape, float32.
        """
        scores = noisy = _float32_linear(tokens, self.score_weight)  # (t, E)
        noise_std = None
        if self.training:
            noise_std = F.softplus(_float32_linear(tokens, self.noise_weight)) + NOISE_EPSILON
            noisy = scores + torch.randn_like(scores) * noise_std
        best, expert_ids = _best_first(noisy)
        expert_ids = expert_ids[:, : self.top_k]
        gates = best[:, : self.top_k].softmax(dim=-1)
        if aux_losses is not None:
            importance = torch.zeros_like(scores).scatter(1, expert_ids, gates)
            load = self._load(scores, noise_std, best, expert_ids)
            aux_losses.add(sum(_squared_variation(_total(share, real)) for share in (importance, load)))
        return expert_ids, gates

    def _load(self, scores, noise_std, best, expert_ids):
        """Probability that each expert is among a token's k if its own noise is drawn again: `(num_tokens, E)`."""
        chosen = torch.zeros_like(scores).scatter(1, expert_ids, 1.0)
        if noise_std is None or self.top_k == scores.shape[1]:
            return chosen
        # The score to beat is the k-th of the other experts.
        threshold = torch.where(chosen.bool(), best[:, self.top_k, None], best[:, self.top_k - 1, None])
        return torch.special.ndtr((scores - threshold) / noise_std)


class PeerSwitchRouter(nn.Module):
    """The router of the Switch Transformer: one expert a token (Fedus et al. 2021, section 2.1; arXiv:2101.03961).

        p = softmax(x W_r);  the expert is the one with the largest p, and p is its gate

    Its auxiliary loss is N · Σ_i f_i P_i (eqs. 4-6). f is the share of the tokens that choose expert i, and P is the
    mean of p. The loss is 1 when even.

    In training the router's input is multiplied by noise from U(0.99, 1.01). An expert takes at most
    `ceil(num_tokens / N · moe_capacity_factor)` of the micro-batch's tokens, the earlier ones. For the others the
    layer adds nothing to the residual. So a training output depends on the number of tokens and on earlier tokens,
    also those of earlier sequences in the batch. It does not depend on later ones.

    In evaluation no token is dropped; the source only raises the capacity. Otherwise generation could not equal the
    forward of the whole sequence.

    Our choice: weights start at N(0, `initializer_range`²), as elsewhere in this decoder. The paper's truncated normal
    of variance 0.1 / hidden_size has the same width at 256.
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        factor = config.moe_capacity_factor
        self.capacity_factor = CAPACITY_FACTOR if factor is None else factor
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))  # W_r

    def reset_parameters(self):
        init.normal_(self.weight, std=self.initializer_range)

    def forward(
        self, tokens: torch.Tensor, real: torch.Tensor, aux_losses: AuxiliaryLosses | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like [`PeerNoisyTopKRouter.forward`], with k = 1. The gate of a dropped token is 0."""
        if self.training:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - INPUT_JITTER, 1 + INPUT_JITTER)
        probabilities = _float32_linear(tokens, self.weight).softmax(dim=-1)  # (t, E)
        best, expert_ids = _best_first(probabilities)
        gates, expert_ids = best[:, :1], expert_ids[:, :1]
        chosen = torch.zeros_like(expert_ids).expand_as(probabilities).scatter(1, expert_ids, real.long().unsqueeze(1))
        if aux_losses is not None:
            num_tokens = real.sum().clamp(min=1)
            shares = chosen.sum(0) / num_tokens
            mean_probabilities = _total(probabilities, real) / num_tokens
            aux_losses.add(probabilities.shape[1] * (shares * mean_probabilities).sum())
        if self.training:
            capacity = (real.sum() * self.capacity_factor / probabilities.shape[1]).ceil()
            place = chosen.cumsum(0).gather(1, expert_ids)  # position in its expert's queue, from 1
            gates = gates.masked_fill(place > capacity, 0.0)
        return expert_ids, gates


ROUTERS = {"noisy_top_k": PeerNoisyTopKRouter, "switch": PeerSwitchRouter}


def _float32_linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`tokens @ weight.T` in float32, whatever the model's precision: rounded scores would choose other experts."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with maybe_autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), weight.to(dtype))


def _best_first(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of the experts, best first: `(num_tokens, E)` each.

    Among equal scores, as all are at first, the lower id comes first. That holds on every device and whatever the
    other tokens are; `topk` guarantees no order.
    """
    return scores.sort(dim=-1, descending=True, stable=True)


def _total(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Sum over the real tokens: `(num_tokens, E)` to `(E,)`."""
    return values.masked_fill(~real.unsqueeze(1), 0.0).sum(0)


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    return values.var(correction=0) / (values.mean().square() + CV_EPSILON)

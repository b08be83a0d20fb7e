# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Multilinear mixture of experts (Oldfield et al. 2024; arXiv:2402.12550): many experts, none materialised.

The matrices of N experts are slices of one tensor W, which exists only as factors. A token z gives each expert a
coefficient, and is multiplied by the mixed matrix, with a channel of ones for the bias:

    a = entmax(norm(z G));    y_o = Σ_n Σ_i a_n [z; 1]_i W_nio
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .moe_experts_peer import check_moe_experts_implementation


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(logits):
        # Halves of the logits, shifted so that the largest is 0. The threshold τ below it must give Σ (x - τ)₊² = 1.
        x = (logits - logits.amax(-1, keepdim=True)) / 2
        largest = x.sort(-1, descending=True).values
        size = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        # τ if exactly the `size` largest were above it: the smaller solution of a quadratic equation
        mean = largest.cumsum(-1) / size
        variance = largest.square().cumsum(-1) / size - mean.square()
        thresholds = mean - (1 / size - variance).clamp(min=0).sqrt()
        num_above = (thresholds <= largest).sum(-1, keepdim=True).clamp(min=1)  # 0 if logits are NaN
        return (x - thresholds.gather(-1, num_above - 1)).clamp(min=0).square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (probabilities,) = ctx.saved_tensors
        # The Jacobian is diag(s) - s sᵀ / Σ s, with s the roots of the probabilities.
        roots = probabilities.sqrt()
        product = grad * roots
        return product - roots * product.sum(-1, keepdim=True) / roots.sum(-1, keepdim=True)


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Entmax with α = 1.5 over the last dimension, between softmax and sparsemax: some probabilities are exactly 0.

    It is computed exactly, by sorting, and so is the gradient (Peters et al. 2019; arXiv:1905.05702).

    Args:
        logits: `(..., num_moe_experts)`, float32 or more.

    Returns:
        The same shape; the last dimension sums to 1.
    """
    return _Entmax15.apply(logits)


class PeerCPLinear(nn.Module):
    """W = Σ_r expert_factor[:, r] ∘ input_factor[:, r] ∘ output_factor[:, r], of one rank (eq. 2 of the paper).

    Initialised as in the authors' code: the experts' entries are around 1, so all start as variations of one matrix.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, ranks: list[int]):
        super().__init__()
        (rank,) = ranks
        self.expert_factor = nn.Parameter(torch.empty(num_experts, rank))
        self.input_factor = nn.Parameter(torch.empty(in_features + 1, rank))
        self.output_factor = nn.Parameter(torch.empty(out_features, rank))

    def reset_parameters(self):
        init.normal_(self.expert_factor, mean=1.0)
        _uniform_(self.input_factor, fan_in=len(self.input_factor) - 1)
        _uniform_(self.output_factor, fan_in=self.output_factor.shape[1])

    def forward(self, hidden_states: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, in_features)` and `(num_tokens, num_experts)` to `(num_tokens, out_features)`."""
        read = F.linear(hidden_states, self.input_factor[:-1].T, self.input_factor[-1])
        return F.linear(read * (coefficients @ self.expert_factor), self.output_factor)


class PeerTensorRingLinear(nn.Module):
    """W_nio = trace(expert_core[:, n] @ input_core[:, i] @ output_core[:, o]), of three ranks (eq. 4 of the paper).

    Initialised as in the authors' code: the experts' slices are diagonal, with entries around 1.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, ranks: list[int]):
        super().__init__()
        first, second, third = ranks
        self.expert_core = nn.Parameter(torch.empty(first, num_experts, second))
        self.input_core = nn.Parameter(torch.empty(second, in_features + 1, third))
        self.output_core = nn.Parameter(torch.empty(third, out_features, first))

    def reset_parameters(self):
        first, _, second = self.expert_core.shape
        diagonal = torch.eye(first, second, dtype=self.expert_core.dtype, device=self.expert_core.device).unsqueeze(1)
        init.copy_(self.expert_core, diagonal * (1 + torch.randn_like(self.expert_core)))
        _uniform_(self.input_core, fan_in=self.input_core.shape[1] - 1)
        _uniform_(self.output_core, fan_in=first * self.output_core.shape[0])

    def forward(self, hidden_states: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, in_features)` and `(num_tokens, num_experts)` to `(num_tokens, out_features)`."""
        mixed = torch.einsum("tn,pnq->tpq", coefficients, self.expert_core)
        read = torch.einsum("ti,qir->tqr", hidden_states, self.input_core[:, :-1]) + self.input_core[:, -1]
        return torch.einsum("tpr,rop->to", mixed @ read, self.output_core)


MULTILINEAR_FORMS = {"cp": PeerCPLinear, "tensor_ring": PeerTensorRingLinear}


class PeerMultilinearMoe(nn.Module):
    """Feed-forward of two multilinear layers with shared coefficients and a GELU between, as in the authors' GPT-2.

    Gating weights start at zero, so all experts count equally. Their logits go through LayerNorm without parameters,
    in float32. (BatchNorm, which the authors use for images, would let tokens see each other.) The inner width is
    `moe_intermediate_size`. The decoder normalises the input of experts and gate. The authors normalise it for the
    experts only.
    """

    check_experts_implementation = staticmethod(check_moe_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        form, ranks = MULTILINEAR_FORMS[config.multilinear_form], config.multilinear_factor_ranks
        num_experts, width, inner = config.num_moe_experts, config.hidden_size, config.moe_intermediate_size
        self.gating = nn.Parameter(torch.empty(width, num_experts))
        self.first = form(num_experts, width, inner, ranks)
        self.second = form(num_experts, inner, width, ranks)
        if initialize:
            for module in (self, self.first, self.second):
                module.reset_parameters()

    def reset_parameters(self):
        init.zeros_(self.gating)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> torch.Tensor:
        """Compute every token on its own, padding or not; there are no auxiliary losses.

        Args:
            hidden_states: `(..., hidden_size)`.

        Returns:
            The same shape and dtype.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        coefficients = self._coefficients(tokens).to(tokens.dtype)
        output = self.second(F.gelu(self.first(tokens, coefficients)), coefficients)
        return output.to(hidden_states.dtype).view(hidden_states.shape)

    def _coefficients(self, tokens: torch.Tensor) -> torch.Tensor:
        """Coefficient of every expert for every token: `(num_tokens, num_moe_experts)`, float32 or more."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with maybe_autocast(tokens.device.type, enabled=False):
            logits = tokens.to(dtype) @ self.gating.to(dtype)
            return entmax15(F.layer_norm(logits, logits.shape[-1:]))


def _uniform_(factor: nn.Parameter, fan_in: int):
    init.uniform_(factor, -(fan_in**-0.5), fan_in**-0.5)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Coarse experts, each a whole MLP, for the mixtures that PEER is compared with."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward, use_experts_implementation

from .configuration_peer import PeerConfig


class PeerMoeExpertsInterface(ExpertsInterface):
    """Transformers' implementations of coarse experts, by its names; unset, the one that suits the given experts."""

    def get_interface(self, experts_implementation: str | None, default: Callable) -> Callable:
        if experts_implementation is None:
            return partial(_grouped_or_eager, eager=default)
        return super().get_interface(experts_implementation, default)


class _InPrecision:
    """Experts with their weights cast to another precision."""

    def __init__(self, experts: "PeerMoeExperts", dtype: torch.dtype):
        self.experts = experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)

    def __getattr__(self, name):
        return getattr(self.experts, name)


def _grouped_or_eager(experts: "PeerMoeExperts", *args, eager: Callable) -> torch.Tensor:
    device = experts.down_proj.device.type
    if torch.is_autocast_enabled(device) and experts.down_proj.dtype != torch.float64:
        # Autocast does not cover grouped products: they would run in the weights' precision, unlike all others.
        experts = _InPrecision(experts, torch.get_autocast_dtype(device))
    weight = experts.down_proj
    # While compiling, Transformers uses its own operator instead of torch's, except for bfloat16.
    any_size = torch.compiler.is_compiling() and weight.dtype != torch.bfloat16
    # `grouped_mm` of torch requires this; models sized to a budget may have any width.
    whole_lines = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if any_size or (whole_lines and weight.dtype != torch.float64):
        return grouped_mm_experts_forward(experts, *args)
    return eager(experts, *args)


MOE_EXPERTS_FUNCTIONS = PeerMoeExpertsInterface()


def check_moe_experts_implementation(name: str | None) -> str | None:
    """Return `name` if it can compute coarse experts; `None` (chosen at each call) is allowed.

    Raises:
        ValueError: Transformers has no such implementation.
    """
    available = ["eager", *sorted(MOE_EXPERTS_FUNCTIONS)]
    if name is not None and name not in available:
        raise ValueError(
            f'experts_implementation="{name}" does not compute experts that are whole MLPs (available: '
            f'{", ".join(available)}). Use "eager", or leave it unset to let PEER choose.'
        )
    return name


@use_experts_implementation(experts_interface=MOE_EXPERTS_FUNCTIONS)
class PeerMoeExperts(nn.Module):
    """`num_moe_experts` gated MLPs of width `moe_intermediate_size`: `down(act(gate(x)) * up(x))`.

    They have Transformers' layout for mixtures of experts, so its grouped implementations can compute them.
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.num_experts, width = config.num_moe_experts, config.moe_intermediate_size
        self.initializer_range = config.initializer_range
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def reset_parameters(self):
        init.normal_(self.gate_up_proj, std=self.initializer_range)
        init.normal_(self.down_proj, std=self.initializer_range)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, one expert after the other. This is what `"eager"` runs.

        Args:
            hidden_states: `(num_tokens, hidden_size)`.
            top_k_index: `(num_tokens, k)`, int64.
            top_k_weights: `(num_tokens, k)`.

        Returns:
            `(num_tokens, hidden_size)`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            written = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = written * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output

    def of_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Run every expert on its own inputs: `(num_experts, num_slots, hidden_size)` in and out."""
        gate, up = torch.bmm(slots, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(self.act_fn(gate) * up, self.down_proj.transpose(1, 2))

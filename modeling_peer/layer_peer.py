# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerLayer: retrieval and experts joined into a drop-in for any MLP."""

import torch
import torch.nn.functional as F
from torch import nn

from .auxiliary_losses_peer import AuxiliaryLosses
from .backends_peer import check_experts_implementation
from .configuration_peer import PeerConfig
from .experts_peer import PeerExperts
from .one_call_peer import run_in_one_call
from .retrieval_peer import PeerRetrieval


class PeerLayer(nn.Module):
    """Feed-forward of `num_sub_keys**2` single-neuron experts (He 2024, arXiv:2407.04153).

        y = Σ_heads Σ_k gate · e_id(x)

    Each head retrieves its own k experts from the one pool, and the heads' outputs are summed. `PeerLayer(config)`
    initialises itself and can be used alone. With `initialize=False` the model that owns it does so, because drawing
    billions of numbers twice takes long.
    """

    experts_class = PeerExperts
    check_experts_implementation = staticmethod(check_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        self.retrieval = PeerRetrieval(config)
        self.experts = self.experts_class(config)
        self.expert_dropout = config.expert_dropout
        if initialize:
            self.retrieval.reset_parameters()
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
            token_mask: `(...)`, true where a token is not padding. It keeps padding out of BatchNorm's statistics and
                balance losses.
            aux_losses: collects the layer's auxiliary losses, unweighted. With `None` they are not computed.

        Returns:
            `(..., hidden_size)`, dtype of `hidden_states`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not self.training and aux_losses is None:
            output = run_in_one_call(self._modules["retrieval"], self._modules["experts"], tokens)
            if output is not None:
                return output.view(hidden_states.shape)
        gates, expert_ids = self.retrieval(hidden_states, token_mask, aux_losses)  # (..., h, k) each
        if self.training and self.expert_dropout:
            gates = F.dropout(gates, p=self.expert_dropout)
        # One row per token, the heads' experts side by side.
        num_active = gates.shape[-2] * gates.shape[-1]
        output = self.experts(tokens, expert_ids.view(-1, num_active), gates.view(-1, num_active))
        return output.view(hidden_states.shape)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerLayer: retrieval and experts joined into a drop-in for any MLP."""

import torch
import torch.nn.functional as F
from torch import nn

from .auxiliary_losses_peer import AuxiliaryLosses
from .backends_peer import choose_layer_of_few, remember_forwards
from .configuration_peer import PeerConfig
from .experts_peer import PeerExperts
from .query_norms_peer import PeerBatchNorm, PeerLayerNorm, PeerRMSNorm
from .retrieval_peer import PeerRetrieval

# A layer in one call takes the place of these.
remember_forwards(PeerRetrieval, PeerExperts, PeerBatchNorm, PeerLayerNorm, PeerRMSNorm)


class PeerLayer(nn.Module):
    """Feed-forward of `num_sub_keys**2` single-neuron experts (He 2024, arXiv:2407.04153).

        y = Σ_heads Σ_k gate · e_id(x)

    Each head retrieves its own k experts from the one pool, and the heads' outputs are summed. `PeerLayer(config)` is
    initialised and works by itself; `initialize=False` leaves that to the model that owns it, since drawing billions
    of numbers twice takes a while.
    """

    experts_class = PeerExperts

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
            token_mask: `(...)`, true where a token is not padding; keeps padding out of BatchNorm's statistics and of
                balance losses.
            aux_losses: collects the layer's auxiliary losses, unweighted, where somebody wants them.

        Returns:
            `(..., hidden_size)`, dtype of `hidden_states`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        few = None if self.training or aux_losses is not None else self._run_few(tokens)
        if few is not None:
            return few.view(hidden_states.shape)
        gates, expert_ids = self.retrieval(hidden_states, token_mask, aux_losses)  # (..., h, k) each
        if self.training and self.expert_dropout:
            gates = F.dropout(gates, p=self.expert_dropout)
        # One row per token, the heads' experts side by side.
        num_active = gates.shape[-2] * gates.shape[-1]
        output = self.experts(tokens, expert_ids.view(-1, num_active), gates.view(-1, num_active))
        return output.view(hidden_states.shape)

    def _run_few(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Outputs `(num_tokens, hidden_size)` in one call, as decoding wants it; None where the implementation has no
        such call, or somebody is to see the parts of this one."""
        if torch.compiler.is_compiling():
            return None
        retrieval, experts = self._modules["retrieval"], self._modules["experts"]
        if type(retrieval) is not PeerRetrieval or not isinstance(experts, PeerExperts):
            return None
        sub_keys, tables = retrieval._parameters.get("sub_keys"), experts.tables()
        # Offloaded tables come when the parts are called.
        if retrieval.training or sub_keys is None or tables is None or tables[1].is_meta:
            return None
        run = choose_layer_of_few(retrieval.config._experts_implementation, tables[1])
        query_network = None if run is None else retrieval.query_network()
        if query_network is None:
            return None
        modules, weights = query_network
        return run(
            tokens,
            (retrieval, *modules, experts),
            weights,
            sub_keys,
            retrieval.num_heads,
            retrieval.top_k,
            retrieval.gate_activation,
            tables,
            experts._modules.get("activation"),
        )

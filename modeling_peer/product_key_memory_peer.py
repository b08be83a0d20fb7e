# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory: PEER's retrieval, and a table of values that are read as they are."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .experts_peer import PeerExperts
from .layer_peer import PeerLayer
from .one_call_peer import remember_forwards
from .parallel_peer import draw_rows_


class PeerMemoryValues(PeerExperts):
    """The values of a memory: experts that write their row of `up_embed` `(num_sub_keys**2, hidden_size)` whatever the
    token. By that name whoever takes care of expert tables (sharding, row-sparse updates, adapters) finds them."""

    def __init__(self, config: PeerConfig):
        super().__init__(config, has_readers=False)

    def reset_parameters(self):
        """As in the authors' code, standard deviation `hidden_size**-0.5`."""
        draw_rows_(self.up_embed, std=self.config.hidden_size**-0.5)


remember_forwards(PeerMemoryValues)  # a layer in one call takes their place, too


class PeerGateLinear(nn.Linear):
    """A linear map of an output gate, with an initialisation of its own: that of the authors' code."""

    def reset_parameters(self):
        init.normal_(self.weight, std=self.in_features**-0.5)


class PeerOutputGate(nn.Module):
    """The gate of Memory+ (Berges et al. 2024, eq. 2; arXiv:2412.09764): `W_2 (y * silu(W_1 x))` for what was read, y,
    and the token, x. Without biases, as the equation; the authors' code has them."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.token_proj = PeerGateLinear(config.hidden_size, config.hidden_size, bias=False)
        self.output_proj = PeerGateLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, memory: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output_proj(memory * F.silu(self.token_proj(hidden_states)))


class PeerProductKeyMemory(PeerLayer):
    """Product-key memory (Lample et al. 2019; arXiv:1907.05242), with `gated_memory` the one of Memory+.

        y = Σ_heads Σ_k gate · value_id                       gate = softmax over the k scores of one head

    Everything but the values is the PEER layer's, its sizes and options included: `expert_dropout` drops values that
    a head retrieved (the authors' own, off as well, drops features of the sum), `share_expert_tables` is Memory+'s one
    pool for all layers. The paper's memory has codebooks per head (`share_sub_keys=False`), BatchNorm of the queries,
    4 heads and 32 values a head. Sub-keys and query network start as PEER's, so that the two differ in their experts
    only; the authors draw sub-keys uniformly, with 0.8 times that standard deviation.
    """

    experts_class = PeerMemoryValues

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__(config, initialize)
        self.output_gate = PeerOutputGate(config) if config.gated_memory else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> torch.Tensor:
        """Arguments and result as in [`PeerLayer`]."""
        memory = super().forward(hidden_states, token_mask, aux_losses)
        if self.output_gate is None:
            return memory
        return self.output_gate(memory, hidden_states).to(hidden_states.dtype)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory: PEER's retrieval, and a table of values that are read unchanged."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .auxiliary_losses_peer import AuxiliaryLosses
from .configuration_peer import PeerConfig
from .experts_peer import PeerExperts
from .layer_peer import PeerLayer
from .one_call_peer import remember_forwards


class PeerMemoryValues(PeerExperts):
    """The values of a memory: experts that write their row of `up_embed` whatever the token.

    `up_embed` is `(num_sub_keys**2, hidden_size)`. The name lets sharding, row-sparse updates and adapters find it.
    """

    def __init__(self, config: PeerConfig):
        super().__init__(config, has_readers=False)

    def reset_parameters(self):
        """Initialise with standard deviation `hidden_size**-0.5`, as in the authors' code."""
        self.draw_table("up_embed", std=self.config.hidden_size**-0.5)
        self.reset_rows()


remember_forwards(PeerMemoryValues)  # the one-call layer replaces them too


class PeerGateLinear(nn.Linear):
    """A linear map of an output gate, with the initialisation of the authors' code."""

    def reset_parameters(self):
        init.normal_(self.weight, std=self.in_features**-0.5)


class PeerOutputGate(nn.Module):
    """The gate of Memory+: `W_2 (y * silu(W_1 x))` for the memory's output y and the token x.

    It has no biases, like the equation (Berges et al. 2024, eq. 2; arXiv:2412.09764). The authors' code has them.
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.token_proj = PeerGateLinear(config.hidden_size, config.hidden_size, bias=False)
        self.output_proj = PeerGateLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, memory: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output_proj(memory * F.silu(self.token_proj(hidden_states)))


class PeerProductKeyMemory(PeerLayer):
    """Product-key memory (Lample et al. 2019; arXiv:1907.05242); with `gated_memory`, that of Memory+.

        y = Σ_heads Σ_k gate · value_id                       gate = softmax over the k scores of one head

    Everything except the values is the PEER layer's, including sizes and options. `expert_dropout` drops values that a
    head retrieved; the authors' own dropout, also off, drops features of the sum. `share_expert_tables` gives
    Memory+'s one pool for all layers. The paper's memory has codebooks per head (`share_sub_keys=False`), BatchNorm of
    the queries, 4 heads and 32 values per head. Sub-keys and query network are initialised as PEER's, so that the two
    differ only in their experts. The authors draw sub-keys uniformly, with 0.8 times that standard deviation.
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
        """Arguments and result are those of [`PeerLayer`]."""
        memory = super().forward(hidden_states, token_mask, aux_losses)
        if self.output_gate is None:
            return memory
        return self.output_gate(memory, hidden_states).to(hidden_states.dtype)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Selection of a token's experts: the query network, the product keys, and their exact top-k."""

import torch
from torch import nn
from transformers import initialization as init

from .auxiliary_losses_peer import AuxiliaryLosses
from .backends_peer import RETRIEVAL_FUNCTIONS, choose
from .balance_loss_peer import balance_loss
from .configuration_peer import PeerConfig
from .product_keys_peer import product_key_top_k
from .query_norms_peer import PeerBatchNorm, build_query_norm


def real_tokens(token_mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """`token_mask` as booleans, one per token: `(num_tokens,)`.

    Args:
        token_mask: any dtype, zero where a token is padding; its shape broadcasts to `shape`. `None` is returned as
            it is.
        shape: shape of the tokens.

    Raises:
        ValueError: the shapes do not fit.
    """
    if token_mask is None:
        return None
    if token_mask.shape != shape:
        try:
            token_mask = token_mask.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"token_mask is {tuple(token_mask.shape)}, but the tokens are {tuple(shape)}. Give each token a value."
            ) from error
    return token_mask.bool().flatten()


def _refuse_sync_batch_norm(norm: nn.Module) -> None:
    if isinstance(norm, nn.SyncBatchNorm):
        raise ValueError(
            "query_norm is a SyncBatchNorm, which counts padding and ignores frozen statistics. PEER does not "
            "support it. Do not convert the model (sync_batchnorm=False in Lightning). For the same function in every "
            'process, train with query_norm="rms_norm", or call model.freeze_running_statistics().'
        )


class PeerRetrieval(nn.Module):
    """Query network and product keys: from hidden states to the ids and gates of the retrieved experts.

        query = norm(x W_q + b);  ids, scores = top-k of the product keys;  gate = softmax(scores) per head

    Scores are neither scaled nor perturbed, and no expert is dropped (He 2024, section 2).
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_retrieval_heads
        self.top_k = config.num_experts_per_head
        self.query_dim = config.query_dim
        self.gate_activation = config.gate_activation
        self.has_batch_norm = config.query_norm == "batch_norm"
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * self.query_dim)
        self.query_norm = build_query_norm(config)
        codebooks = (2, config.num_sub_keys, self.query_dim // 2)
        self.sub_keys = nn.Parameter(torch.empty(codebooks if config.share_sub_keys else (self.num_heads, *codebooks)))

    def reset_parameters(self):
        """Initialise the weights. This is our choice: the paper states none.

        Normalised queries then give product scores of variance one. The softmax over a head's k experts thus starts
        neither flat nor one-hot.
        """
        init.normal_(self.query_proj.weight, std=self.config.initializer_range)
        init.zeros_(self.query_proj.bias)
        init.normal_(self.sub_keys, std=self.query_dim**-0.5)
        if isinstance(self.query_norm, PeerBatchNorm):
            self.query_norm.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(..., hidden_size)`.
            token_mask: `(...)`, true where a token is not padding. BatchNorm in training and balance losses use it.
            aux_losses: collects the balance loss, if the configuration has one. With `None` it is not computed.

        Returns:
            gates: `(..., num_heads, top_k)`, float32.
            expert_ids: same shape, int64.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        shape = (*hidden_states.shape[:-1], self.num_heads, self.top_k)
        wants_loss = aux_losses is not None and self.config.balance_loss is not None
        query = self.query_proj(tokens)  # (t, h * query_dim)
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        token_mask = real_tokens(token_mask, hidden_states.shape[:-1])
        if self.has_batch_norm:
            _refuse_sync_batch_norm(self.query_norm)
            query = self.query_norm(query, token_mask)
            query = query.view(-1, self.num_heads, self.query_dim)
        else:
            query = self.query_norm(query.view(-1, self.num_heads, self.query_dim))

        retrieve = choose(RETRIEVAL_FUNCTIONS, self.config._experts_implementation, product_key_top_k, self.sub_keys)
        scores, expert_ids = retrieve(query, self.sub_keys, self.top_k)
        if wants_loss:
            aux_losses.add(balance_loss(self.config.balance_loss, query, self.sub_keys, expert_ids, token_mask))
        gates = scores.sigmoid() if self.gate_activation == "sigmoid" else scores.softmax(dim=-1)
        return gates.view(shape), expert_ids.view(shape)

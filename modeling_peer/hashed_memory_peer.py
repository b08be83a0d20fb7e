# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Hashed n-gram memory, as in Engram: rows that the last tokens address by a hash, gated by the hidden state."""

import hashlib
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import LinearAttentionLayer

from .auxiliary_losses_peer import AuxiliaryLosses
from .backends_peer import check_experts_implementation
from .configuration_peer import PeerConfig
from .experts_peer import PeerExperts
from .part_config_peer import PartConfig
from .retrieval_peer import real_tokens
from .token_context_peer import TokenContext
from .transformers_names_peer import require_arguments

# `TokenContext` keeps earlier tokens by this method, which would swallow a renamed keyword.
require_arguments(LinearAttentionLayer.update_conv_state, "state_idx", "conv_kernel_size")

# States of a layer in the cache.
TOKENS, VALUES = 0, 1


@cache
def hash_table_sizes(smallest: int, num_heads: int) -> tuple[int, ...]:
    """Rows of the table of each hash head: the first `num_heads` primes from `smallest` on.

    With different primes, two n-grams that share a row in one table rarely share one in another.
    """
    primes, candidate = [], max(2, smallest)
    while len(primes) < num_heads:
        if all(candidate % divisor for divisor in range(2, math.isqrt(candidate) + 1)):
            primes.append(candidate)
        candidate += 1
    return tuple(primes)


@cache
def hash_multipliers(max_ngram_size: int) -> tuple[int, ...]:
    """An odd number of 32 bits for each position of an n-gram; the last token comes first.

    A product with a token id stays below 2**63. The numbers are digits of SHA-256, so they are the same everywhere.
    """
    digests = (hashlib.sha256(f"position {i} of an n-gram".encode()).digest() for i in range(max_ngram_size))
    return tuple(int.from_bytes(digest[:4], "big") | 1 for digest in digests)


def hash_ngrams(
    predecessors: list[torch.Tensor], table_sizes: tuple[int, ...], multipliers: tuple[int, ...]
) -> torch.Tensor:
    """Rows of the n-grams that end at each token: for n = 2 to `len(predecessors)`, one row per hash head.

        mix_n = (x_t · m_0) XOR (x_{t-1} · m_1) XOR ... XOR (x_{t-n+1} · m_{n-1})
        row   = mix_n mod the table's size + first row of the table

    This is the multiplicative-XOR hash of Engram (arXiv:2601.07372, section 2.2). The multipliers m are ours.

    Args:
        predecessors: the tokens themselves, those one place before, and so on: each `(batch_size, length)`, int64, the
            token's id plus 1, or 0 for none.
        table_sizes: rows of the table of each hash head, all of n = 2 first.
        multipliers: `hash_multipliers`, one for each of the predecessors.

    Returns:
        `(batch_size, length, num_heads)`, int64.
    """
    sizes = torch.tensor(table_sizes, device=predecessors[0].device)
    first_rows = sizes.cumsum(0) - sizes
    mixes = [predecessors[0] * multipliers[0]]
    for tokens, multiplier in zip(predecessors[1:], multipliers[1:], strict=True):
        mixes.append(mixes[-1] ^ (tokens * multiplier))
    num_heads = len(table_sizes) // (len(predecessors) - 1)
    mixed = torch.stack(mixes[1:], dim=-1).repeat_interleave(num_heads, dim=-1)
    return mixed % sizes + first_rows


class PeerHashedRows(PeerExperts):
    """The tables of all hash heads, one after another in the rows of `up_embed`, `(num_rows, ngram_dim / num_heads)`.

    They are experts that write their row whatever the token. So they are stored, sharded, quantised, patched and
    trained as the tables of experts are.
    """

    def __init__(self, config: PeerConfig):
        num_rows = sum(table_sizes_of(config))
        rows = {"num_peer_experts": num_rows, "num_expert_rows": num_rows, "num_kept_experts": None}
        width = config.ngram_dim // config.num_ngram_tables
        super().__init__(PartConfig(config, hidden_size=width, **rows), has_readers=False)

    def reset_parameters(self):
        """Initialise as Transformers initialises embeddings."""
        self.draw_table("up_embed", std=self.config.initializer_range)


class PeerHashedMemory(nn.Module):
    """Hashed n-gram memory (Engram; Cheng et al. 2026, arXiv:2601.07372, sections 2.2 and 2.3).

        e_t = rows of the n-grams that end at token t, n = 2 to N, K rows each, side by side
        v_t = σ(RMSNorm(h_t) · RMSNorm(W_K e_t) / √d) · W_V e_t
        y_t = v_t + SiLU(Conv(RMSNorm(v))_t)

    The convolution is causal and per feature, with dilation N. It is zero at initialisation. Tokens that mean the same
    can share an id first (`set_canonical_tokens`).

    What differs from the paper: the memory stands where the MLP does, or beside it (`parallel_dense_mlp`), while the
    paper's stands before the attention. All layers hash alike. There is one residual stream.
    """

    check_experts_implementation = staticmethod(check_experts_implementation)

    def __init__(self, config: PeerConfig, initialize: bool = True):
        super().__init__()
        self.table_sizes, self.multipliers = table_sizes_of(config), hash_multipliers(config.max_ngram_size)
        self.max_ngram_size = config.max_ngram_size
        self.experts = PeerHashedRows(config)
        self.key_proj = nn.Linear(config.ngram_dim, config.hidden_size, bias=False)
        self.value_proj = nn.Linear(config.ngram_dim, config.hidden_size, bias=False)
        # PyTorch's norm: Llama's would round float64 to float32
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.key_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.value_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.conv_weight = nn.Parameter(torch.empty(config.ngram_conv_size, config.hidden_size))
        self.register_buffer("canonical_ids", torch.empty(config.vocab_size, dtype=torch.int32))
        if initialize:
            for projection in (self.key_proj, self.value_proj):
                init.normal_(projection.weight, std=config.initializer_range)
            self.experts.reset_parameters()
            self.reset_parameters()

    def reset_parameters(self):
        """Initialise the convolution to zero, as the authors do, and let every token be its own."""
        init.zeros_(self.conv_weight)
        init.copy_(self.canonical_ids, torch.arange(len(self.canonical_ids), dtype=torch.int32))

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        aux_losses: AuxiliaryLosses | None = None,
        tokens: TokenContext | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch_size, length, hidden_size)`.
            token_mask: `(batch_size, length)`, true where a token is not padding. Padding counts as no token.
            aux_losses: not used; the layer has none.
            tokens: the tokens themselves.

        Returns:
            `(batch_size, length, hidden_size)`, dtype of `hidden_states`.

        Raises:
            ValueError: there are no tokens, or they do not fit.
        """
        if tokens is None or tokens.input_ids.shape != hidden_states.shape[:-1]:
            given = None if tokens is None else tuple(tokens.input_ids.shape)
            raise ValueError(
                "hashed_memory looks up what the tokens are, so it needs input_ids of shape "
                f"{tuple(hidden_states.shape[:-1])}; got {given}. Pass input_ids in place of inputs_embeds. Used "
                "alone, the layer is called with tokens=TokenContext(input_ids, position_ids)."
            )
        if token_mask is not None:
            token_mask = real_tokens(token_mask, tokens.input_ids.shape).view(tokens.input_ids.shape)
        embeddings = self._look_up(self.row_ids(tokens, token_mask), hidden_states.dtype)
        keys = self.key_norm(self.key_proj(embeddings))
        scores = (self.hidden_norm(hidden_states) * keys).sum(-1, keepdim=True) * hidden_states.shape[-1] ** -0.5
        values = scores.sigmoid() * self.value_proj(embeddings)
        if token_mask is not None:
            values = values.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        return values + F.silu(self._convolve(self.value_norm(values), tokens))

    def row_ids(self, tokens: TokenContext, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Rows that the n-grams ending at each token address: `(batch_size, length, num_heads)`, int64."""
        canonical = 1 + F.embedding(tokens.input_ids, self.canonical_ids.unsqueeze(1)).squeeze(-1).long()
        if token_mask is not None:
            canonical = canonical * token_mask
        num_past, length = self.max_ngram_size - 1, canonical.shape[1]
        canonical = tokens.with_past(canonical, num_past, TOKENS)
        predecessors = [
            canonical[:, num_past - distance :][:, :length] * tokens.has_predecessor(distance)
            for distance in range(self.max_ngram_size)
        ]
        return hash_ngrams(predecessors, self.table_sizes, self.multipliers)

    def _look_up(self, row_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of each token, side by side: `(batch_size, length, ngram_dim)`."""
        ids, ngram_dim = row_ids.reshape(-1, 1), self.key_proj.in_features
        gates = torch.ones(ids.shape, dtype=dtype, device=ids.device)
        # only the dtype and the shape of the hidden states matter to experts that do not read them
        tokens = gates.expand(-1, ngram_dim // len(self.table_sizes))
        return self.experts(tokens, ids, gates).view(*row_ids.shape[:2], ngram_dim)

    def _convolve(self, values: torch.Tensor, tokens: TokenContext) -> torch.Tensor:
        """Causal convolution of each feature; tap i reads the token `i * max_ngram_size` places before."""
        num_taps, length = len(self.conv_weight), values.shape[1]
        num_past = (num_taps - 1) * self.max_ngram_size
        if num_past:
            past_and_present = tokens.with_past(values.transpose(1, 2), num_past, VALUES).transpose(1, 2)
        output = values * self.conv_weight[0]
        for tap in range(1, num_taps):
            distance = tap * self.max_ngram_size
            seen = past_and_present[:, num_past - distance :][:, :length]
            output = output + seen * (self.conv_weight[tap] * tokens.has_predecessor(distance).unsqueeze(-1))
        return output

    def resize_vocabulary(self, vocab_size: int):
        """Give new tokens an id of their own, or drop those past the end."""
        ids = torch.arange(vocab_size, dtype=torch.int32, device=self.canonical_ids.device)
        kept = min(vocab_size, len(self.canonical_ids))
        ids[:kept] = self.canonical_ids[:kept]
        self.canonical_ids = ids


def table_sizes_of(config: PeerConfig) -> tuple[int, ...]:
    """Rows of the table of each hash head of a configuration, all of 2-grams first."""
    return hash_table_sizes(config.num_rows_per_hash_head, config.num_ngram_tables)


def set_canonical_tokens(model: nn.Module, canonical_ids: torch.Tensor):
    """Let tokens that mean the same address the same rows in all hashed memories of a model.

    Set it before training: it moves n-grams to other rows. It is saved with the model.

    Args:
        canonical_ids: `(vocab_size,)`, the id that stands for each token, as from
            [`modeling_peer.data.canonical_tokens.canonical_token_ids`].

    Raises:
        ValueError: the model has no hashed memory, or the ids do not fit its vocabulary.
    """
    canonical_ids = torch.as_tensor(canonical_ids)
    memories = [module for module in model.modules() if isinstance(module, PeerHashedMemory)]
    if not memories:
        raise ValueError(f"{type(model).__name__} has no hashed memory: set sparse_mlp='hashed_memory'.")
    for memory in memories:
        expected = memory.canonical_ids
        is_integer = canonical_ids.dtype != torch.bool and not canonical_ids.is_floating_point()
        fits = canonical_ids.shape == expected.shape and is_integer
        if not fits or not 0 <= int(canonical_ids.min()) <= int(canonical_ids.max()) < len(expected):
            raise ValueError(
                f"canonical_ids must be {len(expected)} ids below {len(expected)}, one for each token; got "
                f"{canonical_ids.dtype} of shape {tuple(canonical_ids.shape)}."
            )
        expected.copy_(canonical_ids)

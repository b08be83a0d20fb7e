# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The translation model of Shazeer et al. 2017 (arXiv:1701.06538, appendix E) with a mixture or a dense layer.

Three LSTM layers encode and two decode. The layer under study is between the last two of the encoder, and between the
two of the decoder. Residual connections are around all LSTM and all studied layers.

Shapes: b sentences, s and t positions of source and target, d width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.configuration_peer import PeerConfig
from modeling_peer.studies.classics.translation_data import PADDING, Batch
from modeling_peer.top_k_moe_peer import PeerNoisyTopKRouter


class ReluMixture(nn.Module):
    """`sigmoid(Σ gate · W_out relu(W_in x))` over the experts of a token, which noisy top-k gating chooses.

    Experts have no biases, like the paper's, whose parameters are those of two matrices. A weight starts at
    N(0, 1 / inputs); the paper does not state its start.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, expert_size: int):
        super().__init__()
        # the router reads its three fields; a decoder of one head fits any even width
        config = PeerConfig(
            hidden_size=hidden_size,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_moe_experts=num_experts,
            num_moe_experts_per_token=top_k,
        )
        self.router = PeerNoisyTopKRouter(config)
        self.router.reset_parameters()
        self.into = nn.Parameter(torch.randn(num_experts, expert_size, hidden_size) / hidden_size**0.5)
        self.out = nn.Parameter(torch.randn(num_experts, hidden_size, expert_size) / expert_size**0.5)
        self.routing: tuple[Tensor, Tensor] | None = None  # expert_ids and gates of the last call, (tokens, k) each

    def forward(self, tokens: Tensor, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        """`tokens`: `(num_tokens, d)`, without padding; so is the result."""
        real = tokens.new_ones(len(tokens), dtype=torch.bool)
        expert_ids, gates = self.router(tokens, real, aux_losses)
        self.routing = expert_ids.detach(), gates.detach()
        order = expert_ids.flatten().argsort(stable=True)
        rows = order // expert_ids.shape[1]
        counts = expert_ids.flatten().bincount(minlength=len(self.into)).tolist()
        parts = tokens[rows].split(counts)
        written = [
            F.linear(F.linear(own, into).relu(), out)
            for own, into, out in zip(parts, self.into.unbind(), self.out.unbind(), strict=True)
        ]
        weighted = torch.cat(written) * gates.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, rows, weighted).sigmoid()

    def multiply_adds(self) -> int:
        """Of a token: its experts and both matrices of the gating."""
        num_experts, expert_size, hidden_size = self.into.shape
        return 2 * hidden_size * (self.router.top_k * expert_size + num_experts)


class ReluLayer(nn.Module):
    """`sigmoid(W_out relu(W_in x))`: the dense layer, with the mixture's multiply-adds if `size` is k · e + n.

    That is k experts of size e and, for the two gating matrices of n experts, n more.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.into = nn.Parameter(torch.randn(size, hidden_size) / hidden_size**0.5)
        self.out = nn.Parameter(torch.randn(hidden_size, size) / size**0.5)

    def forward(self, tokens: Tensor, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        return F.linear(F.linear(tokens, self.into).relu(), self.out).sigmoid()

    def multiply_adds(self) -> int:
        return 2 * self.into.numel()


class TranslationModel(nn.Module):
    """Encoder, attention and decoder.

    The first layer of the encoder reads in both directions, as in GNMT (arXiv:1609.08144), which the paper modifies.
    At each position the first layer of the decoder reads the token and the attention's output for its previous state;
    the second reads that output for its present state.

    Args:
        encoder_layer, decoder_layer: a `ReluMixture` or `ReluLayer` each.
    """

    def __init__(self, vocab_size: int, hidden_size: int, encoder_layer: nn.Module, decoder_layer: nn.Module):
        super().__init__()
        d = hidden_size
        self.embedding = nn.Embedding(vocab_size, d)
        self.encoder = nn.ModuleList(
            [
                nn.LSTM(d, d // 2, batch_first=True, bidirectional=True),
                nn.LSTM(d, d, batch_first=True),
                nn.LSTM(d, d, batch_first=True),
            ]
        )
        self.encoder_layer, self.decoder_layer = encoder_layer, decoder_layer
        self.first = nn.LSTMCell(2 * d, d)
        self.second = nn.LSTM(2 * d, d, batch_first=True)
        # appendix G: Σ V tanh(x U) tanh(y W)
        self.of_source, self.of_target = (nn.Linear(d, d, bias=False) for _ in "UW")
        self.attention = nn.Parameter(torch.ones(d) / d**0.5)
        self.output = nn.Linear(d, vocab_size)

    def encode(self, sources: Tensor, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        """`(b, s)` to `(b, s, d)`."""
        states = self.embedding(sources)
        for lstm in self.encoder[:2]:
            states = states + lstm(states)[0]
        states = states + self.encoder_layer(states.flatten(0, 1), aux_losses).view_as(states)
        return states + self.encoder[2](states)[0]

    def forward(self, batch: Batch, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        """The sum of the cross entropy over the target tokens, in nats.

        Args:
            aux_losses: collects the balance losses of the mixtures.
        """
        losses = self.token_losses(batch, aux_losses)
        return losses.sum()

    def token_losses(self, batch: Batch, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        """Cross entropy of each target token, `(num_tokens,)`, sentence by sentence."""
        memory = self.encode(batch.sources, aux_losses)  # (b, s, d)
        keys = (self.of_source(memory).tanh() * self.attention).transpose(1, 2)
        tokens = self.embedding(batch.inputs)  # (b, t, d)
        state = cell = memory.new_zeros(len(memory), memory.shape[2])
        read = memory.mean(1)  # a state of zero attends to all alike
        states, reads = [], []
        for token in tokens.unbind(1):
            state, cell = self.first(torch.cat([token, read], 1), (state, cell))
            weights = (self.of_target(state).tanh()[:, None] @ keys).softmax(2)
            read = (weights @ memory).squeeze(1)
            states.append(state)
            reads.append(read)
        hidden = tokens + torch.stack(states, 1)
        real = batch.targets != PADDING
        present = real.flatten().nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1)
        hidden = hidden.index_add(0, present, self.decoder_layer(hidden[present], aux_losses)).view_as(tokens)
        hidden = hidden + self.second(torch.cat([hidden, torch.stack(reads, 1)], 2))[0]
        logits = self.output(hidden.flatten(0, 1)[present])
        return F.cross_entropy(logits, batch.targets.flatten()[present], reduction="none")

    def mixtures(self) -> dict[str, ReluMixture]:
        """Those of the studied layers that are mixtures, by their place."""
        layers = {"encoder": self.encoder_layer, "decoder": self.decoder_layer}
        return {name: layer for name, layer in layers.items() if isinstance(layer, ReluMixture)}

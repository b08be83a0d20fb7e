# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A tiny vision transformer whose last MLPs may be mixtures of experts, for `soft_digits`.

Images of 8 x 8 pixels become 16 tokens, each a patch of 2 x 2. Shapes: n images, s tokens of an image, d width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.configuration_peer import PeerConfig
from modeling_peer.moe_experts_peer import PeerMoeExperts
from modeling_peer.soft_moe_peer import PeerSoftMoe
from modeling_peer.studies.classics.digit_images import IMAGE_SIDE, NUM_CLASSES
from modeling_peer.top_k_moe_peer import PeerTopKMoe

PATCH_SIDE, NUM_HEADS = 2, 2
NUM_TOKENS = (IMAGE_SIDE // PATCH_SIDE) ** 2
INITIAL_DEVIATION = 0.1  # of the weights of experts; 0.02, of language models, is little for a width of 32


class Routing(NamedTuple):
    """What stands in place of an MLP."""

    kind: str  # dense, top_k or soft
    num_experts: int = 1
    dispatch: str = "soft"  # of a soft mixture: soft, uniform or identity
    combine: str = "soft"


# `soft` fills as many slots as an image has tokens. All process 16 inputs of experts per image, so that the FLOPs of
# experts are equal, except for tokens that top-1 drops.
ROUTINGS = {
    "dense": Routing("dense"),
    "top-1 of 4": Routing("top_k", 4),
    "top-1 of 16": Routing("top_k", 16),
    "soft, 4 experts": Routing("soft", 4),
    "soft, 16 experts": Routing("soft", 16),
    "soft / uniform": Routing("soft", 16, "soft", "uniform"),
    "uniform / soft": Routing("soft", 16, "uniform", "soft"),
    "uniform": Routing("soft", 16, "uniform", "uniform"),
    "identity": Routing("soft", 16, "identity", "identity"),
}


class DenseMlp(nn.Module):
    """One expert that all tokens run through."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.experts = PeerMoeExperts(config)
        self.experts.reset_parameters()

    def forward(self, tokens: Tensor, token_mask=None, aux_losses=None) -> Tensor:
        """`(n, s, d)` to the same shape."""
        return self.experts.of_slots(tokens.flatten(0, 1)[None])[0].view(tokens.shape)


class PartlySoftMoe(PeerSoftMoe):
    """A soft mixture in which dispatch, combination or both are not learned: the ablations of the paper's section 3.6.

    - uniform: every slot is the mean of all tokens; every token gets the mean of all slots.
    - identity: slot i is token i, and gives back token i.
    """

    def __init__(self, config: PeerConfig, dispatch: str, combine: str):
        super().__init__(config)
        self.dispatch, self.combine = dispatch, combine
        if "soft" not in (dispatch, combine):
            del self.slot_embed, self.scale

    def forward(self, tokens: Tensor, token_mask=None, aux_losses=None) -> Tensor:
        """`(n, s, d)` to the same shape."""
        logits = self._logits(tokens) if "soft" in (self.dispatch, self.combine) else None
        if self.dispatch == "soft":
            slots = logits.softmax(-2).mT @ tokens
        elif self.dispatch == "uniform":
            slots = tokens.mean(-2, keepdim=True).expand(-1, self.num_experts * self.num_slots, -1)
        else:
            slots = tokens
        written = self._of_experts(slots)
        if self.combine == "soft":
            return logits.softmax(-1) @ written
        if self.combine == "uniform":
            return written.mean(-2, keepdim=True).expand_as(tokens)
        return written


def new_mlp(routing: Routing, width: int, inner_width: int) -> nn.Module:
    """The module of a routing, with this package's layers."""
    shared = {
        "hidden_size": width,
        "num_attention_heads": NUM_HEADS,
        "moe_intermediate_size": inner_width,
        "num_moe_experts": routing.num_experts,
        "initializer_range": INITIAL_DEVIATION,
    }
    if routing.kind == "dense":
        return DenseMlp(PeerConfig(**shared))
    if routing.kind == "top_k":
        return PeerTopKMoe(
            PeerConfig(**shared, sparse_mlp="top_k_moe", moe_router="switch", num_moe_experts_per_token=1)
        )
    config = PeerConfig(
        **shared, sparse_mlp="soft_moe", is_causal=False, num_slots_per_expert=NUM_TOKENS // routing.num_experts
    )
    if routing.dispatch == routing.combine == "soft":
        return PeerSoftMoe(config)
    return PartlySoftMoe(config, routing.dispatch, routing.combine)


class Block(nn.Module):
    """Attention and an MLP, each after LayerNorm and with a residual."""

    def __init__(self, width: int, mlp: nn.Module):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp

    def forward(self, tokens: Tensor, aux_losses: AuxiliaryLosses | None) -> Tensor:
        parts = self.read(self.attention_norm(tokens)).unflatten(-1, (3, NUM_HEADS, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (n, heads, s, d / heads) each
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.write(mixed)
        return tokens + self.mlp(self.mlp_norm(tokens), None, aux_losses)


class TinyViT(nn.Module):
    """Blocks on patches with learned positions, the mean of their outputs, and a linear classifier.

    The last half of the blocks have the routing's MLP, as in the paper. The others have dense ones.
    """

    def __init__(self, routing: Routing, num_blocks: int, width: int, inner_width: int):
        super().__init__()
        self.patches = nn.Linear(PATCH_SIDE**2, width)
        self.positions = nn.Parameter(torch.randn(NUM_TOKENS, width) / width**0.5)
        num_dense = num_blocks // 2
        routings = [ROUTINGS["dense"]] * num_dense + [routing] * (num_blocks - num_dense)
        self.blocks = nn.ModuleList(Block(width, new_mlp(each, width, inner_width)) for each in routings)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor, aux_losses: AuxiliaryLosses | None = None) -> Tensor:
        """`(n, 64)` to logits, `(n, 10)`."""
        side = IMAGE_SIDE // PATCH_SIDE
        cut = (
            images.view(-1, side, PATCH_SIDE, side, PATCH_SIDE).transpose(2, 3).reshape(-1, NUM_TOKENS, PATCH_SIDE**2)
        )
        tokens = self.patches(cut) + self.positions
        for block in self.blocks:
            tokens = block(tokens, aux_losses)
        return self.last(self.norm(tokens).mean(1))

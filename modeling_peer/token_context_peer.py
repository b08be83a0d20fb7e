# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a layer that reads tokens is given beside hidden states: the tokens, their positions, and what came before.

The tokens before the current ones are carried by the cache, in the state that Transformers keeps for convolutions.
So they are reordered with the beams and cropped with rejected candidates, as keys and values are.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import StaticLayer


@dataclass(frozen=True)
class TokenContext:
    """The current tokens of a forward, and the cache with the tokens before them.

    Args:
        input_ids: `(batch_size, length)`.
        position_ids: `(batch_size, length)` or `(1, length)`. A token at position p has p predecessors, so the
            sequences of a packed row do not see each other.
        cache: as in the forward; `None` if there is nothing before these tokens, and nothing to keep.
        layer: number of the decoder layer, which the cache is addressed by.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cache: Cache | None = None
    layer: int = 0

    def to(self, device, non_blocking: bool = False) -> "TokenContext":
        """The same tokens on another device. Accelerate calls it where layers are on several."""
        input_ids, position_ids = (
            one.to(device, non_blocking=non_blocking) for one in (self.input_ids, self.position_ids)
        )
        return replace(self, input_ids=input_ids, position_ids=position_ids)

    def with_past(self, values: torch.Tensor, num_past: int, state: int) -> torch.Tensor:
        """Prepend what the last `num_past` tokens before these had, and keep it for the next forward.

        Args:
            values: `(batch_size, ..., length)`, of each of the current tokens.
            state: number of the state in the cache.

        Returns:
            `(batch_size, ..., num_past + length)`. Where there was no token, the value is 0.

        Raises:
            ValueError: the cache has no place for it, or is of another batch.
        """
        length = values.shape[-1]
        if self.cache is not None:
            self._require_state(values, state)
            values = self.cache.update_conv_state(values, self.layer, state_idx=state, conv_kernel_size=num_past)
        return F.pad(values, (num_past, 0))[..., -(num_past + length) :]

    def has_predecessor(self, distance: int) -> torch.Tensor:
        """Whether the token `distance` places before each token is of the same sequence: as `position_ids`."""
        return self.position_ids >= distance

    def _require_state(self, values: torch.Tensor, state: int):
        layers = getattr(self.cache, "layers", ())
        states = getattr(layers[self.layer], "conv_states", {}) if self.layer < len(layers) else {}
        if state not in states:
            raise ValueError(
                f"This {type(self.cache).__name__} cannot carry tokens from one forward to the next, which "
                "hashed_memory needs. Make it with the model's configuration, DynamicCache(config=model.config), or "
                "pass use_cache=False."
            )
        layer, held = layers[self.layer], states[state]
        # Transformers' static "hybrid" layer crops these states alone: its keys keep the rejected candidates.
        if layer.record_past and isinstance(layer, StaticLayer) and "crop" not in vars(type(layer)):
            raise ValueError(
                "A static cache cannot drop the rejected candidates of a model with hashed_memory. For assisted "
                "generation and prompt lookup, use a DynamicCache."
            )
        if held is None:
            return
        if len(held) != len(values):
            raise ValueError(
                f"The cache has the tokens of {len(held)} sequences, and {len(values)} are given. Caches of models "
                "with hashed_memory cannot be repeated or selected from (batch_repeat_interleave, "
                "batch_select_indices)."
            )
        if held.device != values.device:  # an offloaded layer is moved with its keys, before this is read
            states[state] = held.to(values.device)

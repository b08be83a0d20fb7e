# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a layer that reads tokens is given beside hidden states: the tokens, their positions, and what came before.

The tokens before the current ones are carried by the cache, in the state that Transformers keeps for convolutions.
So they are reordered with the beams, cropped with rejected candidates, and moved with the keys and values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import Cache


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

    def with_past(self, values: torch.Tensor, num_past: int, state: int) -> torch.Tensor:
        """Prepend what the last `num_past` tokens before these had, and keep it for the next forward.

        Args:
            values: `(batch_size, ..., length)`, of each of the current tokens.
            state: number of the state in the cache.

        Returns:
            `(batch_size, ..., num_past + length)`. Where there was no token, the value is 0.

        Raises:
            ValueError: the cache has no place for it.
        """
        length = values.shape[-1]
        if self.cache is not None:
            self._require_state()
            values = self.cache.update_conv_state(values, self.layer, state_idx=state, conv_kernel_size=num_past)
        return F.pad(values, (num_past, 0))[..., -(num_past + length) :]

    def has_predecessor(self, distance: int) -> torch.Tensor:
        """Whether the token `distance` places before each token is of the same sequence: as `position_ids`."""
        return self.position_ids >= distance

    def _require_state(self):
        layers = getattr(self.cache, "layers", ())
        if self.layer >= len(layers) or not hasattr(layers[self.layer], "conv_states"):
            raise ValueError(
                f"This {type(self.cache).__name__} cannot carry tokens from one forward to the next, which "
                "hashed_memory needs. Make it with the model's configuration, DynamicCache(config=model.config), or "
                "pass use_cache=False."
            )

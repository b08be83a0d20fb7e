# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Padding masks: whether they fit the input and the cache, and which of the current tokens they keep."""

from typing import Any

import torch
from transformers import Cache


def split_prepared_mask(attention_mask: Any, length: int, cache: Cache | None) -> tuple[Any, torch.Tensor | None]:
    """The attention mask, and which of the current tokens are not padding (`current_token_mask`).

    For models with `layer_types`, `generate` makes a mask for each kind of layer before a compiled forward.
    """
    if isinstance(attention_mask, dict):
        return attention_mask["full_attention"], attention_mask.get("linear_attention")
    return attention_mask, current_token_mask(attention_mask, length, cache)


def fit_attention_mask(
    attention_mask: torch.Tensor | None, batch_size: int, length: int, num_attention_heads: int, cache: Cache | None
) -> torch.Tensor | None:
    """Give a padding mask one row per sequence; return other masks unchanged.

    Args:
        attention_mask: `(batch_size, past + length)`, 0 for padding, or any mask Transformers takes.
        batch_size, length: number of sequences, and of their new tokens.

    Raises:
        ValueError: the mask does not fit the input. Attention would broadcast it or read the wrong columns.
    """
    if not isinstance(attention_mask, torch.Tensor):
        return attention_mask
    seen = _num_seen(cache)
    shape, wanted = attention_mask.shape, f"({batch_size}, {seen + length})"
    if len(shape) == 2:
        # A longer mask is for a static cache: it can cover all of the cache's positions.
        fits = shape[1] >= seen + length if cache is not None else shape[1] == length
    else:  # which tokens attend to which; attention broadcasts it
        wanted = f"{wanted} or ({batch_size}, 1, {length}, {seen + length})"
        fits = len(shape) == 4 and shape[1] in (1, num_attention_heads) and shape[2] in (1, length)
        fits = fits and (cache is not None or shape[3] in (1, length))
    if not fits or shape[0] not in (1, batch_size):
        cached = f" after {seen} in the cache" if seen else ""
        raise ValueError(
            f"attention_mask is {tuple(shape)}, but there are {batch_size} sequences of {length} tokens{cached}: "
            f"give a mask of shape {wanted}, with 1 for a token and 0 for padding."
        )
    return attention_mask.expand(batch_size, -1) if len(shape) == 2 else attention_mask


def current_token_mask(attention_mask: torch.Tensor | None, length: int, cache: Cache | None) -> torch.Tensor | None:
    """Which of the current tokens are not padding: `(batch_size, length)`; None if the mask does not say.

    Masks of other ranks say which tokens attend to which, not which ones are padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    if attention_mask.shape[1] == length:
        return attention_mask.bool()
    seen = _num_seen(cache) or attention_mask.shape[1] - length
    return attention_mask[:, seen : seen + length].bool()


def _num_seen(cache: Cache | None) -> int:
    """Number of tokens in `cache`; 0 if finding out would wait for a device, as with static caches."""
    seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return seen if isinstance(seen, int) else 0


def num_cached(cache: Cache | None) -> int | None:
    """Number of tokens in a cache; None if there is no cache or the number must not be read.

    A compiled graph would depend on it, and a static cache on an accelerator would make the CPU wait.
    """
    if not isinstance(cache, Cache) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    length = cache.get_seq_length()
    if not isinstance(length, torch.Tensor):
        return length
    return int(length) if length.device.type == "cpu" else None

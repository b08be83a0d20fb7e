# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Norms of queries, and BatchNorm's running statistics: when they are updated, and when not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_peer import PeerConfig


class Float32Module(nn.Module):
    """Keeps its own parameters and buffers float32 in a half-precision model."""

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` and `.to(dtype)` call this: move, but do not round.
        def keep_precision(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)


def _norm_dtype() -> torch.dtype:
    """float32, even while `from_config(dtype=torch.bfloat16)` builds a model with another default dtype."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


# Transformers chooses the initialisation by these class names.
class PeerRMSNorm(Float32Module, nn.RMSNorm):
    """RMSNorm of one head's query."""


class PeerLayerNorm(Float32Module, nn.LayerNorm):
    """LayerNorm of one head's query."""


class RunningStatistics(Float32Module):
    """Statistics that training forwards update, without a gradient, and that evaluation uses.

    They are updated unless

        - `statistics_frozen` is set, as `from_pretrained` does if the checkpoint has statistics that were updated
          (`PeerPreTrainedModel.freeze_running_statistics` changes it); or
        - the weight they belong to does not train, as under an adapter, whose file would not contain them; or
        - this module is in evaluation mode, as it is for a step of generation (`statistics_as_in_evaluation`).

    While they are not updated, the module computes the same in training as in evaluation.
    """

    statistics_frozen = False

    def learns_with(self, weight: torch.Tensor) -> bool:
        """Whether a forward now updates the statistics; `weight` is the parameter they belong to."""
        return self.training and weight.requires_grad and not self.statistics_frozen

    def have_learned(self) -> bool:
        """Whether the statistics differ from those of a new module; true if they cannot be read (`meta`)."""
        raise NotImplementedError


def freeze_running_statistics(model: nn.Module, frozen: bool = True, only_learned: bool = False) -> None:
    """Freeze or unfreeze every `RunningStatistics` of `model`; `only_learned` skips new ones."""
    for module in model.modules():
        if isinstance(module, RunningStatistics) and (module.have_learned() or not only_learned):
            module.statistics_frozen = frozen


@contextmanager
def statistics_as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside this context every `RunningStatistics` of `model` acts as in evaluation, whatever the model's mode."""
    learning = [module for module in model.modules() if isinstance(module, RunningStatistics) and module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def keep_statistics_in_generation(forward: Callable) -> Callable:
    """Decorate a decoder's `forward` so that generation does not update running statistics.

    A call with a cache and without gradients is a step of generation, even if the model is in training mode.
    """

    @wraps(forward)
    def checked_forward(self, *args, **kwargs):
        # Transformers 5.24 renamed `past_key_values`.
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if not (self.training and has_cache) or torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        with statistics_as_in_evaluation(self):
            return forward(self, *args, **kwargs)

    return checked_forward


class PeerBatchNorm(RunningStatistics, nn.BatchNorm1d):
    """BatchNorm of queries, made safe for language modelling (He 2024, section 3.3, enables it by default).

    Differences from `nn.BatchNorm1d`:
        - Padding does not enter the statistics.
        - Fewer than two tokens are normalised with the running statistics, and do not change them.
        - A forward that gradient checkpointing recomputes does not update them again.
        - The statistics stay float32 in a half-precision model.
        - In the cases listed in `RunningStatistics` it acts as in evaluation. With frozen statistics `weight` and
          `bias` still train; `weight.requires_grad = False` freezes everything.
        - `num_batches_tracked` is not saved, and counts only if `momentum` is None.

    While statistics are updated, a token's query depends on the other tokens of this process's micro-batch, later ones
    included. So gradients of 4 micro-batches of 2 sequences differ from those of one batch of 8. In evaluation, and
    with frozen statistics, a query depends on its token alone, and the gradients are equal.

    Averaged weights (`torch.optim.swa_utils.AveragedModel`) need their own statistics. `update_bn` measures them;
    `use_buffers=True` averages those of the models. `update_bn` sets `momentum` to None, for a plain mean over
    batches. Statistics are then updated in training mode even if they are frozen, because `update_bn` has reset them.

    Args:
        num_features: features of one token's query, all heads together.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None: their mean over all batches.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__(num_features, eps, momentum, dtype=_norm_dtype())
        # Not in checkpoints: only `update_bn` needs it, and sets it to zero first.
        self.register_buffer("num_batches_tracked", self.running_mean.new_zeros(()), persistent=False)

    def reset_parameters(self):
        for ones in (self.weight, self.running_var):
            init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            init.zeros_(zeros)

    def _load_from_state_dict(self, *args):
        # Not nn.BatchNorm1d's: it adds the counter to a state without one and then reports it as unexpected.
        nn.Module._load_from_state_dict(self, *args)

    def extra_repr(self) -> str:
        frozen = ", statistics_frozen=True" if self.statistics_frozen else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{frozen}"

    def have_learned(self) -> bool:
        return self.running_mean.is_meta or bool(self.running_mean.any() or (self.running_var != 1).any())

    def forward(self, query: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise each feature of `query`.

        Args:
            query: `(num_tokens, num_features)`.
            token_mask: `(num_tokens,)`, true where a token is not padding.
        """
        if not (self.learns_with(self.weight) or (self.training and self.momentum is None)):
            # Inference engines hold parameters in the model's dtype, and torch wants that of the statistics.
            weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
            return F.batch_norm(query, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        if token_mask is None and query.shape[0] > 1 and self.momentum is not None:
            return self._normalize_all(query)
        mean, variance = self._batch_statistics(query, token_mask)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return torch.addcmul(self.bias - mean * scale, query, scale)

    def _normalize_all(self, query):
        """Same result as the rest of this module if no token is padding, in a third of the time."""
        # Copies: a recomputation must not update the statistics. Tensors saved for the backward must not change before
        # it, as they do when DDP broadcasts buffers.
        running = self.running_mean.clone(), self.running_var.clone()
        normalized = F.batch_norm(query, *running, self.weight, self.bias, True, self.momentum, self.eps)
        if not is_recomputation():
            with torch.no_grad():
                self.running_mean.copy_(running[0])
                self.running_var.copy_(running[1])
        return normalized

    def _batch_statistics(self, query, token_mask):
        """Mean and variance of the real tokens, `(num_features,)` each; updates the running ones."""
        real = query.new_ones(query.shape[0]) if token_mask is None else token_mask.to(query.dtype)
        real = real.unsqueeze(1)  # (num_tokens, 1)
        count = real.sum().clamp(min=1.0)
        mean = (query * real).sum(0) / count
        variance = ((query - mean).square() * real).sum(0) / count
        # `where`, not `if`: the count is a tensor, and the forward must compile to one graph.
        enough = count > 1
        mean = torch.where(enough, mean, self.running_mean)
        variance = torch.where(enough, variance, self.running_var)
        if not is_recomputation():
            with torch.no_grad():
                weight = self.momentum
                if weight is None:
                    self.num_batches_tracked += enough
                    weight = 1.0 / self.num_batches_tracked.clamp(min=1)
                weight = torch.where(enough, weight, 0.0).to(self.running_mean.dtype)
                unbiased = variance * torch.where(enough, count / (count - 1), 1.0)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
        return mean, variance


def is_recomputation() -> bool:
    """Whether this forward is the recomputation of gradient checkpointing, inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def build_query_norm(config: PeerConfig) -> nn.Module:
    if config.query_norm == "batch_norm":
        return PeerBatchNorm(config.num_retrieval_heads * config.query_dim)
    if config.query_norm == "rms_norm":
        return PeerRMSNorm(config.query_dim, eps=config.rms_norm_eps, dtype=_norm_dtype())
    if config.query_norm == "layer_norm":
        return PeerLayerNorm(config.query_dim, dtype=_norm_dtype())
    return nn.Identity()

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token gets: the query network, the product keys, and their exact top-k."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .auxiliary_losses_peer import AuxiliaryLosses, balance_loss
from .backends_peer import RETRIEVAL_FUNCTIONS, choose
from .configuration_peer import PeerConfig
from .product_keys_peer import product_key_top_k


class Float32Module(nn.Module):
    """Keeps its own parameters and buffers float32 in a half-precision model."""

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` and `.to(dtype)` come through here: move, but do not round.
        def keep_precision(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)


def _norm_dtype() -> torch.dtype:
    """float32 also while `from_config(dtype=torch.bfloat16)` builds a model in another default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


# The names tell Transformers how to initialise them.
class PeerRMSNorm(Float32Module, nn.RMSNorm):
    """RMSNorm of one head's query."""


class PeerLayerNorm(Float32Module, nn.LayerNorm):
    """LayerNorm of one head's query."""


class RunningStatistics(Float32Module):
    """Statistics that forwards in training learn, without a gradient, and that evaluation uses.

    They are learned unless
        - `statistics_frozen` is set, as `from_pretrained` does where a checkpoint brings statistics that have learned
          (`PeerPreTrainedModel.freeze_running_statistics` changes it); or
        - the weight they belong to does not train, as under an adapter, whose file would not hold them; or
        - this module is in evaluation mode, as it is for a step of generation (`statistics_at_rest`).

    Where they are not learned, the module computes in training what it computes in evaluation.
    """

    statistics_frozen = False

    def learns_with(self, weight: torch.Tensor) -> bool:
        """Whether a forward in this state learns; `weight` is the parameter that the statistics belong to."""
        return self.training and weight.requires_grad and not self.statistics_frozen

    def have_learned(self) -> bool:
        """Whether the statistics differ from those of a new module; true where they cannot be read (`meta`)."""
        raise NotImplementedError


def freeze_running_statistics(model: nn.Module, frozen: bool = True, only_learned: bool = False) -> None:
    """Freeze every `RunningStatistics` of `model`, or let it learn; `only_learned`: pass over new ones."""
    for module in model.modules():
        if isinstance(module, RunningStatistics) and (module.have_learned() or not only_learned):
            module.statistics_frozen = frozen


@contextmanager
def statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """Every `RunningStatistics` of `model` acts as in evaluation here, whatever mode the model is in."""
    learning = [module for module in model.modules() if isinstance(module, RunningStatistics) and module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def cached_steps_teach_nothing(forward: Callable) -> Callable:
    """Decorate a decoder's `forward`: without gradients and with a cache given, it is a step of generation, and
    statistics are at rest, also in a model that was left in training mode."""

    @wraps(forward)
    def forward_at_rest(self, *args, **kwargs):
        # Transformers 5.24 renamed `past_key_values`.
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if not (self.training and has_cache) or torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        with statistics_at_rest(self):
            return forward(self, *args, **kwargs)

    return forward_at_rest


class PeerBatchNorm(RunningStatistics, nn.BatchNorm1d):
    """BatchNorm of queries, made safe for language modelling (He 2024, section 3.3, enables it by default).

    Differences from `nn.BatchNorm1d`:
        - Padding does not enter the statistics.
        - Fewer than two tokens are normalised with the running statistics, and do not change them.
        - A forward that gradient checkpointing recomputes does not count again.
        - The statistics stay float32 in a half-precision model.
        - In the cases that `RunningStatistics` names it acts as in evaluation. Frozen statistics leave `weight` and
          `bias` free to train; `weight.requires_grad = False` freezes all of it.
        - `num_batches_tracked` is not saved, and counts only where `momentum` is None.

    While it learns, a token's query depends on the other tokens of this process's micro-batch, later ones included. So
    gradients of 4 micro-batches of 2 sequences are not those of one batch of 8. In evaluation, and with frozen
    statistics, a query depends on its token alone, and the two are equal.

    Averaged weights (`torch.optim.swa_utils.AveragedModel`) need statistics of their own. `update_bn` measures them;
    `use_buffers=True` averages those of the models. `update_bn` sets `momentum` to None, for a plain mean over
    batches. Statistics are then learned in training mode even if they are frozen: it has reset them before.

    Args:
        num_features: features of one token's query, all heads together.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None: their mean over all batches.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__(num_features, eps, momentum, dtype=_norm_dtype())
        # Not in checkpoints: nothing but `update_bn` needs it, which sets it to zero.
        self.register_buffer("num_batches_tracked", self.running_mean.new_zeros(()), persistent=False)

    def reset_parameters(self):
        for ones in (self.weight, self.running_var):
            init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            init.zeros_(zeros)

    def _load_from_state_dict(self, *args):
        # Not nn.BatchNorm1d's, which adds the counter to a state that has none and then finds it unexpected.
        nn.Module._load_from_state_dict(self, *args)

    def extra_repr(self) -> str:
        frozen = ", statistics_frozen=True" if self.statistics_frozen else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{frozen}"

    def have_learned(self) -> bool:
        return self.running_mean.is_meta or bool(self.running_mean.any() or (self.running_var != 1).any())

    def forward(self, query: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise each feature of `query` `(num_tokens, num_features)`; `token_mask` `(num_tokens,)` is true
        where a token is not padding."""
        if not (self.learns_with(self.weight) or (self.training and self.momentum is None)):
            return F.batch_norm(query, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if token_mask is None and query.shape[0] > 1 and self.momentum is not None:
            return self._normalize_all(query)
        mean, variance = self._batch_statistics(query, token_mask)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return torch.addcmul(self.bias - mean * scale, query, scale)

    def _normalize_all(self, query):
        """What the rest of this module computes, where no token is padding: in a third of the time."""
        # Copies: a recomputation must not count, and what a backward keeps must not change before it, as it does when
        # DDP broadcasts buffers.
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
    """Whether this forward is gradient checkpointing's second run, inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def real_tokens(token_mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """`token_mask` as booleans, one of each token, `(num_tokens,)`.

    Args:
        token_mask: of any dtype, zero where a token is padding; its shape broadcasts to `shape`. `None` stays.
        shape: of the tokens.

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
                f"token_mask is {tuple(token_mask.shape)}, but the tokens are {tuple(shape)}: give one value a token."
            ) from error
    return token_mask.bool().flatten()


def _refuse_sync_batch_norm(norm: nn.Module) -> None:
    if isinstance(norm, nn.SyncBatchNorm):
        raise ValueError(
            "query_norm became a SyncBatchNorm, which counts padding and ignores frozen statistics: PEER refuses it. "
            "Do not convert the model (sync_batchnorm=False in Lightning). For the same function in every process, "
            'train with query_norm="rms_norm", or call model.freeze_running_statistics().'
        )


class PeerRetrieval(nn.Module):
    """Query network and product keys: from hidden states to the ids and gates of the retrieved experts.

        query = norm(x W_q + b);  ids, scores = top-k of the product keys;  gate = softmax(scores) per head

    Scores are neither scaled nor perturbed, and nothing is dropped (He 2024, section 2).
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
        self.query_norm = _query_norm(config)
        codebooks = (2, config.num_sub_keys, self.query_dim // 2)
        self.sub_keys = nn.Parameter(torch.empty(codebooks if config.share_sub_keys else (self.num_heads, *codebooks)))

    def reset_parameters(self):
        """Our choice, the paper states none: normalised queries then give product scores of variance one, so the
        softmax over a head's k experts starts neither flat nor one-hot."""
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
            token_mask: `(...)`, true where a token is not padding; for BatchNorm in training, and balance losses.
            aux_losses: where the balance loss goes, if the configuration has one; `None`: it is not computed.

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

    def query_network(self) -> tuple[tuple, tuple] | None:
        """Its modules, and their weights as a layer in one call wants them (`kernels.few_tokens`); None if it is of
        another kind, or its norm still learns."""
        projection, norm = self._modules["query_proj"], self._modules["query_norm"]
        names = _NORM_TENSORS.get(type(norm))
        if type(projection) is not nn.Linear or names is None or norm.training:
            return None
        # Looked up where modules register them: in a fifth of the time of their attributes. FSDP registers others.
        weight, bias = map(projection._parameters.get, ("weight", "bias"))
        tensors = {**norm._parameters, **norm._buffers}
        if weight is None or bias is None or any(tensors.get(name) is None for name in names):
            return None
        norm_tensors = tuple(map(tensors.get, _NORM_TENSORS[PeerBatchNorm]))
        return (projection, norm), (weight, bias, norm_tensors, getattr(norm, "eps", 0.0))


# Of the norms that a layer in one call knows: what they normalise with.
_NORM_TENSORS = {
    PeerBatchNorm: ("running_mean", "running_var", "weight", "bias"),
    PeerLayerNorm: ("weight", "bias"),
    PeerRMSNorm: ("weight",),
    nn.Identity: (),
}


def _query_norm(config: PeerConfig) -> nn.Module:
    if config.query_norm == "batch_norm":
        return PeerBatchNorm(config.num_retrieval_heads * config.query_dim)
    if config.query_norm == "rms_norm":
        return PeerRMSNorm(config.query_dim, eps=config.rms_norm_eps, dtype=_norm_dtype())
    if config.query_norm == "layer_norm":
        return PeerLayerNorm(config.query_dim, dtype=_norm_dtype())
    return nn.Identity()

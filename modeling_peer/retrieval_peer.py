# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token gets: the query network, the product keys, and their exact top-k."""

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


class PeerBatchNorm(Float32Module):
    """BatchNorm of queries, made safe for language modelling (He 2024, section 3.3, enables it by default).

    Differences from `nn.BatchNorm1d`: padding does not enter the statistics; fewer than two tokens are normalised
    with the running statistics, which they leave alone; a forward recomputed by gradient checkpointing does not
    count again; the statistics stay float32 in a half-precision model; frozen (`weight.requires_grad` false, as under
    an adapter) it acts as in evaluation, since what it would learn is not saved. In training a token's query depends,
    through the mean and variance of this process's micro-batch, on the other tokens there, later ones included; in
    evaluation on itself only.

    Args:
        num_features: features of one token's query, all heads together.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; PyTorch's default.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        dtype = _norm_dtype()
        self.weight = nn.Parameter(torch.empty(num_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, dtype=dtype))

    def reset_parameters(self):
        for ones in (self.weight, self.running_var):
            init.ones_(ones)
        for zeros in (self.bias, self.running_mean):
            init.zeros_(zeros)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, query: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise each feature of `query` `(num_tokens, num_features)`; `token_mask` `(num_tokens,)` is true
        where a token is not padding."""
        if not (self.training and self.weight.requires_grad):
            return F.batch_norm(query, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if token_mask is None and query.shape[0] > 1:
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
                momentum = torch.where(enough, self.momentum, 0.0).to(self.running_mean.dtype)
                unbiased = variance * torch.where(enough, count / (count - 1), 1.0)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return mean, variance


def is_recomputation() -> bool:
    """Whether this forward is gradient checkpointing's second run, inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
        token_mask = None if token_mask is None else token_mask.flatten()
        if self.has_batch_norm:
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

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Costs of a model, counted from its configuration: parameters, active parameters, and FLOPs of the forward.

    model_cost(config, sequence_length=512).forward_flops          # per token
    model_parts(config, sequence_length=512)["routing"].parameters

FLOPs are those of matrix products in the forward of a training step, two per multiply-add, as
`torch.utils.flop_counter` counts them. Norms, activations, softmax, entmax, top-k and look-ups are free. Attention
counts every pair of positions, including those that a causal mask hides. PEER's experts and a memory's rows are not
matrix products in PyTorch, but count as if they were.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modeling_peer import PeerConfig
from modeling_peer.grown_pools_peer import grown_pools_of
from modeling_peer.hashed_memory_peer import table_sizes_of

# The backward of a matrix product has two products of the same size, one for the gradient of each factor. Gradient
# checkpointing computes forwards again. This is not counted, because it depends on the implementation.
TRAINING_FLOPS_PER_FORWARD_FLOP = 3


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a model.

    Args:
        parameters: number of all parameters.
        active_parameters: number of parameters that multiply one token, on average over the tokens. Embeddings count
            whole.
        forward_flops: FLOPs per token.
    """

    parameters: int = 0
    active_parameters: int = 0
    forward_flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.active_parameters + other.active_parameters,
            self.forward_flops + other.forward_flops,
        )

    def __mul__(self, number: int) -> "Cost":
        return Cost(number * self.parameters, number * self.active_parameters, number * self.forward_flops)

    @property
    def training_flops(self) -> int:
        """FLOPs per token, forward and backward."""
        return TRAINING_FLOPS_PER_FORWARD_FLOP * self.forward_flops


def model_cost(config: PeerConfig, sequence_length: int) -> Cost:
    """Cost of a whole model; see [`model_parts`]."""
    return sum_of_parts(model_parts(config, sequence_length))


def sum_of_parts(parts: dict[str, Cost]) -> Cost:
    """Sum of the parts from [`model_parts`], or of one layer's parts."""
    return sum(parts.values(), Cost())


def model_parts(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Cost of each part of a language model, causal or masked.

    Classifiers are not counted. Their heads cost almost nothing.

    Args:
        config: a PEER configuration.
        sequence_length: tokens of a sequence. Attention depends on it. So does the cost of slots per token, because
            the number of slots is fixed.

    Returns:
        embeddings, norms (of the decoder), attention, dense MLPs, routing, experts, head, the output gate of Memory+,
        and the fusion of a hashed memory. Parameters shared by several layers, or by embeddings and head, count once.
        Every token still uses them in each place.
    """
    if config.model_type != "peer":
        raise ValueError(f"costs are counted for PEER configurations, got model_type={config.model_type!r}.")
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}.")
    num_layers, num_sparse = config.num_hidden_layers, config.mlp_layer_types.count("sparse")
    num_dense = num_layers if config.parallel_dense_mlp else num_layers - num_sparse
    sparse = SPARSE_MLP_COSTS[config.sparse_mlp](config, sequence_length)
    if config.parallel_hashed_memory:
        beside = hashed_memory_cost(config, sequence_length)
        sparse = {name: sparse.get(name, Cost()) + beside.get(name, Cost()) for name in sparse | beside}
    experts = sparse["experts"] * num_sparse
    if config.share_expert_tables and num_sparse:
        experts += Cost(parameters=-(num_sparse - 1) * sparse["experts"].parameters)
    sparse = {name: cost * num_sparse for name, cost in sparse.items()} | {"experts": experts}
    for layer in range(num_layers):
        for pool in grown_pools_of(config, layer):
            sparse = {name: sparse[name] + cost for name, cost in peer_cost(pool, sequence_length).items()}
    embeddings = config.vocab_size * config.hidden_size
    head = _matrix(config.hidden_size, config.vocab_size)
    if config.tie_word_embeddings:
        head = Cost(forward_flops=head.forward_flops)
    return {
        "embeddings": Cost(embeddings, embeddings),
        "norms": _elementwise(config.hidden_size) * (2 * num_layers + 1),
        "attention": attention_cost(config, sequence_length) * num_layers,
        "dense MLPs": dense_cost(config) * num_dense,
        **sparse,
        "head": head,
    }


def attention_cost(config: PeerConfig, sequence_length: int) -> Cost:
    """Llama's attention: four projections, the scores of a token with all positions, and the sum of values."""
    width, bias = config.hidden_size, config.attention_bias
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    pairs = Cost(forward_flops=2 * 2 * sequence_length * query_width)
    query, key, output = (
        _matrix(width, query_width, bias),
        _matrix(width, key_width, bias),
        _matrix(query_width, width, bias),
    )
    return query + key * 2 + output + pairs


def dense_cost(config: PeerConfig) -> Cost:
    """Llama's gated MLP."""
    return _gated_mlp(config.hidden_size, config.intermediate_size, config.mlp_bias)


def peer_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """PEER: an expert reads and writes a token with one row of each table."""
    expert = _matrix(config.hidden_size, 1) * (3 if config.gated_experts else 2)
    return {"routing": retrieval_cost(config), "experts": _chosen(expert, config)}


def product_key_memory_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Product-key memory: PEER's retrieval, one table of values, and optionally Memory+'s gate and projection."""
    values = _chosen(_matrix(config.hidden_size, 1), config)
    gate = {"output gate": _matrix(config.hidden_size, config.hidden_size) * 2} if config.gated_memory else {}
    return {"routing": retrieval_cost(config), "experts": values, **gate}


def hashed_memory_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Hashed n-gram memory: rows are looked up, which is free, and keys and values are projected from them.

    The convolution is a product of a diagonal matrix for each tap, which the definition above leaves out.
    """
    tables = table_sizes_of(config)
    width, row = config.hidden_size, config.ngram_dim // len(tables)
    rows = Cost(sum(tables) * row, config.ngram_dim)
    fusion = _matrix(config.ngram_dim, width) * 2 + _elementwise(width) * (3 + config.ngram_conv_size)
    return {"routing": Cost(), "experts": rows, "fusion": fusion}


def retrieval_cost(config: PeerConfig) -> Cost:
    """The query network and the scores of all sub-keys. A balance loss scores them a second time."""
    num_heads, num_keys, query_dim = config.num_retrieval_heads, config.num_sub_keys, config.query_dim
    norm_width = num_heads * query_dim if config.query_norm == "batch_norm" else query_dim
    num_norm_vectors = {"batch_norm": 2, "layer_norm": 2, "rms_norm": 1, "none": 0}[config.query_norm]
    sub_keys = num_keys * query_dim * (1 if config.share_sub_keys else num_heads)
    scores = Cost(sub_keys, sub_keys, 2 * num_heads * num_keys * query_dim)
    if config.balance_loss is not None:  # the second scores, and the mean over tokens, a product with a vector
        scores += Cost(forward_flops=scores.forward_flops + 2 * 2 * num_heads * num_keys)
    query = _matrix(config.hidden_size, num_heads * query_dim, bias=True)
    return query + _elementwise(norm_width) * num_norm_vectors + scores


def top_k_moe_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Noisy top-k or Switch. Noise has a router matrix of its own. Switch also computes the tokens that it drops."""
    noisy = config.moe_router == "noisy_top_k"
    router = _matrix(config.hidden_size, config.num_moe_experts) * (2 if noisy else 1)
    return {"routing": router, "experts": _mixture(config, config.num_moe_experts_per_token if noisy else 1)}


def expert_choice_moe_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Expert choice: `moe_capacity_factor` experts per token on average."""
    capacity = 2 if config.moe_capacity_factor is None else config.moe_capacity_factor
    router = _matrix(config.hidden_size, config.num_moe_experts)
    return {"routing": router, "experts": _mixture(config, min(capacity, config.num_moe_experts))}


def soft_moe_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Soft mixture: the tokens of a sequence share its slots.

    Every slot is scored against all tokens, filled from them, and spread over them.
    """
    num_slots = config.num_moe_experts * config.num_slots_per_expert
    slots = _matrix(config.hidden_size, num_slots)
    mixing = Cost(forward_flops=2 * slots.forward_flops)
    return {"routing": slots + mixing + _elementwise(1), "experts": _mixture(config, num_slots / sequence_length)}


def multilinear_moe_cost(config: PeerConfig, sequence_length: int) -> dict[str, Cost]:
    """Multilinear mixture: two layers with the same coefficients.

    Each is a factorised tensor of experts, inputs with a channel of ones, and outputs.
    """
    width, inner = config.hidden_size, config.moe_intermediate_size
    layer = {"cp": _cp_layer, "tensor_ring": _tensor_ring_layer}[config.multilinear_form]
    return {
        "routing": _matrix(width, config.num_moe_experts),
        "experts": layer(config, width, inner) + layer(config, inner, width),
    }


def _cp_layer(config: PeerConfig, inputs: int, outputs: int) -> Cost:
    (rank,) = config.multilinear_factor_ranks
    return _matrix(config.num_moe_experts, rank) + _matrix(inputs, rank, bias=True) + _matrix(rank, outputs)


def _tensor_ring_layer(config: PeerConfig, inputs: int, outputs: int) -> Cost:
    first, second, third = config.multilinear_factor_ranks
    cores = _matrix(config.num_moe_experts, first * second) + _matrix(inputs, second * third, bias=True)
    return cores + Cost(forward_flops=2 * first * second * third) + _matrix(third * first, outputs)


SPARSE_MLP_COSTS: dict[str, Callable[[PeerConfig, int], dict[str, Cost]]] = {
    "peer": peer_cost,
    "product_key_memory": product_key_memory_cost,
    "hashed_memory": hashed_memory_cost,
    "top_k_moe": top_k_moe_cost,
    "expert_choice_moe": expert_choice_moe_cost,
    "soft_moe": soft_moe_cost,
    "multilinear_moe": multilinear_moe_cost,
}


def _matrix(inputs: int, outputs: int, bias: bool = False) -> Cost:
    parameters = inputs * outputs + (outputs if bias else 0)
    return Cost(parameters, parameters, 2 * inputs * outputs)


def _elementwise(size: int) -> Cost:
    return Cost(size, size)


def _gated_mlp(width: int, inner: int, bias: bool = False) -> Cost:
    return _matrix(width, inner, bias) * 2 + _matrix(inner, width, bias)


def _mixture(config: PeerConfig, num_per_token: float) -> Cost:
    expert = _gated_mlp(config.hidden_size, config.moe_intermediate_size)
    return _some_of(expert, config.num_moe_experts, num_per_token)


def _chosen(row: Cost, config: PeerConfig) -> Cost:
    return _some_of(row, config.num_expert_rows, config.num_active_experts)


def _some_of(expert: Cost, num_experts: int, num_per_token: float) -> Cost:
    """A pool of experts of which a token uses some. An expert chosen by several heads counts once for each head."""
    return Cost(
        num_experts * expert.parameters,
        round(min(num_per_token, num_experts) * expert.active_parameters),
        round(num_per_token * expert.forward_flops),
    )

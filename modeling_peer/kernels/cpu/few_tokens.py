# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A few tokens on CPU, usually one: in decoding, the calls between kernels take as long as the kernels.

    queries, normalised | scores | best experts and gates | act(x · down) · gate, added up with the rows of `up`

The order of every sum depends neither on other tokens nor on the number of threads, so results are bit-identical from
run to run.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..one_call import QueryNetwork
from . import threads
from .experts import PREFETCHED_ROWS, add_row, dot_row, rows_of
from .memory import as_float32, borrowed
from .products import FEW_KEYS, FEW_ROWS, score_few_block
from .simd import GROUPS, compiled, narrow, prefetch_row, widen
from .threads import in_parallel
from .top_k import PADDING, best_pairs, copy_finite, find_best, scratch_for

# From this many queries for the same sub-keys on, laying these out in blocks saves time (`cpu.retrieval`).
MIN_BLOCKED_ROWS = 64
MAX_ASSIGNMENTS = 1024  # above, PyTorch's activation of many numbers at once saves more than one pass over the rows
CHUNKS_PER_THREAD = 2
KEYS_PER_PART = 128
ASSIGNMENTS_PER_PART = 32

# Codes of gates and activations in compiled code.
SCORES, SOFTMAX, SIGMOID = range(3)
GATES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
IDENTITY, GELU, RELU, SILU = range(4)
ACTIVATIONS = {"identity": IDENTITY, "gelu": GELU, "relu": RELU, "silu": SILU}


def run_layer(
    tokens: torch.Tensor,
    query_network: QueryNetwork,
    sub_keys: torch.Tensor,
    num_heads: int,
    top_k: int,
    gate_activation: str,
    tables: tuple[torch.Tensor | None, ...],
    activation: str,
    scales: tuple[torch.Tensor | None, ...],
    before_reading: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Outputs (t, d), float32. Arguments are those of `one_call.run_few`, which checks them; `activation` by name."""
    weight = query_network.weight
    tokens, codebooks = as_float32(tokens), as_float32(sub_keys)
    num_sub_keys, half = sub_keys.shape[-2:]
    output = torch.empty(tokens.shape, dtype=torch.float32, device="cpu")
    down, up, gate = (None if table is None else rows_of(table) for table in tables)
    num_assignments = tokens.shape[0] * num_heads * top_k
    num_bytes = weight.nbytes + codebooks.nbytes + 2 * num_assignments * tables[1].shape[1] * tables[1].itemsize
    network = (
        borrowed(weight),
        borrowed(query_network.bias),
        *(None if tensor is None else borrowed(tensor) for tensor in query_network.norm),
        np.float32(query_network.eps),
    )
    # other names than the tensors', which must live as long as their borrowed arrays
    keys = borrowed(codebooks, codebooks.numel() // (2 * num_sub_keys * half), 2, num_sub_keys, half)
    num_threads = threads.num_threads_for(num_bytes)
    row_scales = (None if scale is None else borrowed(scale) for scale in scales)
    # one flat list: Numba takes longer to look at the same arrays in tuples
    retrieval = (borrowed(tokens), *network, keys, top_k, GATES[gate_activation])
    experts = (down, up, gate, ACTIVATIONS[activation], *row_scales, borrowed(output), num_threads)
    if before_reading is None:
        _run_layer(*retrieval, *experts)
    else:
        ids, gates = _retrieve(*retrieval, num_threads)
        before_reading(torch.from_numpy(ids))
        _mix(retrieval[0], ids, gates, *experts)
    return output


@compiled
def _run_layer(
    tokens,
    weight,
    bias,
    mean,
    variance,
    scale,
    shift,
    eps,
    codebooks,
    top_k,
    gate_activation,
    down,
    up,
    gate_rows,
    activation,
    down_scale,
    up_scale,
    gate_scale,
    output,
    num_threads,
):
    ids, gates = _retrieve(
        tokens, weight, bias, mean, variance, scale, shift, eps, codebooks, top_k, gate_activation, num_threads
    )
    _mix(tokens, ids, gates, down, up, gate_rows, activation, down_scale, up_scale, gate_scale, output, num_threads)


@compiled
def _retrieve(tokens, weight, bias, mean, variance, scale, shift, eps, codebooks, top_k, gate_activation, num_threads):
    """Experts and gates of each token, `(t, h * k)`."""
    half = codebooks.shape[3]
    query_dim = 2 * half
    num_heads = len(weight) // query_dim
    queries = np.empty((len(tokens), len(weight)), np.float32)
    arguments = (tokens, weight, bias, mean, variance, scale, shift, eps, queries, query_dim)
    in_parallel(_make_queries, arguments, min(num_heads, CHUNKS_PER_THREAD * num_threads), num_threads)
    of_queries = (len(tokens) * num_heads, top_k)
    gates, ids = np.empty(of_queries, np.float32), np.empty(of_queries, np.int64)
    _search(queries.reshape(-1, 2, half), codebooks, gates, ids, gate_activation, num_threads)
    shape = (len(tokens), num_heads * top_k)
    return ids.reshape(shape), gates.reshape(shape)


@compiled
def _make_queries(tokens, weight, bias, mean, variance, scale, shift, eps, queries, query_dim, chunk, num_chunks):
    """Normalised queries (t, h * q) of some heads, rounded like the output of a linear map of the weights' type."""
    num_heads = len(weight) // query_dim
    for head in range(num_heads * chunk // num_chunks, num_heads * (chunk + 1) // num_chunks):
        first = head * query_dim
        for row in range(first, first + query_dim):
            for t in range(len(tokens)):
                value = dot_row(tokens[t], weight[row]) + widen(bias[row])
                queries[t, row] = widen(narrow(value, bias[row]))
        for t in range(len(tokens)):
            query = queries[t, first : first + query_dim]
            if mean is not None:  # BatchNorm
                for i in range(query_dim):
                    factor = scale[first + i] / np.sqrt(variance[first + i] + eps)
                    query[i] = query[i] * factor + (shift[first + i] - mean[first + i] * factor)
            elif shift is not None:  # LayerNorm
                center = _mean(query)
                factor = np.float32(1) / np.sqrt(_mean_square(query, center) + eps)
                for i in range(query_dim):
                    query[i] = (query[i] - center) * factor * scale[i] + shift[i]
            elif scale is not None:  # RMSNorm
                factor = np.float32(1) / np.sqrt(_mean_square(query, np.float32(0)) + eps)
                for i in range(query_dim):
                    query[i] = query[i] * factor * scale[i]


@compiled
def _mean(values):
    total = np.float32(0)
    for value in values:
        total += value
    return total / np.float32(len(values))


@compiled
def _mean_square(values, center):
    total = np.float32(0)
    for value in values:
        total += (value - center) * (value - center)
    return total / np.float32(len(values))


def search_few(queries: np.ndarray, codebooks: np.ndarray, scores: np.ndarray, expert_ids: np.ndarray) -> None:
    """Write `scores` and `expert_ids`, (rows, k) each, for queries (rows, 2, q / 2).

    Row r searches codebook `r % searches` of (searches, 2, n, q / 2).
    """
    _search(queries, codebooks, scores, expert_ids, SCORES, threads.num_threads_for(codebooks.nbytes))


@compiled
def _search(queries, codebooks, out_scores, out_ids, gate, num_threads):
    num_searches, _, num_sub_keys, _ = codebooks.shape
    num_tiles = num_searches * -(-(len(queries) // num_searches) // FEW_ROWS)
    products = np.empty((num_tiles, 2, num_sub_keys, FEW_ROWS), np.float32)
    num_parts = num_tiles * 2 * -(-num_sub_keys // KEYS_PER_PART)
    num_chunks = CHUNKS_PER_THREAD * num_threads
    in_parallel(_score, (queries, codebooks, products), min(num_parts, num_chunks), num_threads)
    in_parallel(_rank, (products, num_searches, out_scores, out_ids, gate), min(len(queries), num_chunks), num_threads)


@compiled
def _score(queries, codebooks, products, chunk, num_chunks):
    """Products (tiles, 2, n, FEW_ROWS) of parts of the codebooks in their own layout, FEW_ROWS queries at a time."""
    num_searches, _, num_sub_keys, half = codebooks.shape
    rows_per_search = len(queries) // num_searches
    tiles_per_search = len(products) // num_searches
    parts_per_codebook = -(-num_sub_keys // KEYS_PER_PART)
    num_parts = len(products) * 2 * parts_per_codebook
    columns = np.zeros((half, FEW_ROWS), np.float32)  # queries side by side
    laid_out = -1
    for part in range(num_parts * chunk // num_chunks, num_parts * (chunk + 1) // num_chunks):
        side, first = part // parts_per_codebook, part % parts_per_codebook * KEYS_PER_PART
        tile, codebook = side // 2, side % 2
        search, start = tile // tiles_per_search, tile % tiles_per_search * FEW_ROWS
        if laid_out != side:
            for i in range(min(FEW_ROWS, rows_per_search - start)):
                columns[:, i] = queries[(start + i) * num_searches + search, codebook]
            laid_out = side
        sub_keys, out = codebooks[search, codebook], products[tile, codebook]
        stop = min(first + KEYS_PER_PART, num_sub_keys)
        blocked = first + (stop - first) // FEW_KEYS * FEW_KEYS
        for key in range(first, blocked, FEW_KEYS):
            score_few_block(sub_keys[key : key + FEW_KEYS], 0, columns, out[key : key + FEW_KEYS], 0)
        for key in range(blocked, stop):
            out[key] = 0
            for feature in range(half):
                out[key] += sub_keys[key, feature] * columns[feature]


@compiled
def _rank(products, num_searches, out_scores, out_ids, gate, chunk, num_chunks):
    """Best experts of some queries, and their scores or gates."""
    num_rows, top_k = out_scores.shape
    num_sub_keys = products.shape[2]
    tiles_per_search = len(products) // num_searches
    scores = np.empty(-(-num_sub_keys // GROUPS) * GROUPS, np.float32)
    scores[num_sub_keys:] = PADDING
    best, best_keys = np.empty((2, top_k), np.float32), np.empty((2, top_k), np.int64)
    scratch = scratch_for(len(scores))
    for row in range(num_rows * chunk // num_chunks, num_rows * (chunk + 1) // num_chunks):
        search, position = row % num_searches, row // num_searches
        tile = search * tiles_per_search + position // FEW_ROWS
        finite = np.float32(0)
        for codebook in range(2):
            finite += copy_finite(products[tile, codebook, :, position % FEW_ROWS], scores)
            finite += find_best(scores, scratch, best[codebook], best_keys[codebook])
        best_pairs(best, best_keys, num_sub_keys, finite, out_scores[row], out_ids[row])
        _gates_from_scores(out_scores[row], gate)


@compiled
def _gates_from_scores(scores, gate):
    """Turn scores, best first, into gates in place; `SCORES` leaves them unchanged."""
    if gate == SOFTMAX:
        total, largest = np.float32(0), scores[0]
        for i in range(len(scores)):
            scores[i] = np.exp(scores[i] - largest)
            total += scores[i]
        for i in range(len(scores)):
            scores[i] /= total
    elif gate == SIGMOID:
        for i in range(len(scores)):
            scores[i] = np.float32(1) / (np.float32(1) + np.exp(-scores[i]))


@compiled
def _mix(tokens, ids, gates, down, up, gate_rows, activation, down_scale, up_scale, gate_scale, output, num_threads):
    num_tokens, num_active = ids.shape
    num_parts = -(-num_active // ASSIGNMENTS_PER_PART)
    sums = np.zeros((num_tokens, num_parts, tokens.shape[1]), np.float32)
    arguments = (tokens, ids, gates, down, up, gate_rows, activation, down_scale, up_scale, gate_scale, sums)
    in_parallel(_mix_parts, arguments, min(num_tokens * num_parts, CHUNKS_PER_THREAD * num_threads), num_threads)
    output[:] = 0
    for t in range(num_tokens):
        for part in range(num_parts):
            add_row(output[t], np.float32(1), sums[t, part])


@compiled
def _mix_parts(
    tokens,
    ids,
    gates,
    down,
    up,
    gate_rows,
    activation,
    down_scale,
    up_scale,
    gate_scale,
    sums,
    chunk,
    num_chunks,
):
    """Partial outputs of some experts of a token: sums (t, parts, d)."""
    num_tokens, num_parts, _ = sums.shape
    num_active = ids.shape[1]
    stop_unit = num_tokens * num_parts * (chunk + 1) // num_chunks
    for unit in range(num_tokens * num_parts * chunk // num_chunks, stop_unit):
        t, part = unit // num_parts, unit % num_parts
        token, total = tokens[t], sums[t, part]
        first = part * ASSIGNMENTS_PER_PART
        stop = min(first + ASSIGNMENTS_PER_PART, num_active)
        for a in range(first, stop):
            ahead = ids[t, min(a + PREFETCHED_ROWS, stop - 1)]
            prefetch_row(up, ahead)
            weight = gates[t, a]
            if down is not None:
                prefetch_row(down, ahead)
                neuron = dot_row(token, down[ids[t, a]])
                if down_scale is not None:
                    neuron *= down_scale[ids[t, a]]
                if gate_rows is None:
                    weight *= _activate(neuron, activation)
                else:
                    prefetch_row(gate_rows, ahead)
                    gate = dot_row(token, gate_rows[ids[t, a]])
                    if gate_scale is not None:
                        gate *= gate_scale[ids[t, a]]
                    weight *= _activate(gate, activation) * neuron
            if up_scale is not None:
                weight *= up_scale[ids[t, a]]
            add_row(total, weight, up[ids[t, a]])


@compiled
def _activate(value, activation):
    if activation == GELU:
        return np.float32(0.5) * value * np.float32(1 + math.erf(value * math.sqrt(0.5)))
    if activation == RELU:
        return value if value > 0 or value != value else np.float32(0)
    if activation == SILU:
        return value / (np.float32(1) + np.exp(-value))
    return value

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Exact top-k of product keys on a GPU, and its gradient.

    s1, s2 = query[:q/2] · C1ᵀ, query[q/2:] · C2ᵀ       best k of each: first kernel, one block of sub-keys at a time
    scores, ids = best k of the sums of one of each     id = row * n + column: second kernel

t tokens, h heads, k experts per head, n sub-keys, q query size. Between the two kernels, only the best k scores of
each codebook are in memory, never all n. Comparisons use one int64 code with a float32 score in the high bits and the
id in the low bits. So the best code names its expert, the lower id wins a tie, and no expert is returned twice.

The gradient is that of `write_experts` with the codebooks as the table, so it uses the same kernels.
"""

import torch
import triton
import triton.language as tl

from ..sub_key_ids import for_both_halves, sub_key_ids_of
from .experts import FUSED, group_by_expert, row_gradients, write_experts

# Rows (a token's query of one head) and sub-keys of a tile of scores. A warp has 16 rows, so that it finds a row's
# best code alone. Not swept yet: 32 to 128 rows, 32 to 128 sub-keys, 32 to 128 of the query at a time.
BLOCK_R = 64
BLOCK_N = 64
BLOCK_Q = 32
# Codes of each codebook that a program of one warp joins: 8 per thread. Not swept yet: 64 to 1024, 1 to 4 warps.
JOIN_CODES = 256
# Programs that fill the GPU. With fewer tiles, several programs share the sub-keys of one tile. A score has the same
# bits for every such split. Not swept yet: 128 to 1024, at 1 to 512 tokens.
NUM_PROGRAMS = 256
MAX_SPLITS = 8

# The input type of tensor cores. Triton's interpreter would multiply bfloat16's bits as integers. As float32 the same
# numbers have the same products.
FACTOR = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
# Below the code of every score.
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def encode(scores, ids):
    """int64 codes whose order is that of the scores, and of lower ids among equal scores; ids are below 2**31."""
    bits = scores.to(tl.int32, bitcast=True)
    # NaN ranks above infinity whatever its sign, as in torch.topk, so that errors stay visible.
    bits = tl.where(scores == scores, bits, 0x7FC00000)
    # The bits of negative floats have reverse order.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids.to(tl.int64))


@triton.jit
def decode(codes):
    """The scores and ids from which `encode` made the codes."""
    bits = (codes >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (codes & 0x7FFFFFFF)


@triton.jit
def keep_best(best, codes):
    """Replace entries of `best` (rows, K) by better `codes` (rows, any), unordered; all codes of a row differ.

    It takes as many iterations as the row with the most new entries needs: K in the first block of sub-keys, few in
    the last.
    """
    weakest = tl.min(best, axis=1)
    strongest = tl.max(codes, axis=1)
    while tl.max((strongest > weakest).to(tl.int32), axis=0) > 0:
        enters = (best == weakest[:, None]) & (strongest > weakest)[:, None]
        best = tl.where(enters, strongest[:, None], best)
        codes = tl.where(codes == strongest[:, None], NOTHING, codes)
        weakest = tl.min(best, axis=1)
        strongest = tl.max(codes, axis=1)
    return best


@triton.jit
def add_product(total, left, right):
    """total + left . transposed right, for float32 `left` and bfloat16 `right`: exact products, summed in float32.

    An infinite value has no rest: its first piece alone decides, as in float32.

    The last product does not add to `total`. In a loop, Triton 3.6 and 3.7 would otherwise not wait for that product:
    the next iteration would overwrite its factors in their registers (triton-lang/triton, issue 9433).
    """
    right = tl.trans(right).to(FACTOR)
    first = left.to(tl.bfloat16)
    rest = left - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(first.to(FACTOR), right, total)
    small = tl.dot(second.to(FACTOR), right, tl.dot(third.to(FACTOR), right))
    # Pieces rounded to nearest differ in sign. Times infinity they give NaN and infinities of the wrong sign.
    return total + tl.where(tl.abs(small) < float("inf"), small, 0.0)


@triton.jit(do_not_specialize=["num_rows"])  # one compilation for many lengths
def sub_key_top_k_kernel(
    query_ptr,
    sub_keys_ptr,
    codes_ptr,
    num_rows,
    num_sub_keys,
    BLOCKS_PER_SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """codes[row, half, split] = the best K of query[row, half] . sub_keys[half], unordered.

    A program handles BLOCK_R rows that share codebooks, one half of their queries, and the sub-keys of one split.
    """
    codebook = tl.program_id(1)
    half = codebook % 2
    num_groups = tl.num_programs(1) // 2  # groups of rows with the same codebooks: one, or one per head
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    query_ids = (r.to(tl.int64) * num_groups + codebook // 2) * 2 + half
    sub_keys_ptr += codebook.to(tl.int64) * num_sub_keys * HALF

    k = tl.arange(0, K)
    best = tl.broadcast_to((k.to(tl.int64) + NOTHING)[None, :], (BLOCK_R, K))  # all different
    for block in range(BLOCKS_PER_SPLIT):
        n = (tl.program_id(2) * BLOCKS_PER_SPLIT + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for q_start in range(0, HALF, BLOCK_Q):
            q = q_start + tl.arange(0, BLOCK_Q)
            in_query = (r < num_rows)[:, None] & (q < HALF)[None, :]
            in_codebook = (n < num_sub_keys)[:, None] & (q < HALF)[None, :]
            query = tl.load(query_ptr + query_ids[:, None] * HALF + q[None, :], mask=in_query, other=0.0)
            keys = tl.load(sub_keys_ptr + n[:, None] * HALF + q[None, :], mask=in_codebook, other=0.0)
            # Three products on tensor cores. A single one in tf32 keeps 11 bits and changes winners, and "ieee" would
            # not use tensor cores.
            if keys.dtype == tl.bfloat16:
                # Unchanged sub-keys, and all 24 bits of a query in three pieces: half the work of three in tf32.
                scores = add_product(scores, query, keys)
            else:
                # 22 bits of each factor: about the rounding of float32 itself over such a sum.
                scores = tl.dot(query, tl.trans(keys.to(tl.float32)), scores, input_precision="tf32x3")
        codes = tl.where((n < num_sub_keys)[None, :], encode(scores, n[None, :]), NOTHING)
        best = keep_best(best, codes)

    best = tl.where(best < NOTHING + K, NOTHING, best)  # a split may hold fewer than K sub-keys
    lists = query_ids * tl.num_programs(2) + tl.program_id(2)
    tl.store(codes_ptr + lists[:, None] * K + k[None, :], best, mask=(r < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])  # one compilation for many lengths
def product_key_top_k_kernel(
    codes_ptr,
    scores_ptr,
    expert_ids_ptr,
    num_rows,
    num_sub_keys,
    num_codes,
    TOP_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """scores[row], expert_ids[row] = the best TOP_K sums of a score in codes[row, 0] and one in codes[row, 1].

    Each has num_codes codes, unordered. A program handles BLOCK_R rows.

    Each row sub-key is paired with the column sub-keys, best first. In each iteration the best pair wins, and its row
    sub-key is paired with the next column. This merges sorted lists, and scores no pair before it could be next.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    row_codes_ptr = codes_ptr + (r * 2 * num_codes)[:, None] + c[None, :]
    mask = (r < num_rows)[:, None] & (c < num_codes)[None, :]
    row_codes = tl.load(row_codes_ptr, mask=mask, other=NOTHING)
    column_codes = tl.load(row_codes_ptr + num_codes, mask=mask, other=NOTHING)
    row_scores, rows = decode(row_codes)

    met = tl.max(column_codes, axis=1)[:, None]
    column_scores, columns = decode(met)
    pairs = encode(row_scores + column_scores, rows * num_sub_keys + columns)
    pairs = tl.where(row_codes == NOTHING, NOTHING, pairs)
    met = tl.broadcast_to(met, (BLOCK_R, BLOCK_C))
    for k in range(TOP_K):
        winner = tl.max(pairs, axis=1)
        score, expert_id = decode(winner)
        tl.store(scores_ptr + r * TOP_K + k, score, mask=r < num_rows)
        tl.store(expert_ids_ptr + r * TOP_K + k, expert_id, mask=r < num_rows)

        wins = pairs == winner[:, None]
        last_met = tl.max(tl.where(wins, met, NOTHING), axis=1)[:, None]
        next_met = tl.max(tl.where(column_codes < last_met, column_codes, NOTHING), axis=1)[:, None]
        column_scores, columns = decode(next_met)
        next_pairs = encode(row_scores + column_scores, rows * num_sub_keys + columns)
        # There is a next column until the last iteration: a list has TOP_K or more.
        pairs = tl.where(wins, next_pairs, pairs)
        met = tl.where(wins, next_met, met)


def product_key_top_k(query: torch.Tensor, sub_keys: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`product_keys_peer.product_key_top_k` in two kernels: exact, with scores accurate to float32.

    The host does not wait for the GPU. A NaN score ranks first, as in `torch.topk`. Ids are valid and distinct,
    whatever the scores.

    Args:
        query: `(num_tokens, num_heads, query_dim)`, float32, contiguous.
        sub_keys: `(2, num_sub_keys, query_dim // 2)` or `(num_heads, 2, num_sub_keys, query_dim // 2)`, contiguous.
        top_k: experts per head, at most `num_sub_keys`.

    Returns:
        scores: `(num_tokens, num_heads, top_k)`, float32, best first.
        expert_ids: same shape, int64, `row * num_sub_keys + column`.
    """
    num_tokens, num_heads, query_dim = query.shape
    num_sub_keys = sub_keys.shape[-2]
    num_rows = num_tokens * num_heads
    scores = torch.empty(num_tokens, num_heads, top_k, dtype=torch.float32, device=query.device)
    expert_ids = torch.empty(num_tokens, num_heads, top_k, dtype=torch.int64, device=query.device)
    if num_rows == 0:
        return scores, expert_ids

    list_size = triton.next_power_of_2(top_k)
    # Rows that share codebooks form one group: all rows, or those of one head.
    num_groups = 1 if sub_keys.dim() == 3 else num_heads
    num_tiles = triton.cdiv(num_rows // num_groups, BLOCK_R)
    num_blocks = triton.cdiv(num_sub_keys, BLOCK_N)
    max_splits = min(max(NUM_PROGRAMS // (num_tiles * num_groups * 2), 1), MAX_SPLITS)
    blocks_per_split = triton.cdiv(num_blocks, max_splits)
    num_splits = triton.cdiv(num_blocks, blocks_per_split)
    codes = torch.empty(num_rows, 2, num_splits * list_size, dtype=torch.int64, device=query.device)
    block_c = triton.next_power_of_2(num_splits) * list_size
    block_r = max(JOIN_CODES // block_c, 1)
    with torch.cuda.device_of(query):
        sub_key_top_k_kernel[(num_tiles, num_groups * 2, num_splits)](
            query,
            sub_keys,
            codes,
            num_rows // num_groups,
            num_sub_keys,
            BLOCKS_PER_SPLIT=blocks_per_split,
            HALF=query_dim // 2,
            K=list_size,
            BLOCK_R=BLOCK_R,
            BLOCK_N=BLOCK_N,
            BLOCK_Q=min(BLOCK_Q, max(triton.next_power_of_2(query_dim // 2), 16)),
            num_warps=BLOCK_R // 16,
            **FUSED,
        )
        product_key_top_k_kernel[(triton.cdiv(num_rows, block_r),)](
            codes,
            scores,
            expert_ids,
            num_rows,
            num_sub_keys,
            num_splits * list_size,
            TOP_K=top_k,
            BLOCK_C=block_c,
            BLOCK_R=block_r,
            num_warps=1,
            **FUSED,
        )
    return scores, expert_ids


def product_key_top_k_backward(
    grad_scores: torch.Tensor, expert_ids: torch.Tensor, query: torch.Tensor, sub_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the scores for the query and the sub-keys, both float32, bit-identical from run to run.

    score = query[:q/2] · C1[row] + query[q/2:] · C2[column]. Each half of a query is thus a token that weights k rows
    of one table, the codebooks.

    Args:
        grad_scores: `(num_tokens, num_heads, top_k)`, float32.
        expert_ids: same shape, int64.
        query, sub_keys: as in `product_key_top_k`.

    Returns:
        grad_query: `(num_tokens, num_heads, query_dim)`, float32.
        grad_sub_keys: shape of `sub_keys`, float32.
    """
    half = sub_keys.shape[-1]
    codebooks = sub_keys.view(-1, half)
    sub_key_ids, weights = sub_key_ids_of(expert_ids, sub_keys), for_both_halves(grad_scores)

    grad_query = write_experts(weights, sub_key_ids, codebooks)
    order = group_by_expert(sub_key_ids)
    _, grad_sub_keys = row_gradients(
        weights, query.view(-1, half), sub_key_ids, order, codebooks.shape[0], torch.float32, row_sparse=False
    )
    return grad_query.view_as(query), grad_sub_keys.view_as(sub_keys)

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing expert tables on a GPU, and the gradients of both.

    pre[t, a] = tokens[t] · table[expert_ids[t, a]]                        read_experts
    out[t]    = Σ_a weights[t, a] · table[expert_ids[t, a]]                write_experts
    grad_table[e] = Σ weights[t, a] · tokens[t]   over expert_ids[t, a] = e        row_gradients

t tokens, a active experts per token, d width, N rows of the table. Gathered rows are not written to memory: a program
holds the rows it works on. Sums run in float32, without atomics, in an order that depends only on the shapes. So
results are bit-identical from run to run, and a token's reads and writes do not depend on its batch. Ids are
multiplied by the width in int64: 1024**2 rows of width 2048 are 2**31 elements. Grids are one-dimensional, since CUDA
limits the other axes to 65535. Width and active experts are compile-time constants: a model has one of each, and most
divisions and masks vanish.

Quantised tables (`row_formats`) are read as bytes. Their numbers are widened to float32 in registers by integer
operations, so that float8 needs no GPU that has it.

Tensors in, tensors out, all dense in memory. The operators that call these functions check shapes (`checks`). A row
with an invalid id is not read. Its result is NaN, because an error would make the host wait for the GPU. Its gradient
is dropped. For row-sparse gradients the host waits anyway, and an error is raised.
"""

import torch
import triton
import triton.language as tl

from ...row_formats_peer import row_width
from ..checks import check_ids_exist

# Elements of table rows that a program of 4 warps loads at a time. That is 64 per thread: in bfloat16, eight loads of
# 16 bytes in flight. Reads use long pieces of few rows, so that there are few sums over the width; writes do the
# reverse. Smaller blocks give a single token more programs. Not swept yet: 2048 to 16384 elements, blocks of half and
# twice as many, 2 to 8 warps; at 1, 64 and 8192 tokens of width 256 to 4096.
TILE_ELEMENTS = 8192
READ_BLOCK_A = 16
READ_BLOCK_D = 1024
WRITE_BLOCK_A = 64
WRITE_BLOCK_D = 128
# Longest run of assignments that one program sums. It affects the result's bits. It also limits the buffer of pieces
# to 2 * d * t * a / MAX_RUN float32 values: twice a token's width per token at 128 active experts. Not swept yet: 64
# to 512.
MAX_RUN = 128
# Programs that search for runs, each among at most MAX_WINDOW positions. With one program per position of a large
# batch, most would find no run. No result depends on either. Not swept yet: 2048 to 65536 programs, windows of 1 to
# 64.
RUN_PROGRAMS = 8192
MAX_WINDOW = 16
# Fused multiply-add. It is Triton's default until 3.9, which warns that this will change.
FUSED = {"enable_fp_fusion": True}


# How kernels read a row: as floats or integers of one number an element, or as bytes of int4 or float8.
PLAIN, INT4, FLOAT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ------------------------------------------------------------------------------------------------- forward


@triton.jit
def load_numbers(table_ptr, expert_ids, d, mask, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """Numbers `d` of the rows `expert_ids`, in float32; 0 outside `mask`. The last two have one shape."""
    if FORMAT == INT4:
        HALF: tl.constexpr = WIDTH // 2
        is_high = d >= HALF
        places = expert_ids * HALF + tl.where(is_high, d - HALF, d)
        bits = tl.load(table_ptr + places, mask=mask, other=136).to(tl.int32)
        return (tl.where(is_high, bits >> 4, bits & 15) - 8).to(tl.float32)
    rows = tl.load(table_ptr + expert_ids * WIDTH + d, mask=mask, other=0)
    if FORMAT == FLOAT8:
        # e4m3fn: the exponent's bias is 7, and 127 in float32. The largest magnitude is NaN.
        bits = rows.to(tl.int32)
        magnitude = bits & 0x7F
        values = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        values = tl.where(magnitude == 0x7F, float("nan"), values)
        return tl.where(bits >= 128, -values, values)
    return rows.to(tl.float32)


@triton.jit(do_not_specialize=["num_experts"])  # one compilation for tables of many sizes
def read_experts_kernel(
    tokens_ptr,
    expert_ids_ptr,
    table_ptr,
    pre_ptr,
    num_experts,
    NUM_ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pre[t, a] = tokens[t] . table[expert_ids[t, a]]; a program handles one token and BLOCK_A of its experts."""
    num_blocks = tl.cdiv(NUM_ACTIVE, BLOCK_A)
    t = (tl.program_id(0) // num_blocks).to(tl.int64)
    a = tl.program_id(0) % num_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    is_active = a < NUM_ACTIVE
    expert_ids = tl.load(expert_ids_ptr + t * NUM_ACTIVE + a, mask=is_active, other=0).to(tl.int64)
    exists = (expert_ids >= 0) & (expert_ids < num_experts)

    products = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        token = tl.load(tokens_ptr + t * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        mask = (is_active & exists)[:, None] & (d < WIDTH)[None, :]
        rows = load_numbers(table_ptr, expert_ids[:, None], d[None, :], mask, WIDTH, FORMAT)
        products += rows * token[None, :]
    pre = tl.where(exists, tl.sum(products, axis=1), float("nan"))
    tl.store(pre_ptr + t * NUM_ACTIVE + a, pre, mask=is_active)


@triton.jit(do_not_specialize=["num_experts"])
def write_experts_kernel(
    weights_ptr,
    expert_ids_ptr,
    table_ptr,
    out_ptr,
    num_experts,
    NUM_ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum_a weights[t, a] * table[expert_ids[t, a]]; a program handles BLOCK_D columns of one token."""
    num_blocks = tl.cdiv(WIDTH, BLOCK_D)
    t = (tl.program_id(0) // num_blocks).to(tl.int64)
    d = tl.program_id(0) % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)

    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, NUM_ACTIVE, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        is_active = a < NUM_ACTIVE
        weights = tl.load(weights_ptr + t * NUM_ACTIVE + a, mask=is_active, other=0.0)
        expert_ids = tl.load(expert_ids_ptr + t * NUM_ACTIVE + a, mask=is_active, other=0).to(tl.int64)
        exists = (expert_ids >= 0) & (expert_ids < num_experts)
        weights = tl.where(exists | (a >= NUM_ACTIVE), weights, float("nan"))
        mask = (is_active & exists)[:, None] & (d < WIDTH)[None, :]
        rows = load_numbers(table_ptr, expert_ids[:, None], d[None, :], mask, WIDTH, FORMAT)
        total += tl.sum(weights[:, None] * rows, axis=0)
    tl.store(out_ptr + t * WIDTH + d, total, mask=d < WIDTH)


def _format_and_bytes(table: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The constant of the kernels for a table, and the table as they get it."""
    if table.dtype == torch.float8_e4m3fn:
        return FLOAT8.value, table.view(torch.uint8)
    return (INT4 if table.dtype == torch.uint8 else PLAIN).value, table


def read_experts(tokens: torch.Tensor, expert_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Dot product of each token with each of its rows of `table`.

    Args:
        tokens: `(num_tokens, width)`, float32 or half precision.
        expert_ids: `(num_tokens, num_active)`, int64; repeats allowed.
        table: `(num_experts, width)`, float32, half precision or quantised.

    Returns:
        `(num_tokens, num_active)`, float32.
    """
    num_tokens, num_active = expert_ids.shape
    width = tokens.shape[1]
    table_format, table = _format_and_bytes(table)
    pre = torch.empty(num_tokens, num_active, dtype=torch.float32, device=tokens.device)
    block_d = min(READ_BLOCK_D, triton.next_power_of_2(width))
    block_a = min(READ_BLOCK_A, TILE_ELEMENTS // block_d, triton.next_power_of_2(num_active))
    if pre.numel():
        grid = (num_tokens * triton.cdiv(num_active, block_a),)
        with torch.cuda.device_of(tokens):
            read_experts_kernel[grid](
                tokens,
                expert_ids,
                table,
                pre,
                table.shape[0],
                num_active,
                width,
                table_format,
                BLOCK_A=block_a,
                BLOCK_D=block_d,
                **FUSED,
            )
    return pre


def write_experts(weights: torch.Tensor, expert_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows of `table`. It is also the gradient of `read_experts` for its tokens.

    Args:
        weights: `(num_tokens, num_active)`, float32.
        expert_ids: same shape, int64; repeats allowed.
        table: `(num_experts, width)`, float32, half precision or quantised.

    Returns:
        `(num_tokens, width)`, float32.
    """
    num_tokens, num_active = expert_ids.shape
    width = row_width(table)
    table_format, table = _format_and_bytes(table)
    out = torch.empty(num_tokens, width, dtype=torch.float32, device=weights.device)
    block_d = min(WRITE_BLOCK_D, triton.next_power_of_2(width))
    block_a = min(WRITE_BLOCK_A, triton.next_power_of_2(num_active))
    if out.numel():
        grid = (num_tokens * triton.cdiv(width, block_d),)
        with torch.cuda.device_of(weights):
            write_experts_kernel[grid](
                weights,
                expert_ids,
                table,
                out,
                table.shape[0],
                num_active,
                width,
                table_format,
                BLOCK_A=block_a,
                BLOCK_D=block_d,
                **FUSED,
            )
    return out


# ------------------------------------------------------------------------------------------------ backward
#
# Assignments sorted by expert form segments, one per touched row. A segment is cut into runs at every multiple of
# MAX_RUN, and one program sums each run. Thus many programs share an expert that every token picks. A segment with one
# run is written directly to its row. The runs of a longer one are pieces, kept in float32 until they are joined.


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def run_gradients_kernel(
    weights_ptr,
    tokens_ptr,
    table_ptr,
    expert_ids_ptr,
    order_ptr,
    segments_ptr,
    values_ptr,
    pieces_ptr,
    grad_weights_ptr,
    num_assignments,
    num_experts,
    num_rows,
    NUM_ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX_RUN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """values[segment] = sum of weights[slot] * tokens[slot // NUM_ACTIVE] over the sorted slots of a segment.

    With a table also grad_weights[slot] = tokens[slot // NUM_ACTIVE] . table[expert]. A program handles the runs that
    start in a window of WINDOW positions, and holds a whole row. `values` has `num_rows` rows, and the table has
    `num_experts`.
    """
    d = tl.arange(0, BLOCK_D)
    for i in range(WINDOW):
        position = tl.program_id(0).to(tl.int64) * WINDOW + i
        is_assignment = position < num_assignments
        segment = tl.load(segments_ptr + position, mask=is_assignment, other=0)
        has_last = is_assignment & (position > 0)
        begins_segment = (tl.load(segments_ptr + position - 1, mask=has_last, other=0) != segment) | (position == 0)
        if is_assignment & (begins_segment | (position % MAX_RUN == 0)):
            run_end = tl.minimum((position // MAX_RUN + 1) * MAX_RUN, num_assignments)
            if HAS_TABLE:
                slot = tl.load(order_ptr + position)
                is_slot = (slot >= 0) & (slot < num_assignments)
                expert_id = tl.load(expert_ids_ptr + slot, mask=is_slot, other=-1).to(tl.int64)
                exists = (expert_id >= 0) & (expert_id < num_experts)
                in_table = d < tl.where(exists, WIDTH, 0)
                row = tl.load(table_ptr + expert_id * WIDTH + d, mask=in_table, other=0.0).to(tl.float32)
                row += tl.where(exists, 0.0, float("nan"))

            total = tl.zeros((BLOCK_D,), tl.float32)
            next_position = position
            num_mine = tl.full((), BLOCK_A, tl.int32)
            while num_mine == BLOCK_A:
                p = next_position + tl.arange(0, BLOCK_A)
                is_mine = (tl.load(segments_ptr + p, mask=p < run_end, other=0) == segment) & (p < run_end)
                slots = tl.load(order_ptr + p, mask=is_mine, other=0)
                are_slots = is_mine & (slots >= 0) & (slots < num_assignments)
                weights = tl.load(weights_ptr + slots, mask=are_slots, other=0.0)
                token_starts = slots // NUM_ACTIVE * WIDTH
                mask = are_slots[:, None] & (d < WIDTH)[None, :]
                tokens = tl.load(tokens_ptr + token_starts[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
                total += tl.sum(weights[:, None] * tokens, axis=0)
                if HAS_TABLE:
                    tl.store(grad_weights_ptr + slots, tl.sum(tokens * row[None, :], axis=1), mask=are_slots)
                num_mine = tl.sum(is_mine.to(tl.int32), axis=0)
                next_position += num_mine

            in_row = d < WIDTH
            is_last = next_position >= num_assignments
            next_segment = tl.load(segments_ptr + next_position, mask=next_position < num_assignments, other=0)
            if begins_segment & (is_last | (next_segment != segment)):
                if (segment >= 0) & (segment < num_rows):
                    tl.store(values_ptr + segment * WIDTH + d, total.to(values_ptr.dtype.element_ty), mask=in_row)
            else:
                # At most two pieces start between two multiples of MAX_RUN: at the first, and before the second.
                piece = position // MAX_RUN * 2 + (position % MAX_RUN != 0)
                tl.store(pieces_ptr + piece * WIDTH + d, total, mask=in_row)


@triton.jit(do_not_specialize=["num_rows"])
def join_pieces_kernel(
    pieces_ptr,
    segments_ptr,
    values_ptr,
    num_assignments,
    num_rows,
    WIDTH: tl.constexpr,
    MAX_RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """values[segment] = sum of its pieces.

    A program belongs to one multiple of MAX_RUN. If that is the first inside a segment, the program joins BLOCK_D
    columns of all the segment's pieces; otherwise it does nothing.
    """
    num_blocks = tl.cdiv(WIDTH, BLOCK_D)
    d = tl.program_id(0) % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < WIDTH
    border = (tl.program_id(0) // num_blocks).to(tl.int64) + 1
    position = border * MAX_RUN
    segment = tl.load(segments_ptr + position)
    is_inside = tl.load(segments_ptr + position - 1) == segment
    is_first = (tl.load(segments_ptr + position - MAX_RUN - 1, mask=border > 1, other=0) != segment) | (border == 1)
    if is_inside & is_first:
        begins_after_border = tl.load(segments_ptr + position - MAX_RUN) != segment
        first_piece = (border - 1) * 2 + begins_after_border
        total = tl.load(pieces_ptr + first_piece * WIDTH + d, mask=in_row, other=0.0)
        num_mine = tl.full((), BLOCK_P, tl.int32)
        while num_mine == BLOCK_P:
            p = border + tl.arange(0, BLOCK_P)
            in_order = p * MAX_RUN < num_assignments
            is_mine = (tl.load(segments_ptr + p * MAX_RUN, mask=in_order, other=0) == segment) & in_order
            mask = is_mine[:, None] & in_row[None, :]
            piece_starts = p * 2 * WIDTH
            total += tl.sum(tl.load(pieces_ptr + piece_starts[:, None] + d[None, :], mask=mask, other=0.0), axis=0)
            num_mine = tl.sum(is_mine.to(tl.int32), axis=0)
            border += BLOCK_P
        if (segment >= 0) & (segment < num_rows):
            tl.store(values_ptr + segment * WIDTH + d, total.to(values_ptr.dtype.element_ty), mask=in_row)


def group_by_expert(expert_ids: torch.Tensor) -> torch.Tensor:
    """Positions in the flattened `expert_ids`, sorted stably by expert: `(num_tokens * num_active,)`, int64.

    Args:
        expert_ids: `(num_tokens, num_active)`.
    """
    # int32: a radix sort makes a pass for each byte of its keys, and no table has 2**31 rows.
    return expert_ids.flatten().to(torch.int32).argsort(stable=True)


def row_gradients(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    row_sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a table: each touched row is the sum of `weights[t, a] * tokens[t]` over its assignments.

    Without `row_sparse` no shape depends on the ids, so a CUDA graph can capture it. With `row_sparse`, the host waits
    once for the number of touched rows. Results are bit-identical from run to run.

    Args:
        weights: `(num_tokens, num_active)`, float32.
        tokens: `(num_tokens, width)`, float32 or half precision.
        expert_ids: `(num_tokens, num_active)`, int64.
        order: `group_by_expert(expert_ids)`.
        num_experts: rows of the table.
        dtype: dtype of the result; sums run in float32.
        row_sparse: return only touched rows.

    Returns:
        rows: touched experts, ascending, `(num_touched,)` int64; empty without `row_sparse`.
        values: `(num_touched, width)`, or without `row_sparse` `(num_experts, width)`, with zeros in untouched rows.
    """
    rows, values, _ = _gradients(weights, tokens, None, expert_ids, order, num_experts, dtype, row_sparse)
    return rows, values


def write_experts_gradients(
    grad_output: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    table: torch.Tensor,
    row_sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `write_experts` for its weights and table, in one pass over the assignments sorted by expert.

    Arguments and guarantees are those of `row_gradients`, with `grad_output` `(num_tokens, width)` as the tokens.

    Returns:
        grad_weights: `grad_output[t] · table[expert_ids[t, a]]`, `(num_tokens, num_active)`, float32.
        rows, values: gradient of the table, in its dtype, as in `row_gradients`.
    """
    rows, values, grad_weights = _gradients(
        weights, grad_output, table, expert_ids, order, table.shape[0], table.dtype, row_sparse
    )
    return grad_weights, rows, values


def _gradients(weights, tokens, table, expert_ids, order, num_experts, dtype, row_sparse):
    num_assignments, num_active, width = expert_ids.numel(), expert_ids.shape[1], tokens.shape[1]
    sorted_ids = expert_ids.flatten()[order]
    if row_sparse:
        rows, segments = torch.unique_consecutive(sorted_ids, return_inverse=True)
        check_ids_exist(rows, num_experts)
        values = torch.empty(rows.shape[0], width, dtype=dtype, device=tokens.device)
    else:
        rows, segments = sorted_ids.new_empty(0), sorted_ids
        values = torch.zeros(num_experts, width, dtype=dtype, device=tokens.device)
    grad_weights = None if table is None else torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    if num_assignments == 0:
        return rows, values, grad_weights

    num_borders = (num_assignments - 1) // MAX_RUN  # multiples of MAX_RUN after the first position
    pieces = torch.empty(2 * (num_borders + 1), width, dtype=torch.float32, device=tokens.device)
    block_d = triton.next_power_of_2(width)
    # One row per program, 8 elements per thread up to a width of 4096 (32 warps have 64 registers per thread, and
    # spill). 4 assignments at a time, more for a narrow row, fewer for a wide one. Not swept yet: 1 to 16 assignments,
    # 4 to 32 elements per thread.
    num_warps = min(max(block_d // 256, 1), 16)
    block_a = min(max(1024 * num_warps // block_d, 1), 16)
    # A power of two, since each window size is compiled.
    window = min(triton.next_power_of_2(triton.cdiv(num_assignments, RUN_PROGRAMS)), MAX_WINDOW)
    with torch.cuda.device_of(tokens):
        run_gradients_kernel[(triton.cdiv(num_assignments, window),)](
            weights,
            tokens,
            table,
            expert_ids,
            order,
            segments,
            values,
            pieces,
            grad_weights,
            num_assignments,
            num_experts,
            values.shape[0],
            num_active,
            width,
            HAS_TABLE=table is not None,
            WINDOW=window,
            MAX_RUN=MAX_RUN,
            BLOCK_A=block_a,
            BLOCK_D=block_d,
            num_warps=num_warps,
            **FUSED,
        )
        if num_borders:
            block_d = min(WRITE_BLOCK_D, block_d)
            join_pieces_kernel[(num_borders * triton.cdiv(width, block_d),)](
                pieces,
                segments,
                values,
                num_assignments,
                values.shape[0],
                width,
                MAX_RUN=MAX_RUN,
                BLOCK_P=16,
                BLOCK_D=block_d,
                **FUSED,
            )
    return rows, values, grad_weights

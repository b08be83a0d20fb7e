# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Scores of sub-keys, summed in registers: blocks of them in float32 or in integers, or those of a list.

Every function adds up the features of a float32 score one after the other, so all give the same bits.
"""

from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from .simd import element, in_every_lane

_FEATURES = llvm.get_host_cpu_features()
HAS_AVX512 = bool(_FEATURES.get("avx512f", False))
# Products of pairs of int16, summed in int32, at twice the rate of float32. The instruction is requested by name; LLVM
# crashes on it if it compiles for another CPU. (AVX2's two instructions have 1.6 times the rate of float32 on a Zen 3
# core. There a search takes as long with the filter as without, 2026-11-26.)
HAS_VNNI = HAS_AVX512 and bool(_FEATURES.get("avx512vnni", False)) and not (config.CPU_NAME or config.CPU_FEATURES)

# A block of scores in registers, BLOCK_ROWS queries x BLOCK_KEYS sub-keys. 16 accumulators of 16 lanes fill half of
# AVX-512's registers; 12 of 8 lanes fill three quarters of AVX2's. Retrieval of 2,048 tokens on two Zen 4 cores took
# 60 ms with 8 x 2 vectors, 63 with 4 x 4, 65 with 24 x 1, 154 with 12 x 2 (2026-11-22). With AVX2, on a Zen 3 core,
# 6 x 2, 5 x 2, 4 x 2 and 2 x 4 are equal; 3 x 4 is half as fast, n x 1 two thirds as fast (2026-11-26).
LANES, BLOCK_ROWS, BLOCK_VECTORS = (16, 8, 2) if HAS_AVX512 else (8, 6, 2)
BLOCK_KEYS = LANES * BLOCK_VECTORS

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _int64(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _sum_over(builder, width, step: int, num_sums: int, vector_type: ir.VectorType, add: Callable) -> list[ir.Value]:
    """Vectors from `sums = add(feature, sums)` for feature 0, step, ... < width, starting from `num_sums` zeros."""
    before, loop, after = builder.block, builder.append_basic_block("sum"), builder.append_basic_block("summed")
    builder.branch(loop)

    builder.position_at_end(loop)
    feature, sums = builder.phi(_INT64), [builder.phi(vector_type) for _ in range(num_sums)]
    new_sums = add(feature, sums)
    next_feature = builder.add(feature, _int64(step))
    starts = [_int64(0)] + [ir.Constant(vector_type, None)] * num_sums
    for variable, start, new in zip([feature, *sums], starts, [next_feature, *new_sums], strict=True):
        variable.add_incoming(start, before)
        variable.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", next_feature, width), loop, after)

    builder.position_at_end(after)
    return new_sums


def _multiply_floats(builder, left, right, total):
    return _call(builder, f"llvm.fma.v{total.type.count}f32", left, right, total)


def _multiply_pairs(builder, left, right, total):
    """`total` plus the two products of the int16 pairs in each lane."""
    return _call(builder, "llvm.x86.avx512.vpdpwssd.512", total, left, right)


def _call(builder, name, *vectors):
    function_type = ir.FunctionType(vectors[0].type, [vectors[0].type] * len(vectors))
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), vectors)


def _product_block(num_rows: int, lanes: int, num_vectors: int, lane_type: ir.Type, multiply: Callable):
    """An intrinsic that multiplies `num_rows` rows with `lanes * num_vectors` columns:

        out[first_row + i, first_column + j] = rows[first_row + i] · columns[:, j]

    `rows` (rows, width) and `columns` (width, lanes * num_vectors) are of `lane_type`, `out` is float32; all are
    C-contiguous.
    """
    vector_type, float_vector = ir.VectorType(lane_type, lanes), ir.VectorType(_FLOAT, lanes)

    @intrinsic
    def product_block(typing_context, rows, first_row, columns, out, first_column):
        def generate(context, builder, signature, args):
            rows, first_row, columns, out, first_column = args
            rows_type, _, columns_type, out_type, _ = signature.args
            row_numbers = [builder.add(first_row, _int64(i)) for i in range(num_rows)]

            def add(feature, sums):
                vectors, new_sums = [], []
                for v in range(num_vectors):
                    indices = [feature, _int64(v * lanes)]
                    pointer = element(context, builder, columns_type, columns, indices, vector_type)
                    vectors.append(builder.load(pointer, align=4))
                for i, row in enumerate(row_numbers):
                    value = builder.load(element(context, builder, rows_type, rows, [row, feature], lane_type))
                    everywhere = in_every_lane(builder, value, vector_type)
                    row_sums = sums[i * num_vectors : (i + 1) * num_vectors]
                    new_sums += [multiply(builder, everywhere, v, s) for v, s in zip(vectors, row_sums, strict=True)]
                return new_sums

            width = cgutils.unpack_tuple(builder, context.make_array(columns_type)(context, builder, columns).shape)[0]
            for i, total in enumerate(_sum_over(builder, width, 1, num_rows * num_vectors, vector_type, add)):
                total = total if lane_type == _FLOAT else builder.sitofp(total, float_vector)
                column = builder.add(first_column, _int64(i % num_vectors * lanes))
                indices = [row_numbers[i // num_vectors], column]
                builder.store(total, element(context, builder, out_type, out, indices, float_vector), align=4)
            return context.get_dummy_value()

        return types.void(rows, types.int64, columns, out, types.int64), generate

    return product_block


# Many queries with sub-keys laid out in blocks. With sides swapped: sub-keys in their own layout, FEW_ROWS queries.
score_block = _product_block(BLOCK_ROWS, LANES, BLOCK_VECTORS, _FLOAT, _multiply_floats)
score_integer_block = _product_block(BLOCK_ROWS, LANES, BLOCK_VECTORS, _INT32, _multiply_pairs)
FEW_ROWS, FEW_KEYS = 8, 8
score_few_block = _product_block(FEW_KEYS, FEW_ROWS, 1, _FLOAT, _multiply_floats)

# Sub-keys of a list scored at once, in vectors of 8, and features loaded at once from each.
LISTED_KEYS, LISTED_LANES, LISTED_FEATURES = 24, 8, 4


@intrinsic
def score_listed(typing_context, query, sub_keys, keys, first, out):
    """`out[i] = query · sub_keys[keys[i]]` for `LISTED_KEYS` positions i, starting at `first`.

    `query` (width,) and `sub_keys` (n, width) are float32, `keys` int64; all are C-contiguous, and `width` is a
    multiple of `LISTED_FEATURES`.
    """
    vector_type = ir.VectorType(_FLOAT, LISTED_LANES)

    def generate(context, builder, signature, args):
        query, sub_keys, keys, first, out = args
        query_type, sub_keys_type, keys_type, _, out_type = signature.args
        positions = [builder.add(first, _int64(i)) for i in range(LISTED_KEYS)]
        numbers = [builder.load(element(context, builder, keys_type, keys, [i], _INT64)) for i in positions]

        def features_of(key, feature):
            few = ir.VectorType(_FLOAT, LISTED_FEATURES)
            return builder.load(element(context, builder, sub_keys_type, sub_keys, [key, feature], few), align=4)

        def add(feature, sums):
            values = []
            for i in range(LISTED_FEATURES):
                index = [builder.add(feature, _int64(i))]
                value = builder.load(element(context, builder, query_type, query, index, _FLOAT))
                values.append(in_every_lane(builder, value, vector_type))
            new_sums = []
            for i, total in enumerate(sums):
                rows = [features_of(key, feature) for key in numbers[i * LISTED_LANES : (i + 1) * LISTED_LANES]]
                for value, column in zip(values, _columns(builder, rows), strict=True):
                    total = _multiply_floats(builder, value, column, total)
                new_sums.append(total)
            return new_sums

        width = cgutils.unpack_tuple(builder, context.make_array(query_type)(context, builder, query).shape)[0]
        num_sums = LISTED_KEYS // LISTED_LANES
        for i, total in enumerate(_sum_over(builder, width, LISTED_FEATURES, num_sums, vector_type, add)):
            pointer = element(context, builder, out_type, out, [positions[i * LISTED_LANES]], vector_type)
            builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return types.void(query, sub_keys, keys, types.int64, out), generate


def _columns(builder, rows):
    """The columns of the matrix with these `rows`, whose number is a power of two."""
    num_rows, num_columns = len(rows), rows[0].type.count
    order = lambda indices: ir.Constant(ir.VectorType(_INT32, len(indices)), list(indices))  # noqa: E731
    while len(rows) > 1:
        joined = order(range(2 * rows[0].type.count))
        rows = [builder.shuffle_vector(a, b, joined) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    stop = num_rows * num_columns
    return [builder.shuffle_vector(rows[0], rows[0], order(range(i, stop, num_columns))) for i in range(num_columns)]

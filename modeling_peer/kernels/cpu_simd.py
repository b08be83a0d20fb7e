# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What Numba's Python cannot say: prefetching, bfloat16, masks, a register-blocked product of queries and sub-keys.

Numba keeps compiled kernels on disk and compiles again when their own file changes; after a change here, delete
`kernels/__pycache__`.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be reordered and fused, so that they vectorise; unlike `fastmath=True`, NaN and infinity stay what they are.
ARITHMETIC = {"reassoc", "contract", "arcp", "nsz"}
compiled = njit(nogil=True, cache=True, fastmath=ARITHMETIC, error_model="numpy")

# A block of scores in registers, BLOCK_ROWS queries x BLOCK_KEYS sub-keys: 16 accumulators of 16 lanes fill half of
# AVX-512's registers, 12 of 8 lanes three quarters of AVX2's. Retrieval of 2,048 tokens on two Zen 4 cores took 60 ms
# with 8 x 2 vectors, 63 with 4 x 4, 65 with 24 x 1, 154 with 12 x 2 (2026-11-22); AVX2 was not measured.
HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f", False))
LANES, BLOCK_ROWS, BLOCK_VECTORS = (16, 8, 2) if HAS_AVX512 else (8, 6, 2)
BLOCK_KEYS = LANES * BLOCK_VECTORS

GROUPS = 64  # bits of a mask of scores, and a multiple of every BLOCK_KEYS

CACHE_LINE = 64  # bytes
MAX_PREFETCHED_LINES = 16  # of one row; the hardware's own prefetcher follows from there

_FLOAT = ir.FloatType()
_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


def _element(context, builder, array_type, array, row, column, element_type):
    """Pointer to `array[row, column]`, read as `element_type`."""
    array = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, [row, column])
    return builder.bitcast(pointer, element_type.as_pointer())


@intrinsic
def _prefetch(typing_context, array, row, column):
    """Ask for the cache line of `array[row, column]` without waiting for it."""

    def generate(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args, ir.IntType(8))
        prefetch_type = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
        prefetch = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
        # Into L2: prefetches into L1 wait for its few miss buffers (22 against 17 ms for 256 MiB of rows).
        read, locality, data = (ir.Constant(_INT32, value) for value in (0, 2, 1))
        builder.call(prefetch, [pointer, read, locality, data])
        return context.get_dummy_value()

    return types.void(array, row, column), generate


@compiled
def prefetch_row(table, row):
    """Ask for the beginning of `table[row]`: the rows of one token lie all over a table of gigabytes."""
    step = CACHE_LINE // table.itemsize
    for column in range(0, min(table.shape[1], MAX_PREFETCHED_LINES * step), step):
        _prefetch(table, row, column)


@intrinsic
def widen(typing_context, value):
    """A table's value as float32; bfloat16 comes as its bits in uint16, which NumPy has."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        bits = builder.shl(builder.zext(args[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def narrow(typing_context, value, like):
    """float32 `value` in the type of `like`: itself, or bfloat16 bits rounded to nearest even (NaN stays NaN)."""
    if like == types.float32:
        return types.float32(types.float32, like), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        bits = builder.bitcast(args[0], _INT32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_INT32, 16)), ir.Constant(_INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_INT32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.select(is_nan, ir.Constant(_INT32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_INT32, 16)), _INT16)

    return types.uint16(types.float32, types.uint16), generate


@intrinsic
def chance(typing_context, row, column, step):
    """A hash of three integers, from 0 to 2**16 - 1 (`training.row_sparse_adamw.round_by_chance`)."""

    def generate(context, builder, signature, args):
        terms = [
            builder.mul(context.cast(builder, arg, of_type, types.int32), ir.Constant(_INT32, prime))
            for arg, of_type, prime in zip(args, signature.args, (0x9E3779B1, 0xC2B2AE3D, 0x85EBCA77), strict=True)
        ]
        noise = builder.add(builder.add(terms[0], terms[1]), terms[2])
        for shift, prime in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            noise = builder.xor(noise, builder.lshr(noise, ir.Constant(_INT32, shift)))
            noise = builder.mul(noise, ir.Constant(_INT32, prime))
        return builder.lshr(noise, ir.Constant(_INT32, 16))

    return types.uint32(row, column, step), generate


@intrinsic
def narrow_by_chance(typing_context, value, like, chance):
    """float32 `value` in the type of `like`: itself, or bfloat16 bits, rounded up where what is cut off and `chance`,
    from 0 to 2**16 - 1, are together 2**16 or more."""
    if like == types.float32:
        return types.float32(types.float32, like, chance), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        bits = builder.add(builder.bitcast(args[0], _INT32), args[2])
        return builder.trunc(builder.lshr(bits, ir.Constant(_INT32, 16)), _INT16)

    return types.uint16(types.float32, types.uint16, types.uint32), generate


def _in_every_lane(builder, value, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    one_lane = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    first_lanes = ir.Constant(ir.VectorType(_INT32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(one_lane, undefined, first_lanes)


def _product_block(num_rows: int, lanes: int, num_vectors: int):
    """An intrinsic that multiplies `num_rows` rows with `lanes * num_vectors` columns, summed in registers:

        out[first_row + i, first_column + j] = rows[first_row + i] · columns[:, j]

    `rows` (rows, width), `columns` (width, lanes * num_vectors) and `out` are float32, C-contiguous.
    """
    vector_type = ir.VectorType(_FLOAT, lanes)

    @intrinsic
    def product_block(typing_context, rows, first_row, columns, out, first_column):
        def generate(context, builder, signature, args):
            rows, first_row, columns, out, first_column = args
            rows_type, _, columns_type, out_type, _ = signature.args
            constant = lambda value: ir.Constant(_INT64, value)  # noqa: E731
            width = cgutils.unpack_tuple(builder, context.make_array(columns_type)(context, builder, columns).shape)[0]
            row_numbers = [builder.add(first_row, constant(i)) for i in range(num_rows)]
            fma_type = ir.FunctionType(vector_type, [vector_type] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{lanes}f32")

            before = builder.block
            loop = builder.append_basic_block("product_block.loop")
            after = builder.append_basic_block("product_block.after")
            builder.branch(loop)

            builder.position_at_end(loop)
            feature = builder.phi(_INT64)
            sums = [[builder.phi(vector_type) for _ in range(num_vectors)] for _ in row_numbers]
            vectors = [
                builder.load(
                    _element(context, builder, columns_type, columns, feature, constant(v * lanes), vector_type),
                    align=4,
                )
                for v in range(num_vectors)
            ]
            new_sums = []
            for row, row_sums in zip(row_numbers, sums, strict=True):
                value = builder.load(_element(context, builder, rows_type, rows, row, feature, _FLOAT))
                everywhere = _in_every_lane(builder, value, vector_type)
                new_sums.append(
                    [builder.call(fma, [everywhere, vector, s]) for vector, s in zip(vectors, row_sums, strict=True)]
                )
            next_feature = builder.add(feature, constant(1))
            feature.add_incoming(constant(0), before)
            feature.add_incoming(next_feature, loop)
            for row_sums, new_row_sums in zip(sums, new_sums, strict=True):
                for old, new in zip(row_sums, new_row_sums, strict=True):
                    old.add_incoming(ir.Constant(vector_type, [0.0] * lanes), before)
                    old.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", next_feature, width), loop, after)

            builder.position_at_end(after)
            for row, row_sums in zip(row_numbers, new_sums, strict=True):
                for v, total in enumerate(row_sums):
                    column = builder.add(first_column, constant(v * lanes))
                    builder.store(total, _element(context, builder, out_type, out, row, column, vector_type), align=4)
            return context.get_dummy_value()

        return types.void(rows, types.int64, columns, out, types.int64), generate

    return product_block


# Many queries with sub-keys laid out in blocks; and, sides swapped, sub-keys as they are with FEW_ROWS queries.
score_block = _product_block(BLOCK_ROWS, LANES, BLOCK_VECTORS)
FEW_ROWS, FEW_KEYS = 8, 8
score_few_block = _product_block(FEW_KEYS, FEW_ROWS, 1)


@intrinsic
def at_least(typing_context, scores, first, bound):
    """Which of the `GROUPS` values of `scores` (1-D, float32) from `first` on reach `bound`: bit i for value i."""

    def generate(context, builder, signature, args):
        array_type = signature.args[0]
        vector = ir.VectorType(_FLOAT, GROUPS)
        array = context.make_array(array_type)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, array_type, array, [args[1]])
        values = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
        return builder.bitcast(builder.fcmp_ordered(">=", values, _in_every_lane(builder, args[2], vector)), _INT64)

    return types.uint64(scores, types.int64, types.float32), generate


@intrinsic
def lowest_bit(typing_context, mask):
    """Position of the lowest bit that is set in `mask`, which is not zero."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate

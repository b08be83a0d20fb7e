# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Operations that Numba's Python lacks: prefetching, bfloat16, masks."""

from collections.abc import Callable

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cache import keep_compiled

# Sums may be reordered and fused, so that they vectorise. Unlike `fastmath=True`, this preserves NaN and infinity.
ARITHMETIC = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function: Callable) -> Callable:
    """Decorator: a kernel, compiled at the first call with each combination of argument types."""
    dispatcher = njit(nogil=True, fastmath=ARITHMETIC, error_model="numpy")(function)
    if dispatcher is function:
        raise RuntimeError("NUMBA_DISABLE_JIT is set: Numba compiles nothing")
    keep_compiled(dispatcher)
    return dispatcher


GROUPS = 64  # bits of a mask of scores, and a multiple of every `cpu.products.BLOCK_KEYS`

CACHE_LINE = 64  # bytes
MAX_PREFETCHED_LINES = 16  # of one row; the hardware prefetcher loads the rest

_FLOAT = ir.FloatType()
_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


def element(context, builder, array_type, array, indices, element_type):
    """Pointer to `array[indices]`, read as `element_type`."""
    array = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, indices)
    return builder.bitcast(pointer, element_type.as_pointer())


def in_every_lane(builder, value, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    one_lane = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    first_lanes = ir.Constant(ir.VectorType(_INT32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(one_lane, undefined, first_lanes)


@intrinsic
def _prefetch(typing_context, array, row, column):
    """Prefetch the cache line of `array[row, column]`, without waiting for it."""

    def generate(context, builder, signature, args):
        pointer = element(context, builder, signature.args[0], args[0], args[1:], ir.IntType(8))
        prefetch_type = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
        prefetch = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
        # Into L2: prefetches into L1 wait for its few miss buffers (22 against 17 ms for 256 MiB of rows).
        read, locality, data = (ir.Constant(_INT32, value) for value in (0, 2, 1))
        builder.call(prefetch, [pointer, read, locality, data])
        return context.get_dummy_value()

    return types.void(array, row, column), generate


@compiled
def prefetch_row(table, row):
    """Prefetch the beginning of `table[row]`: the rows of one token are scattered over a table of gigabytes."""
    step = CACHE_LINE // table.itemsize
    for column in range(0, min(table.shape[1], MAX_PREFETCHED_LINES * step), step):
        _prefetch(table, row, column)


@intrinsic
def is_packed(typing_context, row):
    """Whether a row holds two numbers in each element (int4), as a constant of the compiled code."""
    packed = row.dtype == types.uint8
    return types.boolean(row), lambda context, builder, signature, args: context.get_constant(types.boolean, packed)


@intrinsic
def widen_high(typing_context, value):
    """The number in the high half of an int4 byte as float32. Other types have none; for them it is never run."""
    if value != types.uint8:
        return types.float32(value), lambda context, builder, signature, args: ir.Constant(_FLOAT, 0.0)

    def generate(context, builder, signature, args):
        return _int4_as_float(builder, builder.lshr(builder.zext(args[0], _INT32), ir.Constant(_INT32, 4)))

    return types.float32(types.uint8), generate


def _int4_as_float(builder, bits):
    return builder.sitofp(builder.sub(bits, ir.Constant(_INT32, 8)), _FLOAT)


def _float8_as_float(builder, bits):
    """float32 with the value of float8 (e4m3fn) `bits`. Its exponent has another bias: 7 rather than 127."""
    magnitude = builder.and_(bits, ir.Constant(_INT32, 0x7F))
    value = builder.bitcast(builder.shl(magnitude, ir.Constant(_INT32, 20)), _FLOAT)
    value = builder.fmul(value, ir.Constant(_FLOAT, 2.0**120))
    is_nan = builder.icmp_unsigned("==", magnitude, ir.Constant(_INT32, 0x7F))
    value = builder.bitcast(builder.select(is_nan, ir.Constant(_FLOAT, float("nan")), value), _INT32)
    sign = builder.shl(builder.and_(bits, ir.Constant(_INT32, 0x80)), ir.Constant(_INT32, 24))
    return builder.bitcast(builder.or_(value, sign), _FLOAT)


@intrinsic
def widen(typing_context, value):
    """A table's value as float32; of two int4 values in a byte, the one in the low half.

    bfloat16 is passed as its bits in uint16, a type that NumPy has, and float8 as a structure of its bits.
    """
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]
    if value == types.int8:
        return types.float32(value), lambda context, builder, signature, args: builder.sitofp(args[0], _FLOAT)
    if value == types.uint8:

        def generate_int4(context, builder, signature, args):
            return _int4_as_float(builder, builder.and_(builder.zext(args[0], _INT32), ir.Constant(_INT32, 15)))

        return types.float32(value), generate_int4
    if isinstance(value, types.Record):  # passed by its address

        def generate_float8(context, builder, signature, args):
            return _float8_as_float(builder, builder.zext(builder.load(builder.bitcast(args[0], _BYTES)), _INT32))

        return types.float32(value), generate_float8

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
def hash_to_16_bits(typing_context, row, column, step):
    """A hash of three integers, from 0 to 2**16 - 1 (`optim.row_sparse_adamw.round_by_chance`)."""

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
def narrow_stochastically(typing_context, value, like, random_bits):
    """float32 `value` in the type of `like`: itself, or bfloat16 bits rounded stochastically.

    It is rounded up if the 16 bits cut off plus `random_bits`, from 0 to 2**16 - 1, are 2**16 or more.
    """
    if like == types.float32:
        return types.float32(types.float32, like, random_bits), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        bits = builder.add(builder.bitcast(args[0], _INT32), args[2])
        return builder.trunc(builder.lshr(bits, ir.Constant(_INT32, 16)), _INT16)

    return types.uint16(types.float32, types.uint16, types.uint32), generate


@intrinsic
def at_least(typing_context, scores, first, bound):
    """Mask of the `GROUPS` values of `scores` (1-D, float32) from `first` that reach `bound`: bit i for value i."""

    def generate(context, builder, signature, args):
        vector = ir.VectorType(_FLOAT, GROUPS)
        values = builder.load(element(context, builder, signature.args[0], args[0], [args[1]], vector), align=4)
        return builder.bitcast(builder.fcmp_ordered(">=", values, in_every_lane(builder, args[2], vector)), _INT64)

    return types.uint64(scores, types.int64, types.float32), generate


@intrinsic
def lowest_bit(typing_context, mask):
    """Position of the lowest set bit in `mask`; 64 if there is none."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def count_bits(typing_context, mask):
    """Number of set bits in `mask`."""

    def generate(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate

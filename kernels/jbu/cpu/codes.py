"""Quantize features to int8 codes, compiled: from channels-last features to planes of codes."""

import math
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import types

from kernels.compilation import compiled
from kernels.internals.numba import element_address, nothing
from kernels.quantization import INT8_MAX
from kernels.simd.memory import index_type, lanes, load
from kernels.simd.tiles import Array, elementwise, inlined, lane_numbers, llvm, tile_intrinsic

__all__ = ["SQUARE", "quantize"]

SQUARE = 16  # side of the square of bytes that is transposed at once, in registers
_MAX = float(INT8_MAX)


def _counter(limit: float) -> Any:
    """Make a function that counts how many of a vector's first elements are NaN or at least ``limit`` in magnitude."""

    @tile_intrinsic
    def count_beyond(_: Any, vector: Any, count: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, i64 = builder.extract_value(arguments[0], 0), ir.IntType(64)
            limits = ir.Constant(x.type, [limit] * x.type.count)
            beyond = builder.fcmp_unordered(">=", llvm("fabs", builder, x), limits)
            bits = builder.zext(builder.bitcast(beyond, ir.IntType(x.type.count)), i64)
            whole = builder.icmp_signed(">=", arguments[1], i64(x.type.count))
            shift = builder.select(whole, i64(x.type.count), arguments[1])
            return builder.ctpop(builder.and_(bits, builder.sub(builder.shl(i64(1), shift), i64(1))))

        return types.int64(vector, types.int64), emit

    return count_beyond


_count_clipped = _counter(_MAX + 1)  # for integral values; includes those that are not finite
_count_not_finite = _counter(math.inf)
_rounded = elementwise(lambda builder, x: llvm("rint", builder, x), 1)  # halves to even


@tile_intrinsic
def _store_codes(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store a vector of integral values as int8, clipped; 0 for values that are not finite."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = builder.extract_value(arguments[2], 0)

        def splat(number: float) -> Any:
            return ir.Constant(x.type, [number] * x.type.count)

        finite = builder.fcmp_ordered("<", llvm("fabs", builder, x), splat(math.inf))
        x = builder.select(finite, x, splat(0.0))
        x = builder.select(builder.fcmp_ordered("<", x, splat(_MAX)), x, splat(_MAX))
        x = builder.select(builder.fcmp_ordered(">", x, splat(-_MAX)), x, splat(-_MAX))
        whole = builder.fptosi(x, ir.VectorType(ir.IntType(32), x.type.count))
        codes = builder.trunc(whole, ir.VectorType(ir.IntType(8), x.type.count))
        to = element_address(context, builder, array, arguments[0], arguments[1])
        builder.store(codes, builder.bitcast(to, codes.type.as_pointer()), align=1)
        return nothing(context)

    return types.void(array, index_type(index), vector), emit


@tile_intrinsic
def _transpose(_: Any, array: Any, index: Any, step: Any, to: Any, to_index: Any, to_step: Any) -> Any:
    """Transpose a square of bytes, whose rows are ``step`` bytes apart, into rows of another array."""
    row = ir.VectorType(ir.IntType(8), SQUARE)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def places(type_: Any, value: Any, at: Any, step: Any) -> list[Any]:
            first = element_address(context, builder, type_, value, at)
            places = [builder.gep(first, [builder.mul(step, step.type(k))]) for k in range(SQUARE)]
            return [builder.bitcast(place, row.as_pointer()) for place in places]

        rows = [builder.load(place, align=1) for place in places(array, *arguments[:3])]
        half = SQUARE // 2
        order = [k + side * SQUARE for k in range(SQUARE) for side in (0, 1)]
        # Interleaving each row with the row half the square further, log2(rows) times, transposes the square.
        for _ in range(SQUARE.bit_length() - 1):
            pairs = zip(rows[:half], rows[half:], strict=True)
            parts = (order[:SQUARE], order[SQUARE:])
            rows = [builder.shuffle_vector(a, b, lane_numbers(part)) for a, b in pairs for part in parts]
        for transposed, place in zip(rows, places(to, *arguments[3:]), strict=True):
            builder.store(transposed, place, align=1)
        return nothing(context)

    return types.void(array, index_type(index), types.intp, to, index_type(to_index), types.intp), emit


@inlined
def _row(features: Array, row: int, step: Array, offset: Array, C: int, codes: Array) -> Any:
    """Write the codes [W, C] of one row; returns the numbers of values that are not finite and that were clipped."""
    L = lanes(features)
    not_finite, beyond = 0, 0
    for x in range(features.shape[1]):
        for c in range(0, C, L):
            scaled = _rounded((load(features, (row, x, c)) + load(offset, (c,))) / load(step, (c,)))
            outside = _count_clipped(scaled, C - c)
            if outside > 0:  # rare
                beyond += outside
                not_finite += _count_not_finite(scaled, C - c)
            _store_codes(codes, (x, c), scaled)
    return not_finite, beyond - not_finite


@compiled
def quantize(features: Array, step: Array, offset: Array, scratch: Array, codes: Array, Y: int, counts: Array) -> None:
    """Quantize rows of features, as `kernels.quantization.quantized`.

    Args:
        features: [rows, W, C or more].
        step: [C or more], 1 beyond C.
        offset: [C or more], 0 beyond C.
        scratch: [W, C or more] int8.
        codes: [C, H, W] int8, written from row Y.
        Y: first row of the codes.
        counts: [2] int64; the numbers of values that are not finite, and of clipped finite values, are added.
    """
    C, H, W = codes.shape
    for row in range(features.shape[0]):
        not_finite, clipped = _row(features, row, step, offset, C, scratch)
        counts[0] += not_finite
        counts[1] += clipped
        for c in range(0, C - C % SQUARE, SQUARE):
            for x in range(0, W - W % SQUARE, SQUARE):
                _transpose(scratch, (x, c), scratch.shape[1], codes, (c, Y + row, x), H * W)
        for c in range(C):
            for x in range(0 if c >= C - C % SQUARE else W - W % SQUARE, W):
                codes[c, Y + row, x] = scratch[x, c]

"""Tiles of vectors in registers, for functions compiled by numba: much faster than loops vectorised by LLVM.

A tile is rows × columns vectors of `VECTOR_BYTES`, all of one dtype. Arithmetic broadcasts over rows and columns as in
numpy, so that a step of a matrix product is ``sums = fma(column of weights, row of inputs, sums)``, and LLVM keeps the
sums of such a loop in registers. Without tiles, LLVM would use half of the AVX-512 vector width, and load and store the
sums at each step: 13% of a core's peak, while tiles reached 80 to 90% on a Xeon with AVX-512.

Loads and stores are in `kernels.simd.memory`, functions like exp in `kernels.simd.functions`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import config, njit, types
from numba.extending import intrinsic, models, overload, register_model

from kernels.internals.numba import declared, processor_features

__all__ = [
    "VECTOR_BYTES",
    "Array",
    "Tile",
    "constant",
    "elementwise",
    "fma",
    "inlined",
    "lane_numbers",
    "larger",
    "llvm",
    "maximum",
    "packed",
    "rows_of",
    "spread",
    "summed_products",
    "swapped_pairs",
    "tile_intrinsic",
    "width",
]

Array = npt.NDArray[Any]

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

_FEATURES = processor_features()
VECTOR_BYTES = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function so that it is inlined into each compiled caller; tiles are then not passed in memory."""
    return njit(forceinline=True)(function)


def tile_intrinsic(function: Callable[..., Any]) -> Any:
    """Make an intrinsic, which emits LLVM code itself. It gets numba's types, and literal types for constants."""
    return intrinsic(prefer_literal=True)(function)


class Tile(types.Type):  # type: ignore[misc, unused-ignore]  # some versions of numba have no types
    """The type of a tile.

    Args:
        dtype: numba's float32 or float64.
        rows: number of rows of vectors.
        columns: number of columns of vectors.
    """

    def __init__(self, dtype: Any, rows: int, columns: int) -> None:
        self.dtype, self.rows, self.columns = dtype, rows, columns
        super().__init__(name=f"Tile({dtype}, {rows}, {columns})")

    @property
    def vector(self) -> Any:
        """LLVM type of one vector."""
        scalar = ir.FloatType() if self.dtype == types.float32 else ir.DoubleType()
        return ir.VectorType(scalar, VECTOR_BYTES * 8 // self.dtype.bitwidth)

    def places(self) -> list[tuple[int, int]]:
        """Row and column of each vector, row-major."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]


class _Model(models.PrimitiveModel):  # type: ignore[misc, unused-ignore]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(fe_type.vector, fe_type.rows * fe_type.columns))


register_model(Tile)(_Model)


# --- Emitting LLVM code ---


def packed(builder: Any, vectors: Sequence[Any]) -> Any:
    """The tile that consists of the vectors, row-major."""
    tile = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for number, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, number)
    return tile


def lane_numbers(numbers: Sequence[int]) -> Any:
    """Constant vector of lane numbers, the mask of a shuffle."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), list(numbers))


def spread(builder: Any, scalar: Any, vector: Any) -> Any:
    """A vector of type ``vector`` with the scalar in all lanes."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, lane_numbers([0] * vector.count))


def constant(like: Any, number: float) -> Any:
    """A vector of the type of ``like`` with the number in all lanes."""
    return ir.Constant(like.type, [number] * like.type.count)


def llvm(name: str, builder: Any, *vectors: Any) -> Any:
    """Call the LLVM function of this name elementwise."""
    type_ = vectors[0].type
    bits = 32 if type_.element == ir.FloatType() else 64
    function_type = ir.FunctionType(type_, [type_] * len(vectors))
    name = f"llvm.{name}.v{type_.count}f{bits}"
    return builder.call(declared(builder, function_type, name), vectors)


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Elementwise maximum of two vectors; the element of a where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


# --- Arithmetic ---


def elementwise(emit_vector: Callable[..., Any], arity: int) -> Any:
    """Make an elementwise function of tiles, which broadcast, and of numbers, which are converted to the tiles' dtype.

    Args:
        emit_vector: takes a builder and one vector of each argument; emits the code and returns the resulting vector.
        arity: number of arguments, one to three.
    """

    def operation(_: Any, *operands: Any) -> Any:
        tiles = [operand for operand in operands if isinstance(operand, Tile)]
        result = Tile(tiles[0].dtype, max(t.rows for t in tiles), max(t.columns for t in tiles))

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def vectors(type_: Any, value: Any) -> list[Any]:
                if not isinstance(type_, Tile):
                    return [spread(builder, value, result.vector)] * len(result.places())
                strides = type_.columns * (type_.rows > 1), int(type_.columns > 1)
                return [builder.extract_value(value, r * strides[0] + c * strides[1]) for r, c in result.places()]

            columns = [vectors(*pair) for pair in zip(signature.args, arguments, strict=True)]
            return packed(builder, [emit_vector(builder, *group) for group in zip(*columns, strict=True)])

        converted = [operand if isinstance(operand, Tile) else result.dtype for operand in operands]
        return result(*converted), emit

    # Numba takes the number of arguments from the function's signature.
    fixed = {1: lambda _, a: operation(_, a), 2: lambda _, a, b: operation(_, a, b)}
    return intrinsic(fixed.get(arity, lambda _, a, b, c: operation(_, a, b, c)))


def _arithmetic(symbol: Callable[..., Any], method: str) -> None:
    compute = elementwise(lambda builder, a, b: getattr(builder, method)(a, b), 2)

    def implementation(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return compute(a, b)

        return apply if isinstance(a, Tile) or isinstance(b, Tile) else None

    overload(symbol, jit_options={"forceinline": True})(implementation)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")
fma = elementwise(functools.partial(llvm, "fmuladd"), 3)  # one instruction on machines that have it
maximum = elementwise(larger, 2)


# --- Vectors of a tile ---


@tile_intrinsic
def rows_of(_: Any, tile: Any, first: Any, count: Any) -> Any:
    """``count`` rows of a tile from row ``first`` on; both are literals."""
    part = Tile(tile.dtype, count.literal_value, tile.columns)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = first.literal_value * tile.columns
        return packed(builder, [builder.extract_value(arguments[0], start + k) for k in range(len(part.places()))])

    return part(tile, first, count), emit


@tile_intrinsic
def width(_: Any, tile: Any) -> Any:
    """Number of elements in a row of a tile."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(tile.columns * tile.vector.count)

    return types.int64(tile), emit


@tile_intrinsic
def summed_products(_: Any, a: Any, b: Any, sums: Any) -> Any:
    """Multiply two columns, sum the products over the rows, and add them to one vector of sums."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = builder.extract_value(arguments[2], 0)
        for row in range(a.rows):
            total = llvm("fmuladd", builder, *(builder.extract_value(column, row) for column in arguments[:2]), total)
        return packed(builder, [total])

    return sums(a, b, sums), emit


@tile_intrinsic
def swapped_pairs(_: Any, tile: Any) -> Any:
    """Interleave pairs of lanes of the two vectors a, b in each row: a0 a1 b0 b1 a2 a3 b2 b3 …"""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = tile.vector.count
        order = [lane + k + side for lane in range(0, lanes, 2) for side in (0, lanes) for k in (0, 1)]
        vectors = []
        for row in range(tile.rows):
            a, b = (builder.extract_value(arguments[0], 2 * row + side) for side in (0, 1))
            vectors += [builder.shuffle_vector(a, b, lane_numbers(half)) for half in (order[:lanes], order[lanes:])]
        return packed(builder, vectors)

    return tile(tile), emit

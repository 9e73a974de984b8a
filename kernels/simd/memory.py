"""Load and store tiles of `kernels.simd.tiles`, in functions compiled by numba.

Arrays are C-contiguous. An index has a non-negative number for each axis, and is not checked. Steps are in elements.
Vectors may begin at any element. A convolution takes only three quarters of the time if the array begins at a multiple
of `VECTOR_BYTES` (torch's arrays do, numpy's may not), and vectors begin at multiples of their length.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import types

from kernels.internals.numba import copy_elements, element_address, nothing, on_stack
from kernels.simd.tiles import VECTOR_BYTES, Tile, inlined, lane_numbers, packed, rows_of, spread, tile_intrinsic

__all__ = [
    "index_type",
    "lanes",
    "load",
    "load_row",
    "load_rows",
    "load_tile",
    "load_window",
    "splat",
    "splats",
    "store",
    "store_part",
    "store_tile",
    "zeros",
]


def index_type(index: Any) -> Any:
    """The type to which numba converts an index, whatever its integer types."""
    return types.UniTuple(types.intp, len(index))


def _addresses(builder: Any, first: Any, tile: Tile, row_step: Any, column_step: Any) -> list[Any]:
    """Addresses of a tile's vectors."""
    places = []
    for row, column in tile.places():
        steps = [builder.mul(step, step.type(k)) for step, k in ((row_step, row), (column_step, column))]
        places.append(builder.bitcast(builder.gep(first, [builder.add(*steps)]), tile.vector.as_pointer()))
    return places


def _loaded(builder: Any, places: Sequence[Any], array: Any) -> list[Any]:
    return [builder.load(place, align=array.dtype.bitwidth // 8) for place in places]


@tile_intrinsic
def lanes(_: Any, array: Any) -> Any:
    """Number of elements in a vector of an array's dtype."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(VECTOR_BYTES * 8 // array.dtype.bitwidth)

    return types.int64(array), emit


@tile_intrinsic
def zeros(_: Any, like: Any, rows: Any, columns: Any) -> Any:
    """A tile of zeros of an array's dtype; rows and columns are literals, as in `load_tile`."""
    tile = Tile(like.dtype, rows.literal_value, columns.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.ArrayType(tile.vector, len(tile.places())), None)

    return tile(like, rows, columns), emit


@tile_intrinsic
def load_tile(_: Any, array: Any, index: Any, rows: Any, columns: Any, row_step: Any, column_step: Any) -> Any:
    """Load the tile whose first vector begins at ``array[index]``; each row and column begins one step further."""
    tile = Tile(array.dtype, rows.literal_value, columns.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        return packed(builder, _loaded(builder, _addresses(builder, first, tile, *arguments[4:]), array))

    return tile(array, index_type(index), rows, columns, types.intp, types.intp), emit


@tile_intrinsic
def load_rows(_: Any, array: Any, index: Any, like: Any, step: Any) -> Any:
    """Load a tile of the size of another; the vectors of a row are consecutive, and rows are a step apart."""
    tile = Tile(array.dtype, like.rows, like.columns)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        places = _addresses(builder, first, tile, arguments[3], ir.IntType(64)(tile.vector.count))
        return packed(builder, _loaded(builder, places, array))

    return tile(array, index_type(index), like, types.intp), emit


@tile_intrinsic
def load_window(_: Any, array: Any, index: Any, like: Any) -> Any:
    """Load a column with the rows of another tile; each vector begins one element after the previous one."""
    tile = Tile(array.dtype, like.rows, 1)
    count = tile.vector.count

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, i64 = element_address(context, builder, array, arguments[0], arguments[1]), ir.IntType(64)
        if VECTOR_BYTES < 64:
            return packed(builder, _loaded(builder, _addresses(builder, first, tile, i64(1), i64(0)), array))
        # Unaligned vectors of 64 bytes cross cache lines. Two vectors and shifts take 3/4 of the time.
        two = Tile(array.dtype, 2, 1)
        vectors = _loaded(builder, _addresses(builder, first, two, i64(count), i64(0)), array)
        shifted = [lane_numbers(range(shift, shift + count)) for shift in range(tile.rows)]
        return packed(builder, [builder.shuffle_vector(*vectors, numbers) for numbers in shifted])

    return tile(array, index_type(index), like), emit


@tile_intrinsic
def splats(_: Any, array: Any, index: Any, like: Any) -> Any:
    """Load a column with the rows of another tile; each vector has one element in all lanes: ``array[index]``, …"""
    tile = Tile(array.dtype, like.rows, 1)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        scalars = [builder.load(builder.gep(first, [ir.IntType(64)(row)])) for row in range(tile.rows)]
        return packed(builder, [spread(builder, scalar, tile.vector) for scalar in scalars])

    return tile(array, index_type(index), like), emit


@tile_intrinsic
def store_tile(_: Any, array: Any, index: Any, tile: Any, row_step: Any, column_step: Any) -> Any:
    """Store a tile; the inverse of `load_tile`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        for number, place in enumerate(_addresses(builder, first, tile, *arguments[3:])):
            builder.store(builder.extract_value(arguments[2], number), place, align=array.dtype.bitwidth // 8)
        return nothing(context)

    return types.void(array, index_type(index), tile, types.intp, types.intp), emit


@tile_intrinsic
def store_part(_: Any, array: Any, index: Any, tile: Any, count: Any) -> Any:
    """Store the first ``count`` elements of a tile consecutively."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = on_stack(builder, arguments[2])
        to = element_address(context, builder, array, arguments[0], arguments[1])
        copy_elements(builder, to, whole, arguments[3], array.dtype.bitwidth // 8)
        return nothing(context)

    return types.void(array, index_type(index), tile, types.intp), emit


@inlined
def load(array: Any, index: Any) -> Any:
    """Load one vector."""
    return load_tile(array, index, 1, 1, 0, 0)


@inlined
def load_row(array: Any, index: Any, like: Any) -> Any:
    """Load one row of consecutive vectors, as many as a row of another tile has."""
    return load_rows(array, index, rows_of(like, 0, 1), 0)


@inlined
def splat(array: Any, index: Any) -> Any:
    """Load one element into all lanes of a vector."""
    return splats(array, index, zeros(array, 1, 1))


@inlined
def store(array: Any, index: Any, vector: Any) -> None:
    """Store one vector."""
    store_tile(array, index, vector, 0, 0)

"""Tiles of `kernels.simd.tiles` from arrays and back, for functions that numba compiles.

Arrays are C-contiguous; an index has a number for each axis, not negative, and is not checked; steps are in elements.
Vectors may begin anywhere, but where the array begins at a multiple of `VECTOR_BYTES`, as torch's do and numpy's may
not, and they begin at whole vectors, a convolution takes three quarters of the time.
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
    """To which numba converts an index, whatever integers it is made of."""
    return types.UniTuple(types.intp, len(index))


def _addresses(builder: Any, first: Any, tile: Tile, row_step: Any, column_step: Any) -> list[Any]:
    """Of a tile's vectors."""
    places = []
    for row, column in tile.places():
        steps = [builder.mul(step, step.type(k)) for step, k in ((row_step, row), (column_step, column))]
        places.append(builder.bitcast(builder.gep(first, [builder.add(*steps)]), tile.vector.as_pointer()))
    return places


def _loaded(builder: Any, places: Sequence[Any], array: Any) -> list[Any]:
    return [builder.load(place, align=array.dtype.bitwidth // 8) for place in places]


@tile_intrinsic
def lanes(_: Any, array: Any) -> Any:
    """Elements in a vector, of an array's dtype."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(VECTOR_BYTES * 8 // array.dtype.bitwidth)

    return types.int64(array), emit


@tile_intrinsic
def zeros(_: Any, like: Any, rows: Any, columns: Any) -> Any:
    """A tile of zeros, of an array's dtype; rows and columns written out, as in `load_tile`."""
    tile = Tile(like.dtype, rows.literal_value, columns.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.ArrayType(tile.vector, len(tile.places())), None)

    return tile(like, rows, columns), emit


@tile_intrinsic
def load_tile(_: Any, array: Any, index: Any, rows: Any, columns: Any, row_step: Any, column_step: Any) -> Any:
    """The tile whose first vector begins at ``array[index]``, the others a step further with each row and column."""
    tile = Tile(array.dtype, rows.literal_value, columns.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        return packed(builder, _loaded(builder, _addresses(builder, first, tile, *arguments[4:]), array))

    return tile(array, index_type(index), rows, columns, types.intp, types.intp), emit


@tile_intrinsic
def load_rows(_: Any, array: Any, index: Any, like: Any, step: Any) -> Any:
    """A tile as large as another, with the vectors of a row consecutive and rows a step apart."""
    tile = Tile(array.dtype, like.rows, like.columns)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        places = _addresses(builder, first, tile, arguments[3], ir.IntType(64)(tile.vector.count))
        return packed(builder, _loaded(builder, places, array))

    return tile(array, index_type(index), like, types.intp), emit


@tile_intrinsic
def load_window(_: Any, array: Any, index: Any, like: Any) -> Any:
    """A column as high as another, each vector beginning one element after the one before."""
    tile = Tile(array.dtype, like.rows, 1)
    count = tile.vector.count

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, i64 = element_address(context, builder, array, arguments[0], arguments[1]), ir.IntType(64)
        if VECTOR_BYTES < 64:
            return packed(builder, _loaded(builder, _addresses(builder, first, tile, i64(1), i64(0)), array))
        # Vectors of 64 bytes that begin anywhere cross cache lines. Two that do not, and shifts, take 3/4 of the time.
        two = Tile(array.dtype, 2, 1)
        vectors = _loaded(builder, _addresses(builder, first, two, i64(count), i64(0)), array)
        shifted = [lane_numbers(range(shift, shift + count)) for shift in range(tile.rows)]
        return packed(builder, [builder.shuffle_vector(*vectors, numbers) for numbers in shifted])

    return tile(array, index_type(index), like), emit


@tile_intrinsic
def splats(_: Any, array: Any, index: Any, like: Any) -> Any:
    """A column as high as another, of vectors with one element in all lanes: ``array[index]``, the next, …"""
    tile = Tile(array.dtype, like.rows, 1)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        scalars = [builder.load(builder.gep(first, [ir.IntType(64)(row)])) for row in range(tile.rows)]
        return packed(builder, [spread(builder, scalar, tile.vector) for scalar in scalars])

    return tile(array, index_type(index), like), emit


@tile_intrinsic
def store_tile(_: Any, array: Any, index: Any, tile: Any, row_step: Any, column_step: Any) -> Any:
    """The reverse of `load_tile`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = element_address(context, builder, array, arguments[0], arguments[1])
        for number, place in enumerate(_addresses(builder, first, tile, *arguments[3:])):
            builder.store(builder.extract_value(arguments[2], number), place, align=array.dtype.bitwidth // 8)
        return nothing(context)

    return types.void(array, index_type(index), tile, types.intp, types.intp), emit


@tile_intrinsic
def store_part(_: Any, array: Any, index: Any, tile: Any, count: Any) -> Any:
    """The first elements of a tile, to consecutive places."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = on_stack(builder, arguments[2])
        to = element_address(context, builder, array, arguments[0], arguments[1])
        copy_elements(builder, to, whole, arguments[3], array.dtype.bitwidth // 8)
        return nothing(context)

    return types.void(array, index_type(index), tile, types.intp), emit


@inlined
def load(array: Any, index: Any) -> Any:
    """One vector."""
    return load_tile(array, index, 1, 1, 0, 0)


@inlined
def load_row(array: Any, index: Any, like: Any) -> Any:
    """One row of consecutive vectors, as many as a row of another tile has."""
    return load_rows(array, index, rows_of(like, 0, 1), 0)


@inlined
def splat(array: Any, index: Any) -> Any:
    """One vector with one element in all lanes."""
    return splats(array, index, zeros(array, 1, 1))


@inlined
def store(array: Any, index: Any, vector: Any) -> None:
    """One vector."""
    store_tile(array, index, vector, 0, 0)

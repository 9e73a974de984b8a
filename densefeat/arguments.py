"""Checks of the reader's arguments (row numbers, boxes, points) before anything is read."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["box_of", "is_text", "points_of", "row_numbers", "vectors_of", "whole_number"]

_SHOWN = 5


def whole_number(value: Any, what: str) -> int:
    """Convert a Python, NumPy or torch integer to ``int``. Fractions and booleans are refused, never rounded.

    Raises:
        TypeError: ``value`` is not an integer.
    """
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        if not is_bool:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what} must be an integer: got {value!r} ({type(value).__name__})")


def is_text(value: str) -> bool:
    """Whether a string is text: not with bytes that are none, as Python has them in the names of files."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_numbers(texts: Iterable[str], rows: int) -> list[int]:
    """Row numbers 0 … rows − 1 that a command line names, in its order.

    Args:
        texts: each a number, negative to count from the end, or a range ``a:b`` as of Python.
        rows: of the store.

    Raises:
        ValueError: a text is something else, there is no such row, or a range is empty.
    """
    numbers: list[int] = []
    for text in texts:
        start, colon, end = text.partition(":")
        try:
            if colon:
                found: Sequence[int] = range(rows)[slice(int(start) if start else None, int(end) if end else None)]
            else:
                found = [range(rows)[int(text)]]
        except ValueError:
            raise ValueError(
                f"--rows takes numbers and ranges such as 0:100: got {text!r}; --keys takes keys"
            ) from None
        except IndexError:
            raise ValueError(f"row {text} of a store with {rows} rows") from None
        if not found:
            raise ValueError(f"--rows {text} is empty: the store has rows 0 … {rows - 1}")
        numbers += found
    return numbers


def box_of(box: Iterable[int], height: int, width: int) -> tuple[slice, slice]:
    """Convert the box (y0, x0, y1, x1), y1 and x1 exclusive, to slices of rows and columns.

    Raises:
        TypeError: the box does not consist of integers.
        ValueError: it does not have four integers, is empty, or lies outside ``height`` × ``width``.
    """
    if not isinstance(box, Iterable):
        raise TypeError(f"box must be four integers (y0, x0, y1, x1): got {box!r}")
    values = [whole_number(value, "each side of box (y0, x0, y1, x1)") for value in box]
    if len(values) != 4:
        raise ValueError(f"box must be four integers (y0, x0, y1, x1): got {len(values)}")
    y0, x0, y1, x1 = values
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise ValueError(
            f"box (y0, x0, y1, x1) must lie within {height}×{width} (height × width) and not be empty: got {box!r}"
        )
    return slice(y0, y1), slice(x0, x1)


def points_of(points_xy: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Convert points to float64 [points, 2]; an empty list becomes [0, 2].

    Raises:
        TypeError: the points are not real numbers.
        ValueError: their shape is not [points, 2], or they are not finite.
    """
    points = np.asarray(points_xy)
    if points.shape == (0,):
        return np.empty((0, 2))
    if points.dtype.kind not in "iuf":
        raise TypeError(f"points_xy must be real numbers: got an array of {points.dtype}")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points_xy must be [points, 2], (x, y) each: got shape {points.shape}")
    points = points.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        shown = ", ".join(f"points_xy[{i}] = ({points[i, 0]}, {points[i, 1]})" for i in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ValueError(f"points_xy must be finite: got {shown}{more}")
    return points


def vectors_of(vectors: npt.ArrayLike, channels: int, names: Sequence[str] | None = None) -> npt.NDArray[np.float64]:
    """Convert vectors of backbone channels, [C] or [Q, C], to float64 [Q, C].

    Args:
        vectors: one, or several.
        channels: C.
        names: of the vectors, for errors; None: their numbers.

    Raises:
        TypeError: the vectors are not real numbers.
        ValueError: their shape is another, or one is not finite or all 0, so that it has no direction.
    """
    array = np.asarray(vectors)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"vectors must be real numbers: got an array of {array.dtype}")
    if array.ndim not in (1, 2) or array.shape[-1] != channels or channels == 0:
        raise ValueError(f"vectors must be [C={channels}] or [Q, C={channels}]: got shape {list(array.shape)}")
    array = array.astype(np.float64).reshape(-1, channels)
    bad = np.flatnonzero(~(np.isfinite(array).all(axis=1) & array.any(axis=1)))
    if len(bad):
        shown = ", ".join(repr(names[i]) if names else str(i) for i in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ValueError(f"vectors must be finite and not 0: got others for {shown}{more}")
    return array

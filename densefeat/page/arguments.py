"""Checks of what requests ask for; all errors are answered with 400 or 404 and their reason."""

import math

import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException
from starlette.requests import Request

from densefeat.similarity import NamedVectors

__all__ = ["integer", "row_number", "selection", "text_vector"]


def integer(request: Request, name: str, default: int | None, low: int, high: int) -> int | None:
    """A query parameter between ``low`` and ``high``, inclusive.

    Raises:
        HTTPException: 400, it is no integer or out of range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise HTTPException(400, f"{name} must be an integer: got {text!r}") from None
    if not low <= value <= high:
        raise HTTPException(400, f"{name} must be {low} … {high}: got {value}")
    return value


def row_number(text: str, rows: int) -> int:
    """A row of the store.

    Raises:
        HTTPException: 404, there is no such row.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < rows):
        raise HTTPException(404, f"there is no row {text!r}: the store has rows 0 … {rows - 1}")
    return int(text)


def selection(request: Request, height: int, width: int) -> tuple[int, int, int, int]:
    """The box (y0, x0, y1, x1) of feature pixels that ``point=x,y`` or ``box=x0,y0,x1,y1`` select.

    Both are in feature pixels, corners at integers; what lies outside is moved to the border.

    Raises:
        HTTPException: 400, neither is given, or it does not consist of finite numbers.
    """
    box = _numbers(request, "box", 4)
    x0, y0, x1, y1 = box or 2 * (_numbers(request, "point", 2) or [])
    left, right = (min(max(math.floor(x), 0), width - 1) for x in sorted((x0, x1)))
    top, bottom = (min(max(math.floor(y), 0), height - 1) for y in sorted((y0, y1)))
    if box:  # the end of a box is exclusive
        right, bottom = max(left, _last(max(x0, x1), width)), max(top, _last(max(y0, y1), height))
    return top, left, bottom + 1, right + 1


def text_vector(texts: NamedVectors | None, name: str, channels: int) -> npt.NDArray[np.float64]:
    """The vector of a text, [1, C].

    Raises:
        HTTPException: 400, there is no such text, or another store is here now, whose features have other channels.
    """
    if texts is None or name not in texts.names:
        there = "no texts" if texts is None else f"{len(texts.names)} others"
        raise HTTPException(400, f"there is no text {name!r}: the page has {there} (--texts)")
    if texts.vectors.shape[1] != channels:
        raise HTTPException(400, f"the texts have {texts.vectors.shape[1]} channels, the features {channels}")
    row = texts.names.index(name)
    return texts.vectors[row : row + 1]


def _last(end: float, size: int) -> int:
    return min(math.ceil(end), size) - 1


def _numbers(request: Request, name: str, count: int) -> list[float]:
    text = request.query_params.get(name)
    if text is None:
        if name == "point":
            raise HTTPException(400, "point=x,y or box=x0,y0,x1,y1 is missing")
        return []
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise HTTPException(400, f"{name} must be {count} numbers with commas between: got {text!r}")
    return values

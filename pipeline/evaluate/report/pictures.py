"""Photographs, classes, depths and points as pictures of one image's grid."""

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from densefeat.page.photographs import PhotographMissing, Photographs
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.task import Panel

__all__ = [
    "class_colour",
    "class_colours",
    "of_cells",
    "overlaid",
    "photograph",
    "ramp_colours",
    "with_boxes",
    "with_points",
]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_GOLDEN = 0.618034  # hues of successive classes, as far apart as they can be
_LEFT_OUT = 40  # grey of pixels without a class
_CELL_PX = 8  # side of a cell in a picture
_GREY = 200  # of a photograph that cannot be read


def photograph(comparison: Comparison, key: str, grid: Grid) -> Panel:
    """The photograph of an image on its grid, from where the index of a store says it lies; grey if it is not there."""
    side = comparison.sides[grid.finest]
    store = side.store
    row = store.index.slice(store.row_of(key), 1).to_pylist()[0]
    shape = store.shape[1:]
    y0, x0, y1, x1 = grid.box
    try:
        photographs = Photographs(store.attributes["configuration"]["source"])
        picture = photographs.read(row, (shape[0], shape[1]), max(shape)).convert("RGB")
    except PhotographMissing as error:
        return Panel(f"the photograph {error}", np.full((y1 - y0, x1 - x0, 3), _GREY, np.uint8))
    return Panel(key, np.asarray(picture)[y0:y1, x0:x1])


def class_colours(classes: Tensor) -> Pixels:
    """Classes [m, n] as colours; −1 is dark grey."""
    numbers = classes.numpy()
    count = int(numbers.max(initial=-1)) + 1
    table = np.array([*map(class_colour, range(count)), (_LEFT_OUT,) * 3], np.uint8)
    return np.asarray(table[numbers])


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, red, green and blue."""
    return _colour(number, (0.95, 0.7, 0.45)[number // 7 % 3])


def ramp_colours(values: Floats, low: float, high: float) -> Pixels:
    """Values [m, n] from blue (low) over green to yellow (high); NaN is dark grey."""
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)  # viridis
    places = np.linspace(low, high, len(stops))
    colours = np.stack([np.interp(values, places, stops[:, channel]) for channel in range(3)], -1)
    return np.where(np.isnan(values)[..., None], _LEFT_OUT, colours).round().astype(np.uint8)


def of_cells(caption: str, values: Tensor, high: float) -> Panel:
    """A value of each cell of the backbone's grid [h, w] as colours, 0 … ``high``, enlarged."""
    large = values.repeat_interleave(_CELL_PX, 0).repeat_interleave(_CELL_PX, 1).double().numpy()
    return Panel(caption, ramp_colours(large, 0, high))


def with_points(panel: Panel, points: Floats, labels: Floats | None = None) -> Panel:
    """A picture with points [n, 2] (x, y) in its pixels; with labels, rings around them, and lines to the points."""
    picture = Image.fromarray(panel.pixels)
    draw = ImageDraw.Draw(picture)
    radius = max(2.0, max(picture.size) / 60)
    for number, (x, y) in enumerate(points.tolist()):
        colour = _colour(number, 1.0)
        if labels is not None:
            left, top = labels[number].tolist()
            draw.ellipse((left - radius, top - radius, left + radius, top + radius), outline=colour, width=2)
            draw.line((left, top, x, y), fill=colour)
        draw.ellipse((x - radius / 2, y - radius / 2, x + radius / 2, y + radius / 2), fill=colour)
    return Panel(panel.caption, np.asarray(picture))


def with_boxes(panel: Panel, boxes: Sequence[tuple[float, float, float, float]]) -> Pixels:
    """A picture with boxes (y0, x0, y1, x1) in its pixels."""
    picture = Image.fromarray(panel.pixels)
    draw = ImageDraw.Draw(picture)
    for number, (y0, x0, y1, x1) in enumerate(boxes):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_colour(number, 1.0), width=3)
    return np.asarray(picture)


def overlaid(panel: Panel, classes: Tensor) -> Pixels:
    """A picture with classes [m, n] as colours over it; 0 is not coloured."""
    colours = class_colours(classes - 1)
    mixed = (panel.pixels.astype(np.float64) * 0.45 + colours * 0.55).round().astype(np.uint8)
    return np.where((classes > 0).numpy()[..., None], mixed, panel.pixels)


def _colour(number: int, light: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, light)
    return round(255 * red), round(255 * green), round(255 * blue)

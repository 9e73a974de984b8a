"""Photographs, classes, depths and points as pictures of one image's grid."""

import colorsys

import numpy as np
import numpy.typing as npt
from torch import Tensor

from densefeat.page.photographs import PhotographMissing, Photographs
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.task import Panel

__all__ = ["class_colours", "photograph", "ramp_colours"]

Pixels = npt.NDArray[np.uint8]

_GOLDEN = 0.618034  # hues of successive classes, as far apart as they can be
_LEFT_OUT = 40  # grey of pixels without a class
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
    table = np.full((count + 1, 3), _LEFT_OUT, np.uint8)
    for number in range(count):
        light = (0.95, 0.7, 0.45)[number // 7 % 3]
        colour = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, light)
        table[number] = [round(255 * channel) for channel in colour]
    return np.asarray(table[numbers])


def ramp_colours(values: npt.NDArray[np.float64], low: float, high: float) -> Pixels:
    """Values [m, n] from blue (low) over green to yellow (high); NaN is dark grey."""
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)  # viridis
    places = np.linspace(low, high, len(stops))
    colours = np.stack([np.interp(values, places, stops[:, channel]) for channel in range(3)], -1)
    return np.where(np.isnan(values)[..., None], _LEFT_OUT, colours).round().astype(np.uint8)

"""The points of an image on which features of several sides and labels are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat.align import RowGeometry

__all__ = ["Grid"]

_SAME = 1e-3  # of a feature pixel: the centre of one, up to rounding of the recorded map


@dataclass(frozen=True, eq=False)
class Grid:
    """Points of an image: feature pixels of the finest side, where all sides see the image.

    If all sides have one geometry, as stores of the same size and fit have, the points are the centres of their pixels,
    and nothing is interpolated.

    Attributes:
        image_size: (height, width) of the original image in pixels, as displayed.
        ys: [m] float64, ascending, in pixels of the original; corners at integers.
        xs: [n] float64.
        finest: number of the side whose pixels they are.
        box: (y0, x0, y1, x1) in feature pixels of this side.
    """

    image_size: tuple[int, int]
    ys: npt.NDArray[np.float64]
    xs: npt.NDArray[np.float64]
    finest: int
    box: tuple[int, int, int, int]

    @classmethod
    def common(cls, geometries: Sequence[RowGeometry]) -> "Grid":
        """The grid of one image.

        Args:
            geometries: of the image's row on every side.

        Raises:
            ValueError: the sides have images of different sizes, or no point in common.
        """
        sizes = list(dict.fromkeys(geometry.image_size for geometry in geometries))
        if len(sizes) > 1:
            shown = " and ".join(f"{height}×{width}" for height, width in sizes)
            raise ValueError(f"its original has {shown} pixels (height × width): expected one image on all sides")
        finest = max(range(len(geometries)), key=lambda i: geometries[i].scale[0] * geometries[i].scale[1])
        axes = [_axis(geometries, finest, axis) for axis in range(2)]
        if any(len(points) == 0 for points, _ in axes):
            raise ValueError("no part of it is visible on all sides")
        (ys, y0), (xs, x0) = axes
        return cls(sizes[0], ys, xs, finest, (y0, x0, y0 + len(ys), x0 + len(xs)))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.ys), len(self.xs)

    @property
    def extent(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) of the area that the points cover, in whole pixels of the original."""
        (top, bottom), (left, right) = (
            (round(float(points[0]) - _step(points) / 2), round(float(points[-1]) + _step(points) / 2))
            for points in (self.ys, self.xs)
        )
        height, width = self.image_size
        return (max(0, top), min(height, bottom)), (max(0, left), min(width, right))

    def nearest(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Labels at the points: of [height, width] of the original, those of the pixels that the points lie in, [m, n].

        Raises:
            ValueError: the array does not have the size of the original.
        """
        if array.shape != self.image_size:
            got = "×".join(map(str, array.shape))
            expected = "×".join(map(str, self.image_size))
            raise ValueError(f"has {got} pixels, expected {expected} (height × width), as the image is displayed")
        return array[np.ix_(self.ys.astype(np.int64), self.xs.astype(np.int64))]

    def features(self, features: Tensor, geometry: RowGeometry) -> Tensor:
        """Features of a side, bilinear between its pixels' centres: [k, H, W] -> [k, m, n]."""
        values = features
        for axis, points in ((0, self.ys), (1, self.xs)):
            low, high = geometry.valid_box[axis], geometry.valid_box[axis + 2]
            places = np.clip(points * geometry.scale[axis] + geometry.shift[axis] - 0.5, low, high - 1)
            values = _interpolated(values, places, axis + 1)
        return values

    def points(self, points_xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Points (x, y) [n, 2] of the original in pixels of the grid, corners at integers."""
        first = np.array([self.xs[0], self.ys[0]])
        step = np.array([_step(self.xs), _step(self.ys)])
        return np.asarray((points_xy - first) / step + 0.5)


def _axis(geometries: Sequence[RowGeometry], finest: int, axis: int) -> tuple[npt.NDArray[np.float64], int]:
    """Points of an axis, and the number of the first one's pixel."""
    own = geometries[finest]
    pixels = np.arange(own.valid_box[axis], own.valid_box[axis + 2], dtype=np.float64)
    points: npt.NDArray[np.float64] = (pixels + 0.5 - own.shift[axis]) / own.scale[axis]
    seen = (points >= 0) & (points < own.image_size[axis])
    for other in geometries:
        places = points * other.scale[axis] + other.shift[axis]
        seen &= (places >= other.valid_box[axis]) & (places <= other.valid_box[axis + 2])
    return points[seen], int(pixels[seen][0]) if seen.any() else 0


def _interpolated(values: Tensor, places: npt.NDArray[np.float64], dim: int) -> Tensor:
    rounded = np.rint(places)
    if np.abs(places - rounded).max() < _SAME:
        first = int(rounded[0])
        if (rounded == first + np.arange(len(rounded))).all():
            return values.narrow(dim, first, len(rounded))
    left = np.minimum(np.floor(places).astype(np.int64), values.shape[dim] - 2).clip(0)
    right = np.minimum(left + 1, values.shape[dim] - 1)
    shape = [1] * values.dim()
    shape[dim] = -1
    weight = torch.from_numpy((places - left).astype(np.float32)).view(shape)
    before, after = (values.index_select(dim, torch.from_numpy(side)) for side in (left, right))
    return before.lerp(after, weight)


def _step(points: npt.NDArray[np.float64]) -> float:
    return float(points[-1] - points[0]) / (len(points) - 1) if len(points) > 1 else 1.0

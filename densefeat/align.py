"""Masks and images on the grid of the features, and back; and the masks of a dataset by key."""

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.arguments import whole_number
from densefeat.errors import missing_package
from densefeat.storage.keyed_files import KeyedFiles
from densefeat.storage.objects import Objects

__all__ = ["RECORDED", "MaskFolder", "RowGeometry", "align", "decode_png", "sample_bilinearly"]

Array = npt.NDArray[Any]
# The columns of the index that a row's geometry is made of.
RECORDED = ("height", "width", "affine", "valid_box")
_TO = ("features", "image")
_INTERPOLATIONS = ("nearest", "linear")
_CHANNELS = ("first", "last")


@dataclass(frozen=True)
class RowGeometry:
    """Where a row's features lie in its original image, as recorded in the index.

    Coordinates have corners at integers: pixel i covers [i, i + 1).

    Attributes:
        image_size: (height, width) of the original in pixels, as displayed (after EXIF rotation).
        feature_size: (H, W) of the features.
        scale: (y, x) feature pixels per pixel of the original.
        shift: (y, x) of the original's top left corner, in feature pixels.
        valid_box: (y0, x0, y1, x1) in feature pixels, y1 and x1 exclusive: outside is padding.
    """

    image_size: tuple[int, int]
    feature_size: tuple[int, int]
    scale: tuple[float, float]
    shift: tuple[float, float]
    valid_box: tuple[int, int, int, int]

    @classmethod
    def from_record(cls, record: dict[str, Any], feature_size: tuple[int, int]) -> "RowGeometry":
        """Build from the columns ``RECORDED`` of a row of the index.

        Raises:
            ValueError: the record is damaged.
        """
        affine, box = record["affine"] or [], record["valid_box"] or []
        if len(affine) != 6 or not np.isfinite(np.array(affine, dtype=float)).all():
            raise ValueError(f"it has the affine map {affine or None}")
        scale_x, xy, shift_x, yx, scale_y, shift_y = affine
        if xy or yx or min(scale_x, scale_y) <= 0:
            raise ValueError(f"its affine map {affine} is not a positive scale and a shift of each axis")
        image_size = record["height"], record["width"]
        if None in image_size or min(image_size) < 1:
            raise ValueError(f"it has the original size {image_size}")
        if len(box) != 4 or not all(0 <= box[i] < box[i + 2] <= feature_size[i] for i in range(2)):
            raise ValueError(f"it has the valid box {box}, expected one within {feature_size}")
        return cls(image_size, feature_size, (scale_y, scale_x), (shift_y, shift_x), tuple(box))


@dataclass(frozen=True)
class _Axis:
    """One axis of a resampling.

    Attributes:
        size: of the target, in pixels.
        valid: the pixels of the target that lie on the source.
        centres: [valid] coordinates of their centres in the source.
        width: of a target pixel, in pixels of the source.
        low: first usable pixel of the source.
        high: last usable pixel of the source, plus one.
    """

    size: int
    valid: slice
    centres: npt.NDArray[np.floating[Any]]
    width: float
    low: int
    high: int


def align(
    array: npt.ArrayLike,
    geometry: RowGeometry,
    to: str = "features",
    *,
    interpolation: str | None = None,
    fill: float | None = None,
    channels: str | None = None,
) -> Array:
    """Resample a mask or image to the grid of the features, or from there to that of the original image.

    See ``FeatureStore.align``, which takes the geometry from the index.
    """
    source = np.asarray(array)
    if source.dtype.kind not in "biuf":
        raise TypeError(f"a mask or image must be real numbers or booleans: got an array of {source.dtype}")
    for name, value, allowed in (("to", to, _TO), ("interpolation", interpolation, (None, *_INTERPOLATIONS))):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}: got {value!r}")
    size = geometry.image_size if to == "features" else geometry.feature_size
    first = _first_axis(source.shape, size, channels, "the original image" if to == "features" else "the features")
    if interpolation is None:
        is_mask = source.dtype.kind == "b" or (source.dtype.kind in "iu" and source.ndim == 2)
        interpolation = "nearest" if is_mask else "linear"
    kind = source.dtype.kind if interpolation == "nearest" else "f"
    axes = [_axis(geometry, i, to) for i in range(2)]
    shape = list(source.shape)
    shape[first : first + 2] = axes[0].size, axes[1].size
    target: Array = np.full(shape, _fill(fill, kind), dtype={"b": np.bool_, "f": np.float32}.get(kind, np.int64))
    inside: list[slice] = [slice(None)] * source.ndim
    inside[first : first + 2] = axes[0].valid, axes[1].valid
    values = source
    for i, axis in enumerate(axes):
        values = _nearest(values, axis, first + i) if interpolation == "nearest" else _linear(values, axis, first + i)
    target[tuple(inside)] = values
    return target


def _first_axis(shape: tuple[int, ...], size: tuple[int, int], channels: str | None, grid: str) -> int:
    """The axis of y: 0, or 1 if the channels come first."""
    if channels not in (None, *_CHANNELS):
        raise ValueError(f'channels must be "first", "last" or None: got {channels!r}')
    fits = {"last": len(shape) in (2, 3) and shape[:2] == size, "first": len(shape) == 3 and shape[1:] == size}
    found = [name for name in _CHANNELS if fits[name] and channels in (None, name) and len(shape) == 3]
    if len(shape) == 2 and fits["last"]:
        return 0
    if not found:
        height, width = size
        raise ValueError(
            f"expected the size of {grid}, {height}×{width} (height × width, as displayed after EXIF rotation), with "
            f"channels first, last or none: got an array of shape {shape}"
        )
    if len(found) == 2:
        raise ValueError(f'channels may come first or last in the shape {shape}: pass channels="first" or "last"')
    return int(found == ["first"])


def _fill(fill: float | None, kind: str) -> float | int | bool:
    """The value of pixels without a source, for an array of this kind."""
    if kind == "b":
        return bool(fill)
    if kind == "f":
        return math.nan if fill is None else float(fill)
    return -1 if fill is None else whole_number(fill, "fill of a mask of integers")


def _axis(geometry: RowGeometry, i: int, to: str) -> _Axis:
    """The axis y (0) or x (1) of a resampling to the features or the image."""
    image, features = geometry.image_size[i], geometry.feature_size[i]
    scale, shift = geometry.scale[i], geometry.shift[i]
    low, high = geometry.valid_box[i], geometry.valid_box[i + 2]
    if to == "features":
        centres = (np.arange(low, high) + 0.5 - shift) / scale
        return _Axis(features, slice(low, high), centres, 1 / scale, 0, image)
    centres = (np.arange(image) + 0.5) * scale + shift
    # The border of the image may lie up to half a feature pixel beyond the valid box: those pixels take the nearest.
    (inside,) = np.nonzero((centres >= 0) & (centres < features))
    valid = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
    return _Axis(image, valid, centres[valid], scale, low, high)


def _nearest(values: Array, axis: _Axis, along: int) -> Array:
    pixels = np.clip(np.floor(axis.centres).astype(np.int64), axis.low, axis.high - 1)
    return np.asarray(np.take(values, pixels, axis=along))


def _linear(values: Array, axis: _Axis, along: int) -> Array:
    """Average over the area of each target pixel if it is wider than a source pixel, else interpolate linearly."""
    pixels, weights = _averaging(axis) if axis.width > 1 else _interpolating(axis)
    total: Any = 0
    for tap in range(pixels.shape[1]):
        shape = [1] * values.ndim
        shape[along] = -1
        total = total + np.take(values, pixels[:, tap], axis=along) * weights[:, tap].reshape(shape)
    return np.asarray(total)


def _interpolating(axis: _Axis) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Source pixels and their weights [valid, 2]; centres beyond the outermost pixel centres take its value."""
    position = np.clip(axis.centres - 0.5, axis.low, axis.high - 1)
    left = np.floor(position).astype(np.int64)
    weight = position - left
    right = np.where(weight > 0, left + 1, left)  # a weight of 0 does not hide NaN
    return np.stack([left, right], axis=1), np.stack([1 - weight, weight], axis=1).astype(np.float32)


def _averaging(axis: _Axis) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Source pixels and their weights [valid, taps]: the shares of each target pixel, clipped to the source."""
    centres = np.clip(axis.centres, axis.low, axis.high)
    start = np.maximum(centres - axis.width / 2, axis.low)
    end = np.minimum(centres + axis.width / 2, axis.high)
    first = np.minimum(np.floor(start).astype(np.int64), axis.high - 1)
    pixels = first[:, None] + np.arange(math.ceil(axis.width) + 1)
    overlap = np.minimum(end[:, None], pixels + 1) - np.maximum(start[:, None], pixels)
    overlap = np.maximum(overlap, 0)
    weights = overlap / overlap.sum(axis=1, keepdims=True)
    return np.where(overlap > 0, pixels, first[:, None]), weights.astype(np.float32)


def sample_bilinearly(
    codes: npt.NDArray[Any], points: npt.NDArray[np.float64], step: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Interpolate [k, H, W] at (x, y) points, corners at integers; dequantize only the pixels needed."""
    height, width = codes.shape[1:]
    x = np.clip(points[:, 0] - 0.5, 0, width - 1)
    y = np.clip(points[:, 1] - 0.5, 0, height - 1)
    x0, y0 = (np.minimum(np.floor(c).astype(int), max(n - 2, 0)) for c, n in ((x, width), (y, height)))
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    corners = (
        (y0, x0, (1 - fy) * (1 - fx)),
        (y0, x1, (1 - fy) * fx),
        (y1, x0, fy * (1 - fx)),
        (y1, x1, fy * fx),
    )
    total = sum(layout.dequantize(codes[:, rows, columns], step) * weight for rows, columns, weight in corners)
    return np.ascontiguousarray(np.asarray(total, dtype=np.float32).T)


class MaskFolder:
    """The class masks of a dataset, in a folder of PNG files named by key.

    The mask of ``class/001.jpg`` is ``class/001.jpg.png`` or, if there is none, ``class/001.png``. Masks are
    grey or palette images, in which a pixel's value or palette index is its class. They have the size of the original
    image as displayed (after EXIF rotation). Picklable; requires the extra ``masks``.

    Args:
        folder: path or URI.
        storage_options: passed to fsspec.

    Attributes:
        files: the masks' files by key.

    Raises:
        MissingPackage: Pillow is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        try:
            from PIL import Image  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "PIL":
                raise
            raise missing_package("reading masks", "Pillow", "masks") from error
        self.files = KeyedFiles(Objects(folder, storage_options), "mask", ".png")

    def __call__(self, key: str) -> Array:
        """Read the mask of a key: [height, width], of an integer dtype or bool.

        Raises:
            FileNotFoundError: there is no mask for the key.
            ValueError: the file is not a PNG image of classes.
        """
        name, data = self.files.get(key)
        try:
            return decode_png(data, ("1", "L", "P", "I", "I;16"), "a grey or palette image of classes")
        except ValueError as error:
            raise ValueError(f"{self.files.objects.uri}/{name} is not a mask: {error}") from error

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that have no mask, by one listing of the folder (over http, by a request per name).

        Raises:
            FileNotFoundError: the folder is empty or does not exist.
        """
        return self.files.missing(keys)


def decode_png(data: bytes, modes: Collection[str], expected: str) -> Array:
    """The pixels of a PNG image with one channel: [height, width].

    Args:
        data: the file.
        modes: of Pillow, those that are allowed.
        expected: the kind of image, for messages.

    Raises:
        ValueError: it has another mode, is damaged, or no PNG file.
    """
    import PIL.Image

    try:
        with PIL.Image.open(BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in modes:
                raise ValueError(f"got mode {image.mode}, expected {expected}")
            return _samples(np.asarray(image), data)
    except PIL.UnidentifiedImageError as error:  # its own message has an address in memory
        raise ValueError("not a PNG file, or a damaged one") from error
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise ValueError(str(error)) from error


def _samples(pixels: Array, data: bytes) -> Array:
    """Pixels of a PNG image as they are in the file: Pillow brings grey of 2 or 4 bits to 0 … 255."""
    bits, colour = data[24], data[25]  # of the header, which is always first
    return pixels // (255 // (2**bits - 1)) if colour == 0 and bits in (2, 4) else pixels

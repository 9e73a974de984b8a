"""The photographs of a store, cut and scaled as their features are."""

import io
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from densefeat.page.references import PhotographMissing, References, read_file, unescaped
from densefeat.storage.places import absolute_place, encloses, is_local

__all__ = ["PhotographMissing", "Photographs", "aligned", "decoded", "from_guidance"]

_MAX_PIXELS = 120_000_000
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DECODERS = threading.BoundedSemaphore(2)  # each may need _MAX_PIXELS several times in memory


class Photographs:
    """Reads photographs, from the reference of each row or below a folder by key.

    Args:
        source: of the store's configuration: ``kind`` and ``image_column``.
        root: folder or URI below which each photograph has its key as path; None: the rows' references.

    Raises:
        PlaceError: ``root`` is not a valid path or URI.
    """

    def __init__(self, source: Mapping[str, Any], root: str | None = None) -> None:
        self.root = None if root is None else absolute_place(root)
        self._references = References(str(source.get("kind", "folder")), source.get("image_column"))

    def read(self, row: Mapping[str, Any], shape: tuple[int, int], size: int) -> Image.Image:
        """The photograph of a row of the index on the grid of its features, as displayed (after EXIF rotation).

        Args:
            row: of the index.
            shape: (H, W) of the features.
            size: pixels of the longer side of the result.

        Returns:
            RGB, or RGBA if there is padding, which is transparent; the whole photograph if the row has no features.

        Raises:
            PhotographMissing: the file is missing, unreadable, too large or no image, the key leaves the root, or the
                photograph is not the one which the store was made from.
        """
        try:
            data = self._references.read(row) if self.root is None else _below_root(self.root, row["key"])
            with _DECODERS:
                return decoded(data, row, shape, size)
        except PhotographMissing:
            raise
        except Exception as error:  # file systems, pyarrow and Pillow raise many kinds
            place = row["uri"] if self.root is None else f"{self.root} by key {row['key']}"
            raise PhotographMissing(f"cannot be read from {place}: {_reason(error)}") from error


def decoded(data: bytes, row: Mapping[str, Any], shape: tuple[int, int], size: int) -> Image.Image:
    """Decode a photograph for `Photographs.read`. A large JPEG is decoded at a fraction of its size.

    Raises:
        PhotographMissing: it has too many pixels, or not the proportions of that which the store was made from.
        Exception: as Pillow raises it.
    """
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size[::-1] if orientation in _TURNED else image.size
        ratio = _ratio((width, height), (row.get("width"), row.get("height")))
        affine = row["affine"]
        detail = size / max(width, height)
        if affine is not None:
            detail = max(affine[0] / ratio[0], affine[4] / ratio[1]) * size / max(shape)
        stored = image.width
        wanted = max(1, math.ceil(image.width * detail)), max(1, math.ceil(image.height * detail))
        drafted = image.draft("RGB", wanted)
        if image.width * image.height > _MAX_PIXELS:
            raise PhotographMissing(f"has {width}×{height} pixels; the page shows at most {_MAX_PIXELS:,}")
        reduced = stored / drafted[1][2] if drafted else 1  # in pixels of the file, not rounded
        picture = _rgb(image if orientation == 1 else ImageOps.exif_transpose(image))
    if affine is None:
        picture.thumbnail((size, size))
        return picture
    scales = (reduced / ratio[0], reduced / ratio[1], 1)
    own = [scale * one for scale, one in zip(scales * 2, affine, strict=True)]
    return aligned(picture, own, shape, size)


def from_guidance(pixels: npt.NDArray[np.uint8], shape: tuple[int, int], size: int) -> Image.Image:
    """A guidance image [h, w, 3] of a compact store, which has the area of the features, for `Photographs.read`."""
    height, width, _ = pixels.shape
    return aligned(Image.fromarray(pixels), (shape[1] / width, 0, 0, 0, shape[0] / height, 0), shape, size)


def aligned(photograph: Image.Image, affine: Sequence[float], shape: tuple[int, int], size: int) -> Image.Image:
    """Cut and scale a photograph to the grid of its features; where there is padding, it is transparent.

    Args:
        photograph: RGB, as displayed.
        affine: the map from its pixels to feature pixels.
        shape: (H, W) of the features.
        size: pixels of the longer side of the result.

    Returns:
        RGBA or RGB.

    Raises:
        PhotographMissing: the map turns the image or has no scale.
    """
    a, b, c, d, e, f = affine
    if b or d or a <= 0 or e <= 0:
        raise PhotographMissing(f"cannot be aligned with its features: its affine map is {affine}")
    height, width = shape
    scale = size / max(height, width)
    out = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = max(0.0, -c / a), max(0.0, -f / e)
    right = min(float(photograph.width), (width - c) / a)
    bottom = min(float(photograph.height), (height - f) / e)
    if right - left < 1e-6 or bottom - top < 1e-6:
        raise PhotographMissing("does not overlap its features: it has another size than when the store was made")
    corners = np.array([[a * left + c, e * top + f], [a * right + c, e * bottom + f]]) * scale
    (x0, y0), (x1, y1) = np.rint(corners).astype(int).tolist()
    tile = (max(1, x1 - x0), max(1, y1 - y0))
    part = photograph.resize(tile, Image.Resampling.LANCZOS, box=(left, top, right, bottom), reducing_gap=3.0)
    if tile == out:
        return part
    canvas = Image.new("RGBA", out)
    canvas.paste(part, (x0, y0))
    return canvas


def _ratio(size: tuple[int, int], recorded: tuple[int | None, int | None]) -> tuple[float, float]:
    """Pixels of a photograph per pixel of the recorded one, by axis (x, y); sizes are (width, height).

    A copy of another size has the same proportions, to a pixel of its shorter side.
    """
    width, height = recorded
    if width is None or height is None or size == recorded:
        return 1.0, 1.0
    ratio = size[0] / width, size[1] / height
    short = int(height < width)
    if abs(size[short] - recorded[short] * ratio[1 - short]) > 1:  # type: ignore[operator]
        raise PhotographMissing(
            f"has {size[0]}×{size[1]} pixels, and the store was made from one of {width}×{height}: it is not the same"
        )
    return ratio


def _below_root(root: str, key: str) -> bytes:
    name = unescaped(key) if is_local(root) else key
    parts = name.replace(os.sep, "/").split("/") if is_local(root) else name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise PhotographMissing(f"has a key that is no path below --images: {key!r}")
    if is_local(root) and not encloses(root, Path(root) / name):  # follows symbolic links
        raise PhotographMissing(f"has a key that leads out of --images: {key!r}")
    return read_file(f"{root.rstrip('/')}/{name}")


def _rgb(image: Image.Image) -> Image.Image:
    """As the store was made: 16 bits as 8, transparency over white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

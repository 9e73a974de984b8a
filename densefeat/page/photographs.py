"""The photographs of a store, cut and scaled as their features are."""

import io
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects
from densefeat.storage.places import absolute_place, encloses, is_local, split_place

__all__ = ["PhotographMissing", "Photographs", "aligned"]

_MAX_BYTES = 128 << 20
_MAX_PIXELS = 120_000_000
_PATIENCE_S = 5.0  # somebody is waiting


class PhotographMissing(DensefeatError):  # noqa: N818 - says what is missing
    """The photograph of a row cannot be read or decoded; the message says why."""


class Photographs:
    """Reads photographs, from the URI of each row or below a folder by key.

    Args:
        kind: kind of the source in the store's configuration, e.g. ``"folder"``, ``"tar"``, ``"parquet"``.
        root: folder or URI below which each photograph has its key as path; None: the rows' URIs.

    Raises:
        PlaceError: ``root`` is not a valid path or URI.
    """

    def __init__(self, kind: str, root: str | None = None) -> None:
        self.kind = kind
        self.root = None if root is None else absolute_place(root)

    def read(self, row: Mapping[str, Any]) -> Image.Image:
        """Read the photograph of a row of the index: RGB, as displayed (after EXIF rotation).

        Raises:
            PhotographMissing: the file is missing, unreadable, too large or no image, or the key leaves the root.
        """
        try:
            data = self._from_uri(row) if self.root is None else self._below_root(self.root, row["key"])
            return _decoded(data)
        except PhotographMissing:
            raise
        except Exception as error:  # file systems and Pillow raise many kinds
            place = row["uri"] if self.root is None else f"{self.root} by key {row['key']}"
            raise PhotographMissing(f"cannot be read from {place}: {_reason(error)}") from error

    def _from_uri(self, row: Mapping[str, Any]) -> bytes:
        if self.kind == "parquet":
            raise PhotographMissing(f"is inside {row['uri']}: pass --images with a folder of files named by key")
        folder, name = split_place(row["uri"])
        if self.kind == "tar":
            if row["offset"] is None or row["nbytes"] is None:
                raise PhotographMissing(f"has no recorded place in {row['uri']}")
            _check_size(row["nbytes"])
            return _objects(folder).get_range(name, row["offset"], row["offset"] + row["nbytes"])
        return _get(folder, name)

    def _below_root(self, root: str, key: str) -> bytes:
        parts = key.split("/")
        if not key or key.startswith("/") or "\\" in key or "\0" in key or any(p in ("", ".", "..") for p in parts):
            raise PhotographMissing(f"has a key that is no path below --images: {key!r}")
        if is_local(root) and not encloses(root, Path(root) / key):  # follows symbolic links
            raise PhotographMissing(f"has a key that leads out of --images: {key!r}")
        return _get(root, key)


def aligned(photograph: Image.Image, affine: list[float], shape: tuple[int, int], size: int) -> Image.Image:
    """Cut and scale a photograph to the grid of its features; where there is padding, it is transparent.

    Args:
        photograph: RGB, as displayed.
        affine: the row's map from its pixels to feature pixels.
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
    # The photograph is smaller or larger than recorded if --images has another copy of it; the map is for the recorded.
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


def _get(folder: str, name: str) -> bytes:
    objects = _objects(folder)
    size = objects.size(name)
    if size is None:
        raise FileNotFoundError("there is no such file")
    _check_size(size)
    return objects.get(name)


@lru_cache(maxsize=64)
def _objects(folder: str) -> Objects:
    return Objects(folder, patience_s=_PATIENCE_S)


def _check_size(nbytes: int) -> None:
    if nbytes > _MAX_BYTES:
        raise PhotographMissing(f"has {nbytes:,} bytes; the page reads at most {_MAX_BYTES:,}")


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise PhotographMissing(f"has {image.width}×{image.height} pixels; the page shows at most {_MAX_PIXELS:,}")
        return ImageOps.exif_transpose(image).convert("RGB")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

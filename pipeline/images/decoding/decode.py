"""Decode bytes to uint8 RGB on the target geometry; memory is bounded and any input bytes are safe."""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding.formats import open_stored
from pipeline.images.decoding.stored import Stored
from schemas.configuration import MAX_PIXELS, MIN_SIDE, Fit

__all__ = ["Decoded", "Geometry", "decode"]

# ImageNet's mean colour, which normalisation maps to zero.
_PAD_RGB = (124, 116, 104)
# EXIF orientation (TIFF 6.0, tag 274) -> the transpose from the stored to the displayed image.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns about odd metadata in files that it can decode. Silenced once here, because warnings.catch_warnings
# around each image is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Geometry:
    """Which part of an image is used, at which size, and the grid of its features.

    Attributes:
        size: (height, width) in pixels of the network's input.
        fit: how an image is brought to that size. ``crop``: scale to cover it and keep the centre; ``pad``: scale to
            fit, place at the top left, fill the rest with ImageNet's mean colour; ``squash``: scale each axis on its
            own.
        output_size: (height, width) in pixels of the stored features, which cover the same area as ``size``.

    Raises:
        ValueError: a side is not positive, or ``fit`` is none of the three.
    """

    size: tuple[int, int]
    fit: Fit
    output_size: tuple[int, int]

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("output_size", self.output_size)):
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"Geometry: got {name}={value!r}, expected (height, width) of at least 1 pixel each.")
        if self.fit not in get_args(Fit):
            raise ValueError(f"Geometry: got fit={self.fit!r}, expected one of {', '.join(get_args(Fit))}.")


@dataclass(frozen=True, eq=False)
class Decoded:
    """One image on the target geometry, and its position there.

    Attributes:
        pixels: uint8 RGB, [3, H, W] with (H, W) = ``Geometry.size``, C-contiguous.
        height: of the original in pixels, as displayed (after EXIF orientation).
        width: of the original in pixels, as displayed.
        affine: (a, b, c, d, e, f): map from displayed original pixels (x, y) to the grid of the stored features,
            x_f = a·x + b·y + c and y_f = d·x + e·y + f. Coordinates are continuous: pixel i covers [i, i + 1), and the
            corner of the image is (0, 0).
        valid_box: (y0, x0, y1, x1), half open: the stored-feature pixels whose centre lies on the image, not on
            padding. Never empty.
    """

    pixels: NDArray[np.uint8]
    height: int
    width: int
    affine: tuple[float, float, float, float, float, float]
    valid_box: tuple[int, int, int, int]


def decode(data: bytes, geometry: Geometry, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Decoded:
    """Decode one image and bring it to ``geometry`` with a single bicubic, antialiased resampling.

    Crop and scale are one call of Pillow's ``resize(box=...)`` with a fractional box, so ``affine`` describes the
    pixels exactly. ``pad`` rounds the scaled sides to whole pixels; the affine map holds the scale of each axis after
    rounding. Samples of d bits become value * 255 / (2^d - 1), rounded; see ``open_png`` for the error of 16-bit RGB.
    Transparency is composited over white. The first frame of an animation is used; for an animated PNG, the image that
    viewers without animation show. CMYK is converted without a colour profile (profiles are ignored throughout), and
    EXIF orientation is applied. Metadata that cannot be parsed is ignored, as in image viewers. Thread-safe.

    Args:
        data: a whole JPEG (MPO), PNG, WebP, GIF, BMP, TIFF, PPM/PGM/PBM, JPEG 2000 or AVIF file.
        geometry: the target.
        max_pixels: images with more pixels are refused by their header, before memory is allocated.
        min_side: images with a shorter side, in pixels, are refused.

    Returns:
        The pixels and their position in the original.

    Raises:
        ImageError: ``corrupt`` (empty, truncated or damaged), ``unsupported`` (another format, or pixels without
            defined colours: signed, float, 32-bit, L*a*b* ...), ``too_large``, or ``too_small`` (also: so narrow that
            ``pad`` leaves no feature pixel on it). Nothing else is raised for any bytes.
        MemoryError: the machine is out of memory, which says nothing about the image.
    """
    try:
        source = _load(data, geometry, max_pixels=max_pixels, min_side=min_side)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", f"Refused by Pillow: {error}") from error
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, KeyError, zlib.error ...
        raise ImageError("corrupt", f"Cannot be decoded: {type(error).__name__}: {error}") from error
    return _resample(source, geometry)


class _Source(NamedTuple):
    """A decoded image as stored (EXIF orientation not applied), possibly at a reduced scale."""

    image: Image.Image  # RGB
    reduced: int  # one pixel of `image` covers reduced x reduced pixels of the file
    orientation: int  # EXIF, 1..8
    height: int  # as displayed, at full scale
    width: int


class _Placement(NamedTuple):
    """The box of the displayed original, and the top-left part of the target that it fills."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in displayed original pixels
    content: tuple[int, int]  # height, width in target pixels


def _place(geometry: Geometry, height: int, width: int) -> _Placement:
    target_height, target_width = geometry.size
    scales = (target_height / height, target_width / width)
    if geometry.fit == "crop":
        box_height = min(height, target_height / max(scales))
        box_width = min(width, target_width / max(scales))
        y0, x0 = (height - box_height) / 2, (width - box_width) / 2
        return _Placement((x0, y0, x0 + box_width, y0 + box_height), geometry.size)
    content = geometry.size
    if geometry.fit == "pad":
        content = (max(1, round(height * min(scales))), max(1, round(width * min(scales))))
    return _Placement((0.0, 0.0, float(width), float(height)), content)


def _load(data: bytes, geometry: Geometry, *, max_pixels: int, min_side: int) -> _Source:
    stored = open_stored(data)
    _check_size(stored.size, max_pixels=max_pixels, min_side=min_side)
    reduced = _draft(stored, geometry)
    image = stored.load()
    if reduced == 1 and image.size != stored.size:
        width, height = stored.size
        raise ImageError("corrupt", f"The header says {width}x{height} pixels, the image has {image.size}.")
    width, height = stored.size if stored.orientation < 5 else stored.size[::-1]
    return _Source(image, reduced, stored.orientation, height, width)


def _check_size(size: tuple[int, int], *, max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} pixels (width x height), more than max_pixels={max_pixels}.")
    if min(size) < min_side:
        raise ImageError("too_small", f"{width}x{height} pixels (width x height), a side below min_side={min_side}.")


def _draft(stored: Stored, geometry: Geometry) -> int:
    """Make libjpeg decode at 1/2, 1/4 or 1/8, since decoding takes most of the time; return the divisor.

    At least twice the needed resolution is kept, so that the antialiased resize, not the DCT, determines the result.
    """
    if stored.jpeg is None:
        return 1
    turned = stored.orientation >= 5
    width, height = stored.size
    placement = _place(geometry, *((width, height) if turned else (height, width)))
    x0, y0, x1, y1 = placement.box
    scales = (placement.content[1] / (x1 - x0), placement.content[0] / (y1 - y0))
    scale_x, scale_y = scales[::-1] if turned else scales
    drafted = stored.jpeg.draft(None, (math.ceil(2 * width * scale_x), math.ceil(2 * height * scale_y)))
    if drafted is None:
        return 1
    return round(width / drafted[1][2])


def _resample(source: _Source, geometry: Geometry) -> Decoded:
    placement = _place(geometry, source.height, source.width)
    valid_box = _valid_box(geometry, placement)
    content_height, content_width = placement.content
    size: tuple[int, int] = (content_width, content_height)
    x0, y0, x1, y1 = (edge / source.reduced for edge in placement.box)
    if source.orientation >= 5:
        size, (x0, y0, x1, y1) = size[::-1], (y0, x0, y1, x1)
    # The box is centred or whole, so mirroring does not move it: transpose the few target pixels, not the many
    # original ones.
    image = source.image.resize(size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    if source.orientation in _TURNS:
        image = image.transpose(_TURNS[source.orientation])
    pixels = np.empty((3, *geometry.size), np.uint8)
    pixels[:] = np.array(_PAD_RGB, np.uint8)[:, None, None]
    pixels[:, :content_height, :content_width] = np.asarray(image).transpose(2, 0, 1)
    return Decoded(pixels, source.height, source.width, _affine(geometry, placement), valid_box)


def _affine(geometry: Geometry, placement: _Placement) -> tuple[float, float, float, float, float, float]:
    x0, y0, x1, y1 = placement.box
    scale_x = placement.content[1] / (x1 - x0) * geometry.output_size[1] / geometry.size[1]
    scale_y = placement.content[0] / (y1 - y0) * geometry.output_size[0] / geometry.size[0]
    return (scale_x, 0.0, -x0 * scale_x, 0.0, scale_y, -y0 * scale_y)


def _valid_box(geometry: Geometry, placement: _Placement) -> tuple[int, int, int, int]:
    sides = []
    for content, size, output in zip(placement.content, geometry.size, geometry.output_size, strict=True):
        # Count the centres i + 1/2 below content * output / size, in integers: rounding must not move a border.
        sides.append(-((size - 2 * content * output) // (2 * size)))
    if min(sides) < 1:
        raise ImageError(
            "too_small",
            f"Too narrow: it fills {placement.content} (height, width) of {geometry.size} pixels, but no pixel of the "
            f"{geometry.output_size} features.",
        )
    return (0, 0, sides[0], sides[1])

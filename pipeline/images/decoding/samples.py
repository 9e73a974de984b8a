"""Convert samples as stored in files to uint8 RGB: scaling and transparency."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError

__all__ = ["Samples", "gray16_to_rgb", "over_white", "to_8_bits", "to_rgb", "unpack_bits"]

Samples = NDArray[np.uint8] | NDArray[np.uint16]

_WHITE_RGB = (255, 255, 255)


@functools.lru_cache(maxsize=32)
def _table(maximum: int) -> NDArray[np.uint8]:
    return ((np.arange(maximum + 1) * 255 + maximum // 2) // maximum).astype(np.uint8)


def to_8_bits(samples: Samples, maximum: int) -> NDArray[np.uint8]:
    """Scale samples from 0..maximum to 0..255: ``value * 255 / maximum``, rounded (``value / 257`` for 16 bits).

    Args:
        samples: unsigned, any shape; none above ``maximum``.
        maximum: value of full intensity, 1..65535.
    """
    if maximum == 255:
        return samples.astype(np.uint8, copy=False)
    return np.take(_table(maximum), samples, mode="clip")  # "clip" needs no pass to check the data


def unpack_bits(rows: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack samples of 1, 2 or 4 bits, highest bits first: [rows, bytes] -> [rows, count]."""
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    values = (rows[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(len(rows), -1)[:, :count]


def over_white(colour: NDArray[Any], alpha: NDArray[Any], *, premultiplied: bool) -> NDArray[np.uint8]:
    """Composite over white.

    Args:
        colour: float, [..., 3], in 0..1.
        alpha: float, [...], in 0..1; 1 is opaque.
        premultiplied: whether ``colour`` has been multiplied by ``alpha``.

    Returns:
        uint8 [..., 3].
    """
    alpha = alpha[..., None]
    seen = colour if premultiplied else colour * alpha
    # A premultiplied colour above its alpha is a bug of the writer; it must not wrap around.
    composited: NDArray[np.uint8] = np.rint(255 * np.minimum(seen + (1 - alpha), 1)).astype(np.uint8)
    return composited


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode with a defined range to RGB, compositing transparency over white.

    Raises:
        ImageError: ``unsupported``: float or 32-bit pixels, or a mode without a conversion.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: scaled to 0..65535
        return gray16_to_rgb(image)
    if image.mode in ("I", "F"):
        kind = "32-bit float" if image.mode == "F" else "signed or 32-bit integer"
        raise ImageError("unsupported", f"Got {kind} pixels, whose range is not defined; expected 8 or 16 bits.")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except ValueError as error:
        raise ImageError("unsupported", f"Cannot convert mode {image.mode!r} to RGB: {error}") from error
    canvas = Image.new("RGB", image.size, _WHITE_RGB)
    canvas.paste(rgba, mask=rgba)
    return canvas


def gray16_to_rgb(image: Image.Image, transparent: int | None = None) -> Image.Image:
    """Convert 16-bit gray to RGB; pixels of the value ``transparent``, if given, become white."""
    samples = np.asarray(image)
    gray = to_8_bits(samples, 65535)
    if transparent is not None:
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")

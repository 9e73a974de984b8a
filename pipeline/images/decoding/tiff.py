"""TIFF: samples -> RGB. Pillow's modes carry only some of what TIFF holds, and take some of the rest for it."""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from pipeline.images.decoding.samples import Samples, over_white, to_8_bits, to_rgb
from pipeline.images.decoding.stored import Stored
from pipeline.images.decoding.tiff_header import Alpha, Header, Photometric, read_header
from pipeline.images.decoding.tiff_samples import blocks
from pipeline.images.decoding.tiff_tags import Tag

__all__ = ["open_tiff"]

_ROWS_BYTES = 1 << 22  # of samples converted at a time


def open_tiff(data: bytes) -> Stored:
    """Read the header of a TIFF; of several images the first.

    Unsigned samples of 1, 2, 4, 8, 12 and 16 bits: gray either way round, RGB, palette, CMYK and YCbCr, with or
    without alpha, in strips, tiles or planes, in either byte and bit order, not compressed or by LZW, deflate,
    PackBits, LZMA or Zstandard; besides what JPEG and fax hold. Everything else is refused.

    Raises:
        ImageError: ``unsupported``, ``corrupt``: as ``read_header``.
    """
    header = read_header(data)
    orientation = header.value(Tag.ORIENTATION, 1)

    def load() -> Image.Image:
        return _by_pillow(data, header) if header.is_image_codec else _by_samples(data, header)

    return Stored((header.width, header.height), orientation if 1 <= orientation <= 8 else 1, load)


def _by_pillow(data: bytes, header: Header) -> Image.Image:
    """Pillow's decoder, on a directory of nothing but the tags in ``Tag``: others cannot cost the image.

    The orientation is left out too, since Pillow would turn the image.
    """
    order, big, _, records, start, size = header.directory
    kept = [record for tag, record in sorted(records.items()) if tag != Tag.ORIENTATION]
    table = struct.pack(order + ("Q" if big else "H"), len(kept)) + b"".join(kept)
    needed = data[:start] + table.ljust(size, b"\0") + data[start + size :]
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(needed))
    image.load()
    return to_rgb(image)


def _by_samples(data: bytes, header: Header) -> Image.Image:
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    palette = _palette(header)
    for block in blocks(data, header):
        height, width, channels = block.samples.shape
        rows = max(1, _ROWS_BYTES // (4 * width * channels))
        for top in range(0, height, rows):
            part = _rgb(block.samples[top : top + rows], header, palette)
            pixels[block.y + top : block.y + top + len(part), block.x : block.x + width] = part
    return Image.fromarray(pixels)


def _rgb(samples: Samples, header: Header, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[rows, columns, channels] -> uint8 [rows, columns, 3], or [rows, columns, 1] for gray."""
    maximum = (1 << header.bits) - 1
    colour = samples[..., : header.colour_channels]
    if header.photometric == Photometric.PALETTE:
        colour, whole = palette[colour[..., 0]], 255
    elif header.photometric == Photometric.YCBCR:
        colour, whole = np.asarray(Image.fromarray(colour, "YCbCr").convert("RGB")), 255
    else:
        whole = maximum
    if header.photometric == Photometric.WHITE_IS_ZERO:
        colour = whole - colour
    if header.alpha == Alpha.NONE and header.photometric != Photometric.CMYK:
        return to_8_bits(colour, whole)
    shares = colour.astype(np.float32) / np.float32(whole)
    if header.photometric == Photometric.CMYK:
        shares = (1 - shares[..., :3]) * (1 - shares[..., 3:])
    if header.alpha == Alpha.NONE:
        opaque: NDArray[np.uint8] = np.rint(255 * shares).astype(np.uint8)
        return opaque
    alpha = samples[..., header.colour_channels].astype(np.float32) / np.float32(maximum)
    return over_white(shares, alpha, premultiplied=header.alpha == Alpha.ASSOCIATED)


def _palette(header: Header) -> NDArray[np.uint8]:
    """uint8 [colours, 3], of no colours where there is no palette.

    The high byte of 16 is exact both for writers that fill the low one and for those that do not.
    """
    table = np.array(header.tags.get(Tag.COLOR_MAP, ()), np.uint16)
    if table.max(initial=0) > 255:  # else written with 8 bits, against the specification and not rarely
        table >>= 8
    return table.astype(np.uint8).reshape(3, len(table) // 3).T

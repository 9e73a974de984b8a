"""TIFF: samples to RGB. Pillow's modes cover only a part of TIFF, and misread some of the rest."""

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

_ROWS_BYTES = 1 << 22  # samples converted at a time


def open_tiff(data: bytes) -> Stored:
    """Read the header of the first image in a TIFF.

    Supported: unsigned samples of 1, 2, 4, 8, 12 and 16 bits; gray (black or white is zero), RGB, palette, CMYK and
    YCbCr; with or without alpha; strips, tiles or planes; either byte and bit order; uncompressed, LZW, deflate,
    PackBits, LZMA or Zstandard; also JPEG and fax. Everything else is refused.

    Raises:
        ImageError: ``unsupported`` or ``corrupt``, see ``read_header``.
    """
    header = read_header(data)
    orientation = header.value(Tag.ORIENTATION, 1)

    def load() -> Image.Image:
        return _by_pillow(data, header) if header.is_image_codec else _by_samples(data, header)

    return Stored((header.width, header.height), orientation if 1 <= orientation <= 8 else 1, load)


def _by_pillow(data: bytes, header: Header) -> Image.Image:
    """Decode with Pillow from a directory reduced to the tags in ``Tag``, so that others cannot fail the image.

    The orientation is dropped too, since Pillow would apply it.
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
    """Palette as uint8 [colours, 3]; no colours if there is no palette.

    The high byte of 16 bits is exact, whether or not the writer fills the low byte.
    """
    table = np.array(header.tags.get(Tag.COLOR_MAP, ()), np.uint16)
    if table.max(initial=0) > 255:  # otherwise written with 8 bits, a common violation of the specification
        table >>= 8
    return table.astype(np.uint8).reshape(3, len(table) // 3).T

"""TIFF: read samples from strips, tiles and planes, block by block."""

import io
import struct
import zlib
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from pipeline.errors import ImageError
from pipeline.images.decoding.samples import Samples, unpack_bits
from pipeline.images.decoding.tiff_header import Compression, Header
from pipeline.images.decoding.tiff_tags import Tag

__all__ = ["Block", "blocks"]

_BLOCK_BYTES = 1 << 22  # unpacked at a time; a larger strip or tile is not divided
_MAX_TILE_PIXELS = 1 << 26
_PACKED_EXTRA = 4096  # bytes that compression may add, besides doubling
_DEFLATE = (Compression.DEFLATE, Compression.OLD_DEFLATE)
_PREDICTED = (Compression.LZW, *_DEFLATE, Compression.LZMA, Compression.ZSTD)
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Block(NamedTuple):
    """Samples of a part of the image: [rows, columns, channels], uint8 or uint16, and their position."""

    y: int
    x: int
    samples: Samples


class _Layout(NamedTuple):
    """How the pixels are divided into segments (strips or tiles)."""

    offsets: tuple[int, ...]
    counts: tuple[int, ...]  # packed bytes; the file's size if it does not say
    rows: int  # of a segment
    columns: int
    down: int  # number of segments, vertically
    across: int
    planes: int
    row_samples: int  # per row of one plane's segment
    row_bytes: int


def blocks(data: bytes, header: Header) -> Iterator[Block]:
    """Yield the samples of an image whose compression works on bytes, in blocks of a few megabytes.

    Raises:
        ImageError: ``corrupt``: fewer strips or tiles than the image needs, or a truncated one; ``unsupported``: tiles
            far larger than the image, or a predictor not defined for the depth.
    """
    layout = _layout(header, len(data))
    tiled = Tag.TILE_OFFSETS in header.tags
    together = 1 if tiled else max(1, _BLOCK_BYTES // (layout.rows * layout.row_bytes * layout.planes))
    for first in range(0, layout.down * layout.across, together):
        last = min(first + together, layout.down * layout.across)
        y, x = first // layout.across * layout.rows, first % layout.across * layout.columns
        # The last strip has only the remaining rows; tiles always have all rows.
        rows = layout.rows if tiled else min((last - first) * layout.rows, header.height - y)
        planes: list[Any] = []
        for plane in range(layout.planes):
            start = plane * layout.down * layout.across
            packed = _unpack(data, header, layout, range(start + first, start + last), rows)
            planes.append(_samples(packed, header, layout))
        samples: Samples = planes[0] if layout.planes == 1 else np.concatenate(planes, axis=2)
        yield Block(y, x, samples[: header.height - y, : header.width - x])


def _layout(header: Header, size: int) -> _Layout:
    tiled = Tag.TILE_OFFSETS in header.tags
    rows = header.value(Tag.TILE_HEIGHT if tiled else Tag.ROWS_PER_STRIP, 0 if tiled else header.height)
    columns = header.value(Tag.TILE_WIDTH, 0) if tiled else header.width
    if min(rows, columns) < 1:
        raise ImageError("corrupt", f"Got TIFF strips or tiles of {rows}x{columns} pixels.")
    if tiled and rows * columns > max(_MAX_TILE_PIXELS, 4 * header.width * header.height):
        raise ImageError("unsupported", f"Got TIFF tiles of {rows}x{columns} pixels, far larger than the image.")
    rows = rows if tiled else min(rows, header.height)
    planes = header.channels if header.planar else 1
    samples = columns * header.channels // planes
    row_bytes = (samples * header.bits + 7) // 8
    down, across = -(-header.height // rows), -(-header.width // columns)
    offsets = header.tags.get(Tag.TILE_OFFSETS if tiled else Tag.STRIP_OFFSETS, ())
    counts = header.tags.get(Tag.TILE_BYTES if tiled else Tag.STRIP_BYTES, ())
    if header.compression == Compression.NONE and down == 1 and len(offsets) == planes and not tiled:
        # The whole image is one strip, which can be read in pieces of any size.
        rows = max(1, min(rows, _BLOCK_BYTES // row_bytes))
        down = -(-header.height // rows)
        offsets = tuple(offset + part * rows * row_bytes for offset in offsets for part in range(down))
        counts = ()
    if len(offsets) < planes * down * across:
        raise ImageError("corrupt", f"Got {len(offsets)} TIFF strips or tiles, expected {planes * down * across}.")
    if len(counts) < len(offsets):
        counts = (size,) * len(offsets)
    if max(offsets) >= size:
        raise ImageError("corrupt", f"Got {size} bytes; the TIFF has pixels starting at byte {max(offsets)}.")
    return _Layout(offsets, counts, rows, columns, down, across, planes, samples, row_bytes)


def _unpack(data: bytes, header: Header, layout: _Layout, segments: range, rows: int) -> NDArray[np.uint8]:
    """Unpack vertically adjacent segments to bytes: [rows, row_bytes]."""
    parts = []
    for place, segment in enumerate(segments):
        start = layout.offsets[segment]
        expected = min(layout.rows, rows - place * layout.rows) * layout.row_bytes
        if header.compression == Compression.NONE:  # the byte count in the file is not needed, and often wrong
            part = data[start : start + expected]
        else:  # no compression doubles the size; strips that claim the whole file must not each copy it
            part = data[start : start + min(layout.counts[segment], 2 * expected + _PACKED_EXTRA)]
        if header.value(Tag.FILL_ORDER, 1) == 2:
            part = part.translate(_REVERSED_BITS)
        if header.compression in _DEFLATE:  # one byte more, so that zlib checks the checksum at the end
            part = zlib.decompressobj().decompress(part, expected + 1)[:expected]
        parts.append(part)
    if header.compression in (Compression.NONE, *_DEFLATE):
        unpacked = b"".join(parts)
        if len(unpacked) != rows * layout.row_bytes:
            raise ImageError(
                "corrupt", f"Got {len(unpacked)} bytes of TIFF pixels, expected {rows * layout.row_bytes}."
            )
        return np.frombuffer(unpacked, np.uint8).reshape(rows, layout.row_bytes)
    return _by_libtiff(parts, header.compression, rows, layout)


def _by_libtiff(parts: list[bytes], compression: int, rows: int, layout: _Layout) -> NDArray[np.uint8]:
    """Decompress with libtiff, presenting the bytes as an 8-bit gray image, so that any kind of sample works."""
    records = [(Tag.WIDTH, 1, layout.row_bytes), (Tag.HEIGHT, 1, rows), (Tag.BITS, 1, 8)]
    records += [(Tag.COMPRESSION, 1, compression), (Tag.PHOTOMETRIC, 1, 1)]
    records += [(Tag.STRIP_OFFSETS, len(parts), 0), (Tag.CHANNELS, 1, 1), (Tag.ROWS_PER_STRIP, 1, layout.rows)]
    records += [(Tag.STRIP_BYTES, len(parts), 0)]
    tables = 8 + 2 + 12 * len(records) + 4  # header, number of records, records, link to the next
    lengths = [len(part) for part in parts]
    starts = list(accumulate(lengths[:-1], initial=tables + 8 * len(parts)))
    values = {Tag.STRIP_OFFSETS: starts, Tag.STRIP_BYTES: lengths}
    file = [struct.pack("<2sHIH", b"II", 42, 8, len(records))]
    for tag, count, value in records:
        if tag in values:  # a single value is stored in the record itself
            value = values[tag][0] if count == 1 else tables + (4 * count if tag == Tag.STRIP_BYTES else 0)
        file.append(struct.pack("<HHII", tag, 4, count, value))
    file += [bytes(4), struct.pack(f"<{2 * len(parts)}I", *starts, *lengths), *parts]
    return np.asarray(TiffImagePlugin.TiffImageFile(io.BytesIO(b"".join(file))))


def _samples(packed: NDArray[np.uint8], header: Header, layout: _Layout) -> Samples:
    """[rows, row_bytes] of one plane -> [rows, columns, channels of the plane]."""
    samples: Samples
    if header.bits == 8:
        samples = packed
    elif header.bits == 16:
        samples = packed.view(np.dtype(header.directory.order + "u2")).astype(np.uint16)
    elif header.bits == 12:  # two samples in three bytes, most significant bits first, in either byte order
        triples = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 3))).reshape(len(packed), -1, 3).astype(np.uint16)
        pairs = [triples[..., 0] << 4 | triples[..., 1] >> 4, (triples[..., 1] & 15) << 8 | triples[..., 2]]
        samples = np.stack(pairs, -1).reshape(len(packed), -1)[:, : layout.row_samples]
    else:
        samples = unpack_bits(packed, header.bits, layout.row_samples)
    samples = samples.reshape(len(packed), layout.columns, -1)
    predictor = header.value(Tag.PREDICTOR, 1) if header.compression in _PREDICTED else 1
    if predictor == 2 and header.bits in (8, 16):  # differences from the left neighbour, modulo 2^bits
        summed = np.empty_like(samples)
        np.cumsum(samples, axis=1, dtype=samples.dtype, out=summed)
        return summed
    if predictor != 1:
        raise ImageError(
            "unsupported",
            f"Got TIFF predictor {predictor} with {header.bits} bits, expected 1, or 2 with 8 or 16 bits.",
        )
    return samples

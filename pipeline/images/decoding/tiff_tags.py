"""TIFF: the tags that affect pixels, read from a file's first directory."""

import struct
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from pipeline.errors import ImageError

__all__ = ["Directory", "Tag", "read_directory"]


class Tag(IntEnum):
    """The tags that affect pixels."""

    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    CHANNELS = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTES = 279
    PLANAR = 284
    FAX3_OPTIONS = 292
    FAX4_OPTIONS = 293
    PREDICTOR = 317
    COLOR_MAP = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_BYTES = 325
    INK_SET = 332
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    JPEG_TABLES = 347
    OLD_JPEG_PROCESS = 512
    OLD_JPEG_OFFSET = 513
    OLD_JPEG_BYTES = 514
    OLD_JPEG_RESTART = 515
    OLD_JPEG_QUANTIZATION = 519
    OLD_JPEG_DC = 520
    OLD_JPEG_AC = 521
    YCBCR_COEFFICIENTS = 529
    YCBCR_SUBSAMPLING = 530
    YCBCR_POSITIONING = 531
    REFERENCE_BLACK_WHITE = 532


# Tags that are valid with only one PhotometricInterpretation: RGB, palette, CMYK, YCbCr are 2, 3, 5, 6.
_ONLY_WITH = {
    Tag.COLOR_MAP: 3,
    Tag.INK_SET: 5,
    Tag.YCBCR_COEFFICIENTS: 6,
    Tag.YCBCR_SUBSAMPLING: 6,
    Tag.REFERENCE_BLACK_WHITE: 6,
}
# Tags that only libtiff uses.
_LIBTIFF = frozenset(
    tag for tag in Tag if tag.name.startswith(("FAX", "JPEG", "OLD_JPEG")) or tag == Tag.YCBCR_POSITIONING
)
# Pixels can be decoded without these tags, so damaged ones count as missing.
_DISPENSABLE = (Tag.ORIENTATION, Tag.STRIP_BYTES, Tag.TILE_BYTES)
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}  # type of a tag -> numpy's
_RATIONAL = 5
_FRACTIONS = (Tag.YCBCR_COEFFICIENTS, Tag.REFERENCE_BLACK_WHITE)
_TAGS = frozenset(Tag)


class Directory(NamedTuple):
    """The tags of a directory that are in ``Tag`` and are valid for its PhotometricInterpretation.

    Attributes:
        order: byte order, "<" or ">".
        big: whether the file is a BigTIFF.
        values: of the tags, except those that only libtiff uses; fractions in thousandths.
        records: of all these tags, as raw bytes from the file.
        start: byte offset of the directory in the file.
        size: of the directory in bytes, including the link at its end.
    """

    order: str
    big: bool
    values: dict[Tag, tuple[int, ...]]
    records: dict[Tag, bytes]
    start: int
    size: int


def read_directory(data: bytes) -> Directory:
    """Read the first directory of a TIFF or BigTIFF.

    Raises:
        ImageError: ``corrupt``: a tag has values that are not integers.
        Exception: from struct or numpy, if an offset lies outside the file.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    wide = "Q" if big else "I"
    start = struct.unpack_from(order + wide, data, 8 if big else 4)[0]
    count_size, record_size = (8, 20) if big else (2, 12)
    count = int.from_bytes(data[start : start + count_size], "little" if order == "<" else "big")
    records: dict[Tag, bytes] = {}
    first = start + count_size
    for place in range(first, first + count * record_size, record_size):
        record = data[place : place + record_size]
        number = struct.unpack_from(order + "H", record)[0]
        if number in _TAGS and any(record[4 : 12 if big else 8]):  # a tag without values counts as missing
            records.setdefault(Tag(number), record)
    values: dict[Tag, tuple[int, ...]] = {}
    for tag in sorted(records, key=lambda tag: tag != Tag.PHOTOMETRIC):
        if tag in _ONLY_WITH and values.get(Tag.PHOTOMETRIC, ())[:1] != (_ONLY_WITH[tag],):
            del records[tag]
        elif tag not in _LIBTIFF:
            try:
                values[tag] = _values(data, order, tag, records[tag], big=big)
            except Exception:
                if tag not in _DISPENSABLE:
                    raise
                del records[tag]
    size = count_size + count * record_size + (8 if big else 4)
    return Directory(order, big, values, records, start, size)


def _values(data: bytes, order: str, tag: Tag, record: bytes, *, big: bool) -> tuple[int, ...]:
    wide = "Q" if big else "I"
    kind, length = struct.unpack_from(order + "H" + wide, record, 2)
    form = "u4" if kind == _RATIONAL and tag in _FRACTIONS else _INTEGERS.get(kind)
    if form is None:
        raise ImageError("corrupt", f"Got the TIFF tag {tag.name} with values of type {kind}, expected integers.")
    dtype = np.dtype(order + form)
    numbers = length * 2 if kind == _RATIONAL else length
    if numbers * dtype.itemsize > (8 if big else 4):
        at = struct.unpack_from(order + wide, record, 12 if big else 8)[0]
        values = np.frombuffer(data, dtype, numbers, at).tolist()
    else:
        values = np.frombuffer(record, dtype, numbers, 12 if big else 8).tolist()
    if kind == _RATIONAL:
        values = [round(1000 * top / bottom) if bottom else 0 for top, bottom in zip(*[iter(values)] * 2, strict=True)]
    return tuple(values)

"""Writers of PNG and TIFF from bare samples, in every flavour of the formats: what Pillow cannot write."""

import lzma
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import pytest
from numcodecs import zstd
from numpy.typing import NDArray

from pipeline.errors import ImageError
from pipeline.images.decoding.decode import Decoded, Geometry, decode

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
SQUASH = Geometry((32, 32), "squash", (32, 32))


def status_of(data: bytes, geometry: Geometry = SQUASH, **options: int) -> str:
    """Of the error that decoding raises."""
    with pytest.raises(ImageError) as caught:
        decode(data, geometry, **options)
    assert str(caught.value)
    return caught.value.status


def whole(data: bytes, height: int, width: int) -> Decoded:
    """Decoded pixel by pixel: nothing is resampled."""
    return decode(data, Geometry((height, width), "squash", (height, width)), min_side=1)


def pixels_of(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3], as in the file."""
    return whole(data, height, width).pixels.transpose(1, 2, 0)


def over_white(colour: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition: [..., 3] in 0..1 and [...] in 0..1 -> [..., 3] in 0..255."""
    return 255 * (colour * alpha[..., None] + 1 - alpha[..., None])


def rows_of(samples: NDArray[np.uint16], bits: int, order: str = ">") -> list[bytes]:
    """[height, width, channels] -> the bytes of each row, padded to whole bytes; 16 bits in ``order``."""
    flat = samples.reshape(len(samples), -1)
    if bits == 16:
        return [row.astype(order + "u2").tobytes() for row in flat]
    digits = (flat[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in digits]


def chunk(name: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    samples: NDArray[np.uint16], bits: int, colour: int, *, before: bytes = b"", after: bytes = b"", interlace: int = 0
) -> bytes:
    """A PNG of [height, width, channels], with chunks before and after its pixels; filters take turns."""
    height, width, channels = samples.shape
    step = max(1, bits * channels // 8)
    passes = ADAM7 if interlace else ((0, 0, 1, 1),)
    stream = b""
    for y, x, down, right in passes:
        part = samples[y::down, x::right]
        above = np.zeros(1, np.uint8)
        for number, row in enumerate(rows_of(part, bits) if part.size else []):
            line = np.frombuffer(row, np.uint8)
            left = np.concatenate([np.zeros(step, np.uint8), line])[: len(line)]
            kind = number % 3  # none, sub, up
            filtered = line - (0, left, above if number else 0)[kind]
            stream += bytes([kind]) + filtered.astype(np.uint8).tobytes()
            above = line
    packed = zlib.compress(stream)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    middle = len(packed) // 2
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
        + chunk(b"IDAT", packed[:middle]) + chunk(b"IDAT", packed[middle:]) + after + chunk(b"IEND")
    )  # fmt: skip


def _lzw(data: bytes) -> bytes:
    """LZW that never needs more than 9 bits a code: the table is cleared in time."""
    codes = []
    for start in range(0, len(data), 200):
        codes += [256, *data[start : start + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def _packbits(data: bytes) -> bytes:
    parts = [data[start : start + 128] for start in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


PACKERS = {
    1: bytes, 5: _lzw, 8: zlib.compress, 32773: _packbits, 32946: zlib.compress,
    34925: lambda data: lzma.compress(data, preset=0), 50000: lambda data: bytes(zstd.compress(data, 1)),
}  # fmt: skip


def tiff(
    samples: NDArray[np.uint16],
    bits: int,
    tags: Mapping[int, tuple[int, ...]],
    *,
    order: str = "<",
    compression: int = 1,
    planar: bool = False,
    predictor: int = 1,
    fill_order: int = 1,
    rows: int | None = None,
    tile: tuple[int, int] | None = None,
    big: bool = False,
) -> bytes:
    """A TIFF of [height, width, channels] in strips of ``rows`` rows or in tiles, with more or other ``tags``."""
    height, width, channels = samples.shape
    down, right = tile or (rows or height, width)
    segments = []
    for plane in np.split(samples, channels, axis=2) if planar else [samples]:
        for y in range(0, height, down):
            for x in range(0, width, right):
                part = plane[y : y + down, x : x + right]
                if tile:
                    part = np.pad(part, ((0, down - part.shape[0]), (0, right - part.shape[1]), (0, 0)), mode="edge")
                if predictor == 2:
                    part = np.diff(part.astype(np.int64), axis=1, prepend=0) % (1 << bits)
                packed = PACKERS[compression](b"".join(rows_of(part.astype(np.uint16), bits, order)))
                if fill_order == 2:
                    packed = bytes(int(f"{byte:08b}"[::-1], 2) for byte in packed)
                segments.append(packed)
    start = 16 if big else 8
    offsets = [start + sum(map(len, segments[:place])) for place in range(len(segments))]
    counts = [len(segment) for segment in segments]
    found: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (bits,) * channels, 259: (compression,), 266: (fill_order,),
        277: (channels,), 284: (1 + planar,), 317: (predictor,),
    }  # fmt: skip
    found |= {322: (right,), 323: (down,), 324: tuple(offsets), 325: tuple(counts)} if tile else {
        273: tuple(offsets), 278: (down,), 279: tuple(counts)
    }  # fmt: skip
    return directory(b"".join(segments), found | dict(tags), order=order, big=big)


def directory(
    body: bytes, tags: Mapping[int, tuple[int, ...]], *, order: str, big: bool = False, raw: tuple[bytes, ...] = ()
) -> bytes:
    """Header, ``body`` (from byte 8 on; 16 of a BigTIFF) and a directory of ``tags`` and of whole ``raw`` records."""
    start, wide, room = (16, "Q", 8) if big else (8, "I", 4)
    body += bytes(-len(body) % 8)
    records, extra = [], b""
    after = start + len(body) + (8 if big else 2) + (20 if big else 12) * (len(tags) + len(raw)) + room
    for tag, values in sorted(tags.items()):
        kind, form = (3, "H") if max(values, default=0) < 65536 else (4, "I")
        packed = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(packed) > room:
            packed, extra = struct.pack(order + wide, after + len(extra)), extra + packed + bytes(-len(packed) % 8)
        records.append(struct.pack(order + "HH" + wide, tag, kind, len(values)) + packed.ljust(room, b"\0"))
    records += raw
    records.sort(key=lambda record: struct.unpack_from(order + "H", record))
    magic = b"II" if order == "<" else b"MM"
    number = struct.pack(order + ("Q" if big else "H"), len(records))
    header = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), start + len(body))
    return magic + header + body + number + b"".join(records) + bytes(room) + extra

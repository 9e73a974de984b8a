"""PNG: only the chunks that affect pixels are passed to Pillow, so a damaged other chunk cannot fail an image."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from pipeline.errors import ImageError
from pipeline.images.decoding.samples import gray16_to_rgb, to_8_bits, to_rgb
from pipeline.images.decoding.stored import Stored, orientation_of

__all__ = ["open_png"]

_SIGNATURE = 8  # bytes
_GRAY, _RGB, _PALETTE, _GRAY_ALPHA, _RGBA = 0, 2, 3, 4, 6
# PNG 3, table 12: the depths allowed for each colour type.
_DEPTHS = {_GRAY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GRAY_ALPHA: (8, 16), _RGBA: (8, 16)}
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_MAX_EXIF = 1 << 20  # bytes; an orientation needs far less


class _Parts(NamedTuple):
    """The parts of a file that affect its pixels."""

    data: bytes  # signature and critical chunks
    header: tuple[int, int, int, int, int, int, int]  # width, height, depth, colour type, three methods
    palette_entries: int
    transparency: bytes  # tRNS
    exif: bytes


def open_png(data: bytes) -> Stored:
    """Read the header of a PNG.

    Pillow receives only the critical chunks. Ancillary ones (profiles, text, timestamps, later frames of an animation,
    private ones) are skipped without being unpacked; of them, only tRNS and EXIF are used, if their CRC matches. Pillow
    keeps the high byte of 16-bit samples, except gray: within 1 of the exact value, or within 2 with alpha.

    Raises:
        ImageError: ``corrupt``: a critical chunk is damaged, missing, or violates the specification; ``unsupported``:
            a critical chunk is not in the specification.
    """
    parts = _read_chunks(data)
    width, height, *_ = parts.header
    return Stored((width, height), orientation_of(parts.exif), lambda: _load(parts))


def _read_chunks(data: bytes) -> _Parts:
    view = memoryview(data)
    kept = [[0, _SIGNATURE]]  # [start, end] of runs of critical chunks
    header, palette, transparency, exif = b"", b"", b"", b""
    has_pixels = False
    at = _SIGNATURE
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if not name.isalpha() or end > len(data):
            if has_pixels and name != b"IDAT":  # truncated, or garbage, after the pixels
                break
            raise ImageError("corrupt", f"Got {len(data)} bytes; the PNG chunk {name!r} at {at} would end at {end}.")
        body = view[at + 8 : end - 4]
        if name in _CRITICAL:
            _check_sum(view[at + 4 : end])
            if at == kept[-1][1]:
                kept[-1][1] = end
            else:
                kept.append([at, end])
            if name == b"IEND":
                break
            if (name == b"IHDR") == bool(header) or (name == b"PLTE" and palette):
                raise ImageError("corrupt", f"The PNG chunk {name!r} at {at} is out of order.")
            if name == b"IHDR":
                header = bytes(body)
            elif name == b"PLTE" and not has_pixels:
                palette = bytes(body)
            has_pixels |= name == b"IDAT"
        elif name[0] & 0x20 == 0:
            _check_sum(view[at + 4 : end])
            raise ImageError("unsupported", f"Got the critical PNG chunk {name!r}, which is not in the specification.")
        elif name == b"tRNS" and not has_pixels and not transparency and _is_sound(view[at + 4 : end]):
            transparency = bytes(body[:256])
        elif name in (b"eXIf", b"zTXt", b"tEXt") and length <= _MAX_EXIF and not exif and _is_sound(view[at + 4 : end]):
            exif = bytes(body) if name == b"eXIf" else _raw_exif(name, bytes(body))
        at = end
    fields = _check_header(header, palette, has_pixels=has_pixels)
    whole = kept == [[0, len(data)]]
    stream = data if whole else b"".join(view[start:end] for start, end in kept)
    return _Parts(stream, fields, len(palette) // 3, transparency, exif)


def _raw_exif(name: bytes, text: bytes) -> bytes:
    """Decode EXIF as ImageMagick writes it to text: hexadecimal after three lines. Empty for any other ``text``."""
    keyword, _, value = text.partition(b"\0")
    if keyword != b"Raw profile type exif":
        return b""
    try:
        if name == b"zTXt":  # the first byte is the compression method, deflate
            value = zlib.decompressobj().decompress(value[1:], 2 * _MAX_EXIF + 4096)
        return bytes.fromhex("".join(value.decode("latin-1").split("\n")[3:]))
    except (zlib.error, ValueError):
        return b""


def _is_sound(chunk: memoryview) -> bool:
    """Whether ``chunk`` (from its name to its CRC) matches the CRC at its end."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def _check_sum(chunk: memoryview) -> None:
    """Check a CRC here: Pillow neither checks IDAT nor reads the pixels' checksum, so bit flips would pass."""
    if not _is_sound(chunk):
        raise ImageError("corrupt", f"The checksum of the PNG chunk {bytes(chunk[:4])!r} does not match its bytes.")


def _check_header(header: bytes, palette: bytes, *, has_pixels: bool) -> tuple[int, int, int, int, int, int, int]:
    if len(header) != 13 or not has_pixels:
        raise ImageError("corrupt", "Got a PNG without pixels, expected the chunks IHDR and IDAT.")
    fields = struct.unpack(">IIBBBBB", header)
    _, _, depth, colour, compression, filtering, interlace = fields
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ImageError("corrupt", f"Got the PNG header {header!r}, which violates the specification.")
    if colour == _PALETTE and (not palette or len(palette) % 3 or len(palette) > 768):
        raise ImageError("corrupt", f"Got a PNG palette of {len(palette)} bytes, expected a multiple of 3, 3 to 768.")
    return fields


def _open(data: bytes) -> ImageFile.ImageFile:
    return PngImagePlugin.PngImageFile(io.BytesIO(data))


def _load(parts: _Parts) -> Image.Image:
    _, _, depth, colour, *_ = parts.header
    image = _open(parts.data)
    image.load()
    key = _transparent_samples(parts.transparency, depth, 1 if colour == _GRAY else 3)
    if colour == _PALETTE and parts.transparency:
        image.info["transparency"] = parts.transparency[: parts.palette_entries]
    elif colour == _GRAY and depth == 16:
        return gray16_to_rgb(image, key[0] if key else None)
    elif colour == _GRAY and key:
        image.info["transparency"] = int(to_8_bits(np.array(key, np.uint16), (1 << depth) - 1)[0])
    elif colour == _RGB and key and depth == 8:
        image.info["transparency"] = key
    elif colour == _RGB and key:
        return _without_key16(image, parts.data, key)
    return to_rgb(image)


def _transparent_samples(transparency: bytes, depth: int, channels: int) -> tuple[int, ...]:
    """Samples of the transparent colour; empty if there is none. Bits above ``depth`` are ignored."""
    if len(transparency) != 2 * channels:
        return ()
    return tuple(value & ((1 << depth) - 1) for value in struct.unpack(f">{channels}H", transparency))


def _without_key16(image: Image.Image, data: bytes, key: tuple[int, ...]) -> Image.Image:
    """Make the colour ``key`` of 16-bit RGB white. Pillow keeps only high bytes, so the low ones are decoded too."""
    other = _open(data)
    other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]  # little-endian: yields the low byte
    high, low = np.array(image), np.asarray(other)
    wanted = np.array(key, np.uint16)
    transparent = np.logical_and((high == wanted >> 8).all(-1), (low == wanted & 255).all(-1))
    high[transparent] = 255
    return Image.fromarray(high)

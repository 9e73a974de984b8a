"""JPEG: Pillow's decoder, made tolerant of damaged metadata."""

import io
import struct
from collections.abc import Iterator

from PIL import Image, JpegImagePlugin

from pipeline.errors import ImageError
from pipeline.images.decoding.samples import to_rgb
from pipeline.images.decoding.stored import Stored, orientation_of

__all__ = ["open_jpeg"]

# Markers without a length: TEM, RST0..7, SOI.
_BARE = (0x01, *range(0xD0, 0xD9))
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_SCAN, _EXIF_SEGMENT, _COMMENT = 0xDA, 0xE1, 0xFE
_EXIF = b"Exif\0\0"


def open_jpeg(data: bytes) -> Stored:
    """Read the header of a JPEG, or of the first image of an MPO.

    If Pillow cannot parse the metadata (e.g. a truncated profile), the file is read again without it.

    Raises:
        ImageError: ``unsupported``: not 8 bits per sample, or not 1, 3 or 4 channels.
        Exception: any error that Pillow raises for a damaged header.
    """
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))  # not its factory, which reads an MPO's index too
        orientation = orientation_of(image)
    except Exception:
        _check_frame(data)
        needed, exif = _without_metadata(data)
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(needed))
        orientation = orientation_of(exif)

    def load() -> Image.Image:
        image.load()
        return to_rgb(image)

    return Stored(image.size, orientation, load, image)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of the segments before the first scan; the last one is the scan and the rest."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF, *_BARE):  # an escaped 255, a fill byte, or a marker without a body
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _SCAN or at + 4 > len(data):
            yield marker, at, len(data)
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at, end
        at = end


def _check_frame(data: bytes) -> None:
    for marker, start, _ in _segments(data):
        if marker in _FRAMES:
            bits, _, _, channels = struct.unpack_from(">BHHB", data, start + 4)
            if bits != 8 or channels not in (1, 3, 4):
                raise ImageError(
                    "unsupported",
                    f"Got a JPEG of {bits} bits per sample and {channels} channels, expected 8 bits and 1, 3 or 4.",
                )


def _without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Return a copy with only the segments that affect pixels, and the EXIF data (empty if there is none)."""
    kept, exif = [data[:2]], b""
    for marker, start, end in _segments(data):
        body = data[start + 4 : end]
        if marker == _EXIF_SEGMENT and body.startswith(_EXIF):
            exif = exif or body.removeprefix(_EXIF)
        # libjpeg takes the colour space from the JFIF and Adobe segments, if they are complete.
        colour = (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
            marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        )
        if colour or not (0xE0 <= marker <= 0xEF or marker == _COMMENT):
            kept.append(data[start:end])
    return b"".join(kept), exif

"""Detect the format of image bytes, and open files of each format."""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

from pipeline.errors import ImageError
from pipeline.images.decoding.jpeg import open_jpeg
from pipeline.images.decoding.png import open_png
from pipeline.images.decoding.samples import Samples, to_8_bits, to_rgb, unpack_bits
from pipeline.images.decoding.stored import Stored, orientation_of
from pipeline.images.decoding.tiff import open_tiff

__all__ = ["open_stored"]

# Supported formats, most frequent first. Pillow has more, but some run external programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Register the formats now: at the first image, threads would race.
Image.init()


def open_stored(data: bytes) -> Stored:
    """Read the header of an image file.

    Does not use ``Image.open``, which checks the size against a global and warns about images accepted here.

    Raises:
        ImageError: ``corrupt`` or ``unsupported``.
        Exception: any error that Pillow raises for a damaged header.
    """
    if not data:
        raise ImageError("corrupt", "The file is empty (0 bytes).")
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and accept and accept(data[:16]) is True:
            return _OPENERS[name](data)
    raise ImageError(
        "unsupported",
        f"Not an image: got {len(data)} bytes beginning with {data[:16]!r}, expected one of {', '.join(_FORMATS)}.",
    )


def _opened(name: str, data: bytes) -> ImageFile.ImageFile:
    return Image.OPEN[name][0](io.BytesIO(data), "")


def _stored(image: ImageFile.ImageFile, load: Callable[[], Image.Image] | None = None) -> Stored:
    def by_pillow() -> Image.Image:
        image.load()
        return to_rgb(image)

    return Stored(image.size, orientation_of(image), load or by_pillow)


def _open_webp(data: bytes) -> Stored:
    return _stored(_opened("WEBP", data))


def _open_gif(data: bytes) -> Stored:
    """Open the first frame of a GIF. Parts of the image outside the frame are transparent, as in viewers."""
    image = _opened("GIF", data)
    frame = image.tile[0].extents

    def load() -> Image.Image:
        image.load()
        rgb = to_rgb(image)
        if frame in (None, (0, 0, *rgb.size)):
            return rgb
        canvas = Image.new("RGB", rgb.size, "white")
        canvas.paste(rgb.crop(frame), frame)
        return canvas

    return _stored(image, load)


def _open_avif(data: bytes) -> Stored:
    try:
        image = _opened("AVIF", data)
    except Exception:
        # Pillow parses EXIF when it opens a file. Renaming the item to an unknown type makes it skip broken EXIF.
        hidden = re.sub(rb"(infe.{8,10})Exif", rb"\1none", data, flags=re.DOTALL)
        if hidden == data:
            raise
        image = _opened("AVIF", hidden)
    return _stored(image)


def _open_jpeg2000(data: bytes) -> Stored:
    """Open JPEG 2000. Pillow shifts components to 8 or 16 bits, accurate only if the shift is small for the range."""
    at = data.find(b"\xff\x4f\xff\x51")  # start of the codestream, and its size segment
    channels = int.from_bytes(data[at + 40 : at + 42], "big") if at >= 0 else 0
    depths = {(component & 127) + 1 for component in data[at + 42 : at + 42 + 3 * channels : 3]}
    signed = any(component & 128 for component in data[at + 42 : at + 42 + 3 * channels : 3])
    if signed or len(depths) > 1 or not depths <= set(range(8, 17)):
        raise ImageError(
            "unsupported",
            f"Got JPEG 2000 with {' and '.join(map(str, sorted(depths)))} {'signed ' if signed else ''}bits per "
            "sample, expected one unsigned depth of 8 to 16 bits for all channels.",
        )
    return _stored(_opened("JPEG2000", data))


def _open_pnm(data: bytes) -> Stored:
    """Open PNM. Pillow decodes PGM and PPM with an odd maximum pixel by pixel and rounds twice, so decode them here."""
    image = _opened("PPM", data)
    tile = image.tile[0]
    if tile.codec_name != "ppm" or not isinstance(tile.args, tuple):
        return _stored(image)
    maximum, offset = int(tile.args[1]), tile.offset
    shape = (image.height, image.width, 3 if image.mode == "RGB" else 1)

    def load() -> Image.Image:
        dtype = np.dtype(">u2" if maximum > 255 else "u1")
        samples: Samples = np.frombuffer(data, dtype, shape[0] * shape[1] * shape[2], offset).reshape(shape)
        if samples.max() > maximum:
            raise ImageError("corrupt", f"Got a sample of {samples.max()}, expected 0..{maximum} as in the header.")
        return _image(to_8_bits(samples, maximum))

    return _stored(image, load)


def _image(pixels: Samples) -> Image.Image:
    """uint8 [height, width, 1 or 3] -> RGB."""
    return Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _open_bmp(data: bytes) -> Stored:
    """Open BMP. Pillow drops a palette of grays, then infers the bits per pixel from the number of grays."""
    image = _opened("BMP", data)
    core = int.from_bytes(data[14:18], "little") == 12  # OS/2 header: 16-bit sides, no number of colours
    bits = int.from_bytes(data[24:26] if core else data[28:30], "little")
    colours = (0 if core else int.from_bytes(data[46:50], "little")) or 1 << bits
    tile = image.tile[0]
    if image.mode not in ("1", "L") or (tile.codec_name == "bmp_rle" and image.mode == "L"):
        return _stored(image)
    if tile.codec_name != "raw" or bits not in (1, 4, 8) or not isinstance(tile.args, tuple):
        raise ImageError("unsupported", f"Got a compressed BMP of {bits} bits in black and white, expected 1 bit.")
    height, width = image.height, image.width
    stride = (width * bits + 31) // 32 * 4
    offset, top_down = tile.offset, tile.args[-1] == 1
    table = np.zeros(256, np.uint8)  # indices without a colour are black
    table[:colours] = (0, 255)[:colours] if image.mode == "1" else np.arange(min(colours, 256))

    def load() -> Image.Image:
        rows = np.frombuffer(data, np.uint8, height * stride, offset).reshape(height, stride)
        gray = table[(rows if bits == 8 else unpack_bits(rows, bits, width))[:, :width]]
        return _image((gray if top_down else gray[::-1])[..., None])

    return _stored(image, load)


_OPENERS: dict[str, Callable[[bytes], Stored]] = {
    "JPEG": open_jpeg,
    "PNG": open_png,
    "WEBP": _open_webp,
    "GIF": _open_gif,
    "TIFF": open_tiff,
    "BMP": _open_bmp,
    "PPM": _open_pnm,
    "JPEG2000": _open_jpeg2000,
    "AVIF": _open_avif,
}

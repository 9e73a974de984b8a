"""An image file whose header has been read, and whose pixels have not."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile

__all__ = ["Stored", "orientation_of"]


class Stored(NamedTuple):
    """What a format's module gives for the bytes of a file.

    Attributes:
        size: (width, height) in pixels, as stored.
        orientation: EXIF's: how the stored image is turned for display, 1..8.
        load: decode the pixels: an RGB image of ``size`` (or as drafted), not turned.
        jpeg: the file Pillow will load, where it can be drafted.
    """

    size: tuple[int, int]
    orientation: int
    load: Callable[[], Image.Image]
    jpeg: ImageFile.ImageFile | None = None


def orientation_of(source: Image.Image | bytes) -> int:
    """The orientation in the EXIF of an opened image, or in EXIF's bytes; 1 if there is none that can be read."""
    try:
        if isinstance(source, bytes):
            exif = Image.Exif()
            exif.load(source)
        else:
            exif = source.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata around what may be a sound image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1

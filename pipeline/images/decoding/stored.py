"""An image file whose header has been read but not its pixels."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile

__all__ = ["Stored", "orientation_of"]


class Stored(NamedTuple):
    """An opened image file of any format.

    Attributes:
        size: (width, height) in pixels, as stored.
        orientation: EXIF orientation, 1..8.
        load: decodes the pixels to an RGB image of ``size`` (or as drafted), orientation not applied.
        jpeg: the file that Pillow will load, if it can be drafted.
    """

    size: tuple[int, int]
    orientation: int
    load: Callable[[], Image.Image]
    jpeg: ImageFile.ImageFile | None = None


def orientation_of(source: Image.Image | bytes) -> int:
    """EXIF orientation of an opened image, or of EXIF bytes; 1 if it is missing or cannot be read."""
    try:
        if isinstance(source, bytes):
            exif = Image.Exif()
            exif.load(source)
        else:
            exif = source.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata; the image itself may be intact
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1

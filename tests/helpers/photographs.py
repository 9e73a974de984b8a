"""Images and odd image files, made here so that nothing has to be downloaded."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    """Any Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """Smooth uint8 RGB [height, width, 3]: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 90)], -1).astype(
        np.uint8
    )


def photo(height: int = 48, width: int = 64, fmt: str = "JPEG", **options: Any) -> bytes:
    """A small RGB file."""
    return encode(Image.fromarray(gradient(height, width)), fmt, **options)


def orientation_exif(orientation: int) -> Image.Exif:
    """EXIF with nothing but an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes of pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def random_images(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Noise as uint8 [count, 3, height, width]."""
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_random_images(folder: Path, count: int, size: tuple[int, int] = (70, 80)) -> Path:
    """A new folder of PNG files of noise, "00.png" and so on, of (height, width) pixels."""
    folder.mkdir()
    for i, pixels in enumerate(random_images(count, size)):
        (folder / f"{i:02}.png").write_bytes(encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()), "PNG"))
    return folder

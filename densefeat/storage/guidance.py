"""Guidance images of compact stores: RGB images in JPEG, one chunk each. Requires Pillow."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.errors import StoreError, missing_package
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet

__all__ = ["CODECS", "QUALITY", "GuidanceImages", "decode_guidance", "encode_guidance", "guidance_nbytes"]

Pixels = npt.NDArray[np.uint8]

# Of training-free JBU's features of 16 photographs of COCO (Lite0, k = 64, 224 px): 0.99997 mean and 0.9995 worst
# percentile of cosine to those of the exact image, with 17 kB an image. Quality 95: 31 kB, 0.99999; lossless WebP: 72.
QUALITY = 85
# As in Zarr's metadata. The name is that of the package imagecodecs, whose codec decodes the chunks.
CODECS: list[dict[str, Any]] = [
    {"name": "imagecodecs_jpeg", "configuration": {"level": QUALITY, "subsampling": "444"}},
    {"name": "crc32c"},
]


def encode_guidance(pixels: Pixels) -> bytes:
    """Encode an image [H, W, 3] as a chunk: JPEG with all chroma pixels, then crc32c."""
    encoded = io.BytesIO()
    _pillow().fromarray(pixels, "RGB").save(encoded, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return layout.with_crc(encoded.getvalue())


def decode_guidance(data: bytes, size: tuple[int, int] | None = None) -> Pixels:
    """Decode a chunk: [H, W, 3].

    Args:
        data: the chunk.
        size: expected height and width, if known.

    Raises:
        MissingPackage: Pillow is not installed.
        ValueError: the checksum does not match, or the bytes are not an RGB image of this size.
    """
    body = layout.without_crc(data, "the guidance image")
    try:
        with _pillow().open(io.BytesIO(body), formats=["JPEG"]) as image:
            if image.mode != "RGB" or size not in (None, (image.height, image.width)):
                raise ValueError(f"got {image.mode} of {image.height}×{image.width}, expected RGB of {size}")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # Pillow raises these for damaged files
        raise ValueError(f"the guidance image does not decode: {error}") from error


class GuidanceImages:
    """The guidance images of a store, by row.

    Args:
        objects: the store.
        size: height and width of the images.
        shard_rows: rows of a shard.
    """

    def __init__(self, objects: Objects, size: tuple[int, int], shard_rows: int) -> None:
        self.size = size
        self._objects, self._shard_rows = objects, shard_rows
        # Shard -> [shard_rows, 2] int64, offset and size of each chunk, −1 where there is none: 16 bytes per row.
        self._places: dict[int, npt.NDArray[np.int64]] = {}

    def read(self, row: int) -> Pixels:
        """Read the image [H, W, 3] of a row: one request, and one more for the first row of a shard.

        Raises:
            FileNotFoundError: the object of its shard is missing.
            MissingPackage: Pillow is not installed.
            ValueError: the row has no image, or the object is damaged.
        """
        shard, place = divmod(row, self._shard_rows)
        key = layout.shard_key(shard, layout.GUIDANCE)
        if shard not in self._places:
            index = self._objects.get_range(key, 0, layout.shard_index_nbytes(self._shard_rows))
            places = layout.unpack_shard_index(index, self._shard_rows, index_first=True)
            self._places[shard] = np.array([(-1, -1) if one is None else one for one in places], dtype=np.int64)
        offset, nbytes = map(int, self._places[shard][place])
        if offset < 0:
            raise ValueError("there is no guidance image")
        data = self._objects.get_range(key, offset, offset + nbytes)
        if len(data) != nbytes:
            raise ValueError(f"{nbytes:,} bytes are recorded at {offset:,}, and the object has {len(data):,} there")
        return decode_guidance(data, self.size)


def guidance_nbytes(objects: Objects) -> int:
    """Bytes of the guidance images of a finished store, from its manifest; 0 if it is not finished.

    Raises:
        StoreError: the manifest is damaged.
    """
    try:
        manifest = read_parquet(objects.get(layout.MANIFEST))
        return sum(dict(companions or []).get(layout.GUIDANCE, {"nbytes": 0})["nbytes"]
                   for companions in manifest["companions"].to_pylist())  # fmt: skip
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError) as error:
        raise StoreError(f"{objects.uri}: {layout.MANIFEST} is damaged: {error}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise missing_package("a compact store", "Pillow", "compact") from error
    return Image

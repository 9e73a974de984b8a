"""Guidance images of compact stores: RGB images in JPEG, one chunk each. Requires Pillow."""

import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.errors import StoreError, missing_package
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet

__all__ = ["CODECS", "QUALITY", "GuidanceImages", "decode_guidance", "encode_guidance", "guidance_nbytes"]

Pixels = npt.NDArray[np.uint8]

QUALITY = 85  # costs the features less than their quantization does (benchmarks/store/encoding.py)
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

    def read(self, rows: Sequence[int], stop: threading.Event | None = None) -> list[bytes]:
        """Read the chunks of rows of one shard: one request, and one more for the first of a shard.

        Args:
            rows: their numbers.
            stop: once set, a failed request is not retried.

        Raises:
            FileNotFoundError: the object of the shard is missing.
            ValueError: a row has no image, or the object is damaged.
        """
        shard = rows[0] // self._shard_rows
        key = layout.shard_key(shard, layout.GUIDANCE)
        if shard not in self._places:
            index = self._objects.get_range(key, 0, layout.shard_index_nbytes(self._shard_rows), stop)
            found = layout.unpack_shard_index(index, self._shard_rows, index_first=True)
            self._places[shard] = np.array([(-1, -1) if one is None else one for one in found], dtype=np.int64)
        places = self._places[shard][[row % self._shard_rows for row in rows]]
        if (places < 0).any():
            raise ValueError(f"row {rows[int(np.argmax(places[:, 0] < 0))]} has no guidance image")
        start, end = int(places[:, 0].min()), int(places.sum(axis=1).max())
        data = self._objects.get_range(key, start, end, stop)
        if len(data) != end - start:
            raise ValueError(f"it ends within the {end - start:,} bytes at {start:,} that its index names")
        return [data[at - start : at - start + nbytes] for at, nbytes in places.tolist()]

    def decode(self, chunk: bytes) -> Pixels:
        """Decode a chunk: [H, W, 3]; errors as for `decode_guidance`."""
        return decode_guidance(chunk, self.size)


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

"""The on-disk layout, defined once: names, chunk and shard encoding, and how codes become floats.

A store is a Zarr v3 group with core codecs only, which any Zarr library can open::

    zarr.json                  attributes: format version, configuration and its hash, software versions
    features/                  [rows, k, H, W] int8 or float16; one chunk per image, one shard object per run of rows
    pca/                       mean [C], components [k, C], explained_variance [k], explained_variance_ratio [k]
    step                       [k] float32, int8 only: feature = code * step
    upsampler/                 arrays of an upsampler that was fitted to the images; multiview: bias [k, h, w]
    index.parquet              one record per row
    manifest.parquet           one record per shard, once all are done
    _ledger/000000.parquet     one file per finished shard; kept after the merge into the two files above
    _intents/                  while shards are written: the record of each, before it is valid

Chunks are encoded here rather than by zarr-python, because a shard is built in memory and written with one request; the
bytes are the same (tests/densefeat/test_store_names.py compares them).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.zstd
import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1

ATTRIBUTES = "zarr.json"
ATTRIBUTES_KEY = "densefeat"
FEATURES = "features"
PCA = "pca"
UPSAMPLER = "upsampler"
STEP = "step"
INDEX = "index.parquet"
MANIFEST = "manifest.parquet"
LEDGER = "_ledger"
INTENTS = "_intents"

ZSTD_LEVEL = 1  # higher levels cost time and gain little on quantized features
INT8_NO_DATA = -128  # the fill value; codes are -127 … 127
_ABSENT = 2**64 - 1  # marks a missing chunk in a shard index
_CRC_BYTES = 4


@dataclass(frozen=True)
class FeatureLayout:
    """Shape and sharding of the ``features`` array.

    Attributes:
        rows: number of images, including failed ones.
        components: k.
        height: of the stored features, in pixels.
        width: of the stored features, in pixels.
        dtype: ``"int8"`` or ``"float16"``.
        shard_rows: rows per shard object; the last shard may have fewer.
    """

    rows: int
    components: int
    height: int
    width: int
    dtype: str
    shard_rows: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[k, H, W] of one image's features."""
        return (self.components, self.height, self.width)

    @property
    def image_nbytes(self) -> int:
        """Bytes of one image's features before compression."""
        return self.components * self.height * self.width * np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> int:
        """Number of shard objects."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows in a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "FeatureLayout":
        """Read the layout from the array's ``zarr.json``.

        Raises:
            ValueError: the array was not written by this package.
        """
        try:
            grid, keys, codecs = (metadata[name] for name in ("chunk_grid", "chunk_key_encoding", "codecs"))
            shape, dtype, shard_shape = metadata["shape"], metadata["data_type"], grid["configuration"]["chunk_shape"]
            separator = keys.get("configuration", {}).get("separator", "/")
            (sharding,) = codecs
            chunk_shape, inner = (sharding["configuration"][name] for name in ("chunk_shape", "codecs"))
            names = [grid["name"], keys["name"], separator, sharding["name"], *(codec["name"] for codec in inner)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not the metadata of sharded features: {type(error).__name__}: {error}") from error
        if not _are_sizes(shape, 4) or not _are_sizes(shard_shape, 4):
            raise ValueError(f"expected 4 axes: got the shape {shape!r} in shards of {shard_shape!r}")
        rows, components, height, width = shape
        if shard_shape[1:] != shape[1:] or chunk_shape != [1, *shape[1:]]:
            raise ValueError(f"expected one image per chunk: got {chunk_shape!r}, in shards of {shard_shape!r}")
        if names != ["regular", "default", "/", "sharding_indexed", "bytes", "zstd", "crc32c"]:
            raise ValueError(f"expected shards of chunks in zstd with crc32c: got {names!r}")
        if dtype not in ("int8", "float16"):
            raise ValueError(f"expected int8 or float16: got {dtype!r}")
        return cls(rows, components, height, width, dtype, shard_shape[0])


def _are_sizes(shape: Any, axes: int) -> bool:
    return isinstance(shape, list) and len(shape) == axes and all(type(n) is int and n > 0 for n in shape)


def shard_key(shard: int) -> str:
    """Key of a shard object, in Zarr's default chunk key encoding."""
    return f"{FEATURES}/c/{shard}/0/0/0"


def ledger_key(shard: int) -> str:
    """Key of a shard's ledger record."""
    return f"{LEDGER}/{shard:06d}.parquet"


def intent_key(shard: int, sha256: str) -> str:
    """Key of the intent: the ledger record to be committed for a shard whose object has this digest."""
    return f"{INTENTS}/{shard:06d}-{sha256}.parquet"


def encode_chunk(features: npt.NDArray[Any]) -> bytes:
    """Encode one image's features [k, H, W] with the store's codecs: bytes (little endian) → zstd → crc32c."""
    little = features.astype(features.dtype.newbyteorder("<"), order="C", copy=False)
    return _with_crc(numcodecs.zstd.compress(little.reshape(-1).view(np.uint8), ZSTD_LEVEL))


def decode_chunk(data: bytes, layout: FeatureLayout, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Decode one image's features [k, H, W].

    Args:
        data: the encoded chunk.
        layout: of the store.
        out: contiguous array [k, H, W] of the store's type, which is filled and returned. None: a new, read-only one.

    Raises:
        ValueError: the checksum does not match, or the decoded size is wrong.
        RuntimeError: the body is not valid zstd.
    """
    body = _without_crc(data, "the chunk")
    if out is not None and sys.byteorder == "little" and _decoded_nbytes(body) == out.nbytes:
        numcodecs.zstd.decompress(body, out.reshape(-1).view(np.uint8))  # saves a copy, and the pages of a new array
        return out
    decoded = np.frombuffer(numcodecs.zstd.decompress(body), dtype=np.dtype(layout.dtype).newbyteorder("<"))
    codes = decoded.reshape(layout.image_shape)
    if out is None:
        return codes
    out[...] = codes
    return out


def _decoded_nbytes(body: bytes) -> int | None:
    """The size that the header of a zstd frame declares (RFC 8878, 3.1.1.1); None if it declares none.

    numcodecs fills a buffer that is too large in part, and reports no error.
    """
    if body[:4] != b"\x28\xb5\x2f\xfd" or len(body) < 5:
        return None
    size_flag, single_segment, dictionary = body[4] >> 6, body[4] >> 5 & 1, body[4] & 3
    if not (size_flag or single_segment):
        return None
    start = 5 + (not single_segment) + (0, 1, 2, 4)[dictionary]
    width = (1, 2, 4, 8)[size_flag]
    return int.from_bytes(body[start : start + width], "little") + (256 if width == 2 else 0)


def pack_shard(chunks: Sequence[bytes | None], shard_rows: int) -> tuple[bytes, list[tuple[int, int] | None]]:
    """Join encoded chunks (None: no data) into a shard object.

    Returns:
        The bytes of the object, and the (offset, size) in bytes of each of ``chunks`` in it.
    """
    index = np.full((shard_rows, 2), _ABSENT, dtype="<u8")
    places: list[tuple[int, int] | None] = []
    end = 0
    for i, chunk in enumerate(chunks):
        if chunk is None:
            places.append(None)
            continue
        index[i] = end, len(chunk)
        places.append((end, len(chunk)))
        end += len(chunk)
    body = [chunk for chunk in chunks if chunk is not None]
    return b"".join([*body, _with_crc(index.tobytes())]), places


def unpack_shard_index(data: bytes, shard_rows: int) -> list[tuple[int, int] | None]:
    """Read the index at the end of a shard object: (offset, size) of each chunk, None where there is no data.

    Raises:
        ValueError: the object is too short, or the checksum of the index does not match.
    """
    size = shard_rows * 16 + _CRC_BYTES
    if len(data) < size:
        raise ValueError(f"the shard object has {len(data)} bytes, fewer than the {size} of its index: it is truncated")
    index = np.frombuffer(_without_crc(data[-size:], "the shard index"), dtype="<u8").reshape(shard_rows, 2)
    return [None if offset == _ABSENT else (int(offset), int(nbytes)) for offset, nbytes in index]


def dequantize(codes: npt.NDArray[Any], step: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """Convert stored values [k, …] to float32: ``code * step`` for int8 (``step`` [k]), unchanged for float16."""
    if step is None:
        return codes.astype(np.float32)
    return codes * step.reshape(-1, *[1] * (codes.ndim - 1))


def _with_crc(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _without_crc(data: bytes, what: str) -> bytes:
    body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if google_crc32c.value(body) != crc:
        raise ValueError(f"{what} does not match its crc32c checksum: its bytes changed after they were written")
    return body

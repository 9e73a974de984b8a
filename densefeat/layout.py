"""The on-disk layout, defined once: names, chunk and shard encoding, and how codes become floats.

A store is a Zarr v3 group with core codecs only, which any Zarr library can open::

    zarr.json                  attributes: format version, configuration and its hash, software versions
    features/                  [rows, k, H, W] int8 or float16; one chunk per image, one shard object per run of rows
    pca/                       mean [C], components [k, C], explained_variance [k], explained_variance_ratio [k]
    step                       [k] float32, int8 only: feature = code * step
    upsampler/                 arrays of an upsampler that was fitted to the images; multiview: bias [k, h, w]
    guidance/                  [rows, H, W, 3] uint8, JPEG; compact stores only, whose features are at low resolution
    embedding/                 [rows, C] float16, only if asked for; one chunk per run of rows, NaN in failed ones
    index.parquet              one record per row
    manifest.parquet           one record per shard, once all are done
    _ledger/000000.parquet     one file per finished shard; kept after the merge into the two files above
    _ledger/blocks/            the same for runs of 256 shards, to be read at once
    _intents/                  while shards are written: the record of each, before it is valid
    _reports/                  one JSON file per run of a job, for people; nothing depends on them
    _jobs/                     one JSON file per job that is writing: the shards that it makes
    _growth/                   while rows are appended: the new index, and the last shard with its new rows
    README.md                  a card, for people
    _retired/                  the list of rows that are out of use, named after its digest

Chunks are encoded here rather than by zarr-python, because a shard is built in memory and written with one request; the
bytes are the same (tests/densefeat/test_store_names.py compares them).
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.zstd
import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
COMPACT_FORMAT_VERSION = 2  # of compact stores

ATTRIBUTES = "zarr.json"
ATTRIBUTES_KEY = "densefeat"
FEATURES = "features"
PCA = "pca"
UPSAMPLER = "upsampler"
STEP = "step"
GUIDANCE = "guidance"
EMBEDDING = "embedding"
COMPANIONS = (GUIDANCE, EMBEDDING)  # arrays that are written along with the features, if the store has them
INDEX = "index.parquet"
CARD = "README.md"
MANIFEST = "manifest.parquet"
LEDGER = "_ledger"
LEDGER_BLOCKS = "_ledger/blocks"
INTENTS = "_intents"
REPORTS = "_reports"
JOBS = "_jobs"
GROWTH = "_growth"
RETIRED = "_retired"
JOB_KEY = rf"{JOBS}/[0-9a-f]{{32}}\.json"  # pattern of what `job_key` makes
REPORT_KEY = rf"{REPORTS}/\d{{8}}T\d{{6}}Z-[0-9a-f]{{8}}\.json"  # pattern of what `report_key` makes

ZSTD_LEVEL = 1  # higher levels cost time and gain little on quantized features
INT8_NO_DATA = -128  # the fill value; codes are -127 … 127
BLOCK_SHARDS = 256  # whose records are in one block of the ledger
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


def shard_key(shard: int, array: str = FEATURES) -> str:
    """Key of a shard object of the features or of a companion, in Zarr's default chunk key encoding."""
    return f"{array}/c/{shard}/0" if array == EMBEDDING else f"{array}/c/{shard}/0/0/0"


def ledger_key(shard: int) -> str:
    """Key of a shard's ledger record."""
    return f"{LEDGER}/{shard:06d}.parquet"


def ledger_block_key(block: int) -> str:
    """Key of a block of the ledger."""
    return f"{LEDGER_BLOCKS}/{block:06d}.parquet"


def intent_key(shard: int, sha256: str) -> str:
    """Key of the intent: the ledger record to be committed for a shard whose object has this digest."""
    return f"{intent_prefix(shard)}{sha256}.parquet"


def intent_prefix(shard: int) -> str:
    """With which the keys of all intents of a shard begin."""
    return f"{INTENTS}/{shard:06d}-"


def report_key(moment: str, name: str) -> str:
    """Key of the report of a job's run.

    Args:
        moment: UTC of its end, as 20261231T235959Z.
        name: eight hex digits, so that two runs do not meet.
    """
    return f"{REPORTS}/{moment}-{name}.json"


def job_key(name: str) -> str:
    """Key of the lease of a job; ``name`` is 32 hex digits."""
    return f"{JOBS}/{name}.json"


def growth_key(rows: int) -> str:
    """Key of the claim to append rows to a store of ``rows`` rows."""
    return f"{GROWTH}/rows-{rows:09d}.parquet"


def grown_shard_key(shard: int, rows: int) -> str:
    """Key of the objects with which a shard will have ``rows`` rows, after rows were appended to it."""
    return f"{GROWTH}/shard-{shard:06d}-{rows}.npz"


def retired_key(sha256: str) -> str:
    """Key of the list of retired rows with this digest."""
    return f"{RETIRED}/{sha256}.parquet"


def encode_chunk(features: npt.NDArray[Any]) -> bytes:
    """Encode a chunk, such as one image's features [k, H, W]: bytes (little endian) → zstd → crc32c."""
    little = features.astype(features.dtype.newbyteorder("<"), order="C", copy=False)
    return with_crc(numcodecs.zstd.compress(little.reshape(-1).view(np.uint8), ZSTD_LEVEL))


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
    return decode_values(data, layout.dtype, layout.image_shape, out)


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


def decode_values(
    data: bytes, dtype: str, shape: Sequence[int], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Decode a chunk of any array, of this type and shape; ``out`` and errors as for `decode_chunk`."""
    body = without_crc(data, "the chunk")
    if out is not None and sys.byteorder == "little" and _decoded_nbytes(body) == out.nbytes:
        numcodecs.zstd.decompress(body, out.reshape(-1).view(np.uint8))  # saves a copy, and the pages of a new array
        return out
    decoded = np.frombuffer(numcodecs.zstd.decompress(body), dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)
    if out is None:
        return decoded
    out[...] = decoded
    return out


def pack_shard(
    chunks: Iterable[bytes | None], shard_rows: int, *, index_first: bool = False
) -> tuple[bytes, list[tuple[int, int] | None]]:
    """Join encoded chunks (None: no data) into a shard object.

    Args:
        chunks: of the rows, in order. Each is copied when it comes: an iterator that lets go of its chunks saves the
            memory of a second shard.
        shard_rows: rows of a full shard.
        index_first: whether the index is at the start of the object (Zarr's ``index_location``), or at its end.

    Returns:
        The bytes of the object, and the (offset, size) in bytes of each of ``chunks`` in it.
    """
    index = np.full((shard_rows, 2), _ABSENT, dtype="<u8")
    places: list[tuple[int, int] | None] = []
    packed = io.BytesIO()
    if index_first:
        packed.write(bytes(shard_index_nbytes(shard_rows)))
    for i, chunk in enumerate(chunks):
        if chunk is None:
            places.append(None)
            continue
        place = packed.tell(), len(chunk)
        index[i] = place
        places.append(place)
        packed.write(chunk)
    if index_first:
        packed.seek(0)
    packed.write(with_crc(index.tobytes()))
    return packed.getvalue(), places  # not a copy


def shard_index_nbytes(shard_rows: int) -> int:
    """Bytes of the index of a shard object."""
    return shard_rows * 16 + _CRC_BYTES


def unpack_shard_index(data: bytes, shard_rows: int, *, index_first: bool = False) -> list[tuple[int, int] | None]:
    """Read the index of a shard object: (offset, size) of each chunk, None where there is no data.

    Args:
        data: the object, or its part with the index.
        shard_rows: rows of a full shard.
        index_first: as in `pack_shard`.

    Raises:
        ValueError: the object is too short, or the checksum of the index does not match.
    """
    size = shard_index_nbytes(shard_rows)
    if len(data) < size:
        raise ValueError(f"the shard object has {len(data)} bytes, fewer than the {size} of its index: it is truncated")
    encoded = data[:size] if index_first else data[-size:]
    index = np.frombuffer(without_crc(encoded, "the shard index"), dtype="<u8").reshape(shard_rows, 2)
    return [None if offset == _ABSENT else (int(offset), int(nbytes)) for offset, nbytes in index]


def dequantize(codes: npt.NDArray[Any], step: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """Convert stored values [k, …] to float32: ``code * step`` for int8 (``step`` [k]), unchanged for float16."""
    if step is None:
        return codes.astype(np.float32)
    return codes * step.reshape(-1, *[1] * (codes.ndim - 1))


def with_crc(data: bytes) -> bytes:
    """Append the crc32c checksum, as the codec of that name does."""
    return data + int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def without_crc(data: bytes, what: str) -> bytes:
    """Remove the checksum, after checking it.

    Raises:
        ValueError: it does not match; the message begins with ``what``.
    """
    body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if google_crc32c.value(body) != crc:
        raise ValueError(f"{what} does not match its crc32c checksum: its bytes changed after they were written")
    return body


def configuration_sha256(configuration: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a store's configuration as canonical JSON."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def step_sha256(step: npt.NDArray[Any] | None) -> str | None:
    """SHA-256, in hex, of the quantization steps; None for float16."""
    return None if step is None else hashlib.sha256(step.astype("<f4").tobytes()).hexdigest()

"""The encoded chunks of a store: where they are, and how they are read and decoded."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.index import REPAIR, IndexedRows

__all__ = ["Chunk", "StoredChunks"]

Integers = npt.NDArray[np.int64]


class Chunk(NamedTuple):
    """What is stored of a row, encoded.

    Attributes:
        features: codes of the features, or of what a compact store has instead.
        guidance: the image that guides the last step, of compact stores that have one.
    """

    features: bytes
    guidance: bytes | None = None


class StoredChunks(IndexedRows):
    """The rows of a store, and their chunks. Base of `densefeat.rows.stored.StoredRows`."""

    def chunk_places(self, rows: Integers) -> tuple[Integers, Integers, Integers]:
        """Where chunks of rows with features are: [n] numbers of their shards, offsets there and sizes in bytes."""
        offsets, sizes = self._places
        return rows // self.layout.shard_rows, offsets[rows], sizes[rows]

    def read_chunks(self, rows: Sequence[int], stop: threading.Event | None = None) -> list[Chunk]:
        """Read the encoded chunks of rows of one shard with one request, which also fetches what lies between them.

        Args:
            rows: row numbers, 0 … len − 1, all in one shard.
            stop: once set, a failed request is not retried.

        Raises:
            MissingFeatures: a row failed, or the shard is not done.
            StoreError: the shard object is missing or too short, or the index is damaged.
        """
        offsets, sizes = (column[np.asarray(rows)] for column in self._places)
        if (offsets < 0).any() or (sizes <= 0).any():
            raise self._missing(
                *(row for row, at, size in zip(rows, offsets, sizes, strict=True) if at < 0 or size <= 0)
            )
        key = layout.shard_key(rows[0] // self.layout.shard_rows)
        start, end = int(offsets.min()), int((offsets + sizes).max())
        try:
            data = self._objects.get_range(key, start, end, stop)
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri}: the shard object {key} of row {rows[0]} is missing; {REPAIR}") from error
        chunks = []
        for row, at, size in zip(rows, offsets.tolist(), sizes.tolist(), strict=True):
            chunks.append(Chunk(data[at - start : at - start + size]))
            if len(chunks[-1].features) != size:
                raise StoreError(
                    f"{self.uri}: row {row} in {key} is damaged: {size:,} bytes are recorded at {at:,}, and the object "
                    f"has {len(chunks[-1].features):,} there; {REPAIR}"
                )
        return chunks

    def decode(self, row: int, chunk: Chunk, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Decode a chunk of `read_chunks`: [k, H, W] as stored (int8 or float16).

        Args:
            row: its row, for errors.
            chunk: encoded.
            out: contiguous array of the same shape and type, which is filled and returned. None: a new, read-only one.

        Raises:
            StoreError: the chunk is damaged.
        """
        try:
            return layout.decode_chunk(chunk.features, self.layout, out)
        except (ValueError, RuntimeError) as error:
            key = layout.shard_key(row // self.layout.shard_rows)
            raise StoreError(f"{self.uri}: row {row} in {key} is damaged: {error}; {REPAIR}") from error

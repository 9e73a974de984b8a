"""The stored values of rows: codes of features, or what a compact store keeps instead, and how to decode them."""

import math
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.errors import MissingPackage, StoreError, missing_package
from densefeat.rows.bilinear import interpolated
from densefeat.rows.chunks import Chunk, StoredChunks
from densefeat.rows.index import REPAIR
from densefeat.storage.guidance import GuidanceImages, guidance_nbytes
from densefeat.storage.metadata import (
    compact_attribute,
    embedding_channels,
    own_attributes,
    read_layout,
    read_root,
    read_small_array,
)
from densefeat.storage.objects import Objects

if TYPE_CHECKING:
    from densefeat.torch.last_step import LastStep

__all__ = ["StoredRows"]

Floats = npt.NDArray[np.float32]


class StoredRows(StoredChunks):
    """The rows of a store as they are stored. Base of ``FeatureStore``, which documents arguments and errors."""

    def __init__(self, uri: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        self.uri = os.fspath(uri)
        self._objects = Objects(self.uri, storage_options)
        root = read_root(self._objects)
        self.attributes = own_attributes(self.uri, root)
        if not self.attributes["setup_complete"]:
            raise StoreError(
                f"{self.uri} is still being set up; if the job that started it died, run it again with --resume"
            )
        self.layout = read_layout(self._objects, root)
        self.compact = compact_attribute(self.uri, self.attributes)
        self.shape = self.layout.image_shape
        if self.compact is not None:
            self.shape = (self.layout.components, *self.compact["size"])

    @cached_property
    def step(self) -> Floats | None:
        """[k] float32 for int8 stores: feature = code × step. None for float16.

        Raises:
            StoreError: the array is missing or damaged.
        """
        return self._array_of_k(layout.STEP) if self.layout.dtype == "int8" else None

    @cached_property
    def mean(self) -> Floats:
        """[C] float32: mean of the backbone's features."""
        return self.array(f"{layout.PCA}/mean")

    @cached_property
    def components(self) -> Floats:
        """[k, C] float32, orthonormal rows: the PCA basis."""
        return self._array_of_k(f"{layout.PCA}/components")

    def read_codes(self, row_or_key: int | str) -> npt.NDArray[Any]:
        """Read [k, H, W] as stored (int8 or float16, read-only array), to multiply by ``step`` on another device.

        Of a compact store: [k, h, w] before the last step.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: the row failed, or its shard is not done.
            StoreError: the row or the index is damaged.
        """
        row = self.row_of(row_or_key)
        (chunk,) = super().read_chunks([row])  # without guidance
        return self.decode(row, chunk)

    def read_chunks(self, rows: Sequence[int], stop: threading.Event | None = None) -> list[Chunk]:
        """As `StoredChunks.read_chunks`, with the guidance images of a compact store, for which a request more."""
        chunks = super().read_chunks(rows, stop)
        if self._guidance is None:
            return chunks
        guidance = self._read_guidance_chunks(rows, stop)
        return [Chunk(chunk.features, image) for chunk, image in zip(chunks, guidance, strict=True)]

    def _read_guidance_chunks(self, rows: Sequence[int], stop: threading.Event | None = None) -> list[bytes]:
        assert self._guidance is not None
        key = layout.shard_key(rows[0] // self.layout.shard_rows, layout.GUIDANCE)
        try:
            return self._guidance.read(rows, stop)
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri}: the object {key} of row {rows[0]} is missing; {REPAIR}") from error
        except ValueError as error:
            raise StoreError(f"{self.uri}: {key} is damaged: {error}; {REPAIR}") from error

    @property
    def has_guidance(self) -> bool:
        """Whether rows have an image that guides the last step: `read_guidance`."""
        return self._guidance is not None

    def read_guidance(self, row_or_key: int | str) -> npt.NDArray[np.uint8]:
        """Read the image that guides the last step of a compact store: RGB [H, W, 3] uint8, at the backbone's size.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: the row failed, or its shard is not done.
            MissingPackage: Pillow is not installed (extra ``compact``).
            StoreError: the store has no such images, or is damaged.
        """
        row = self.row_of(row_or_key)
        if self._guidance is None:
            raise StoreError(f"{self.uri} has no guidance images: only compact stores of guided upsamplers have them")
        if self._without_features([row]):
            raise self._missing(row)
        return self.decode_guidance(row, *self._read_guidance_chunks([row]))

    def decode_guidance(self, row: int, chunk: bytes) -> npt.NDArray[np.uint8]:
        """Decode a guidance image: [H, W, 3] uint8.

        Raises:
            MissingPackage: Pillow is not installed (extra ``compact``).
            StoreError: the chunk is damaged.
        """
        assert self._guidance is not None
        try:
            return self._guidance.decode(chunk)
        except ValueError as error:
            key = layout.shard_key(row // self.layout.shard_rows, layout.GUIDANCE)
            raise StoreError(f"{self.uri}: row {row} in {key} is damaged: {error}; {REPAIR}") from error

    def read_values(self, row_or_key: int | str) -> tuple[npt.NDArray[Any], Floats | None]:
        """Read [k, H, W], and the step [k] to multiply it by: the codes of a dense store, which need no conversion yet.

        Of a compact store: float32 after the last step, and None, as for float16.

        Raises:
            KeyError, IndexError, TypeError, MissingFeatures, StoreError: as `read_codes`.
            MissingPackage: torch or Pillow is not installed, which compact stores need (extra ``compact``) unless
                their last step is an interpolation.
        """
        row = self.row_of(row_or_key)
        return self.values(row, *self.read_chunks([row]))

    def values(self, row: int, chunk: Chunk) -> tuple[npt.NDArray[Any], Floats | None]:
        """Decode a chunk of `read_chunks` to values and their step, as `read_values`."""
        codes = self.decode(row, chunk)
        if self.compact is None:
            return codes, self.step
        values = layout.dequantize(codes, self.step)
        if self._interpolates:
            return interpolated(values, self.shape[1:]), None
        assert self.last_step is not None
        guidance = None if chunk.guidance is None else self.decode_guidance(row, chunk.guidance)
        return self.last_step.on_arrays(values, guidance), None

    @property
    def _interpolates(self) -> bool:
        """Whether the last step is bilinear interpolation without antialiasing, which needs no torch."""
        sizes = zip(self.layout.image_shape[1:], self.shape[1:], strict=True)
        bilinear = self.compact is not None and self.compact["last_step"] == {"name": "bilinear"}
        return bilinear and all(old <= 2 * new for old, new in sizes)

    @cached_property
    def last_step(self) -> "LastStep | None":
        """The step that a compact store's readers take, as a module of torch; None for a dense store.

        Raises:
            MissingPackage: torch is not installed (extra ``compact``).
            StoreError: this version of densefeat does not know the step.
        """
        if self.compact is None:
            return None
        try:
            from densefeat.torch.last_step import LastStep  # imports torch, which dense stores do not need
        except MissingPackage:
            raise missing_package("a compact store", "PyTorch", "compact") from None
        try:
            return LastStep.of(self.compact)
        except ValueError as error:
            raise StoreError(f"{self.uri}: {error}") from error

    @cached_property
    def _guidance(self) -> GuidanceImages | None:
        if self.compact is None or "guidance" not in self.compact:
            return None
        height, width = self.compact["guidance"]
        return GuidanceImages(self._objects, (height, width), self.layout.shard_rows)

    @cached_property
    def _embedding_channels(self) -> int | None:
        return embedding_channels(self._objects, self.layout)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all rows that are done, as stored; for a compact store with its guidance images.

        Over http, which has no listings, the guidance of an unfinished store is not counted.
        """
        features = int(self._places[1].clip(0).sum())
        if self._guidance is None:
            return features
        if self._objects.can_list:
            return features + sum(self._objects.list(f"{layout.GUIDANCE}/c").values())
        return features + guidance_nbytes(self._objects)

    @property
    def uncompressed_nbytes(self) -> int:
        """Bytes of one row's features, were they stored densely and not compressed."""
        return math.prod(self.shape) * np.dtype(self.layout.dtype).itemsize

    def array(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Read a small array of the store as ``dtype``, e.g. ``"pca/explained_variance"``.

        Raises:
            StoreError: the array, or a part of it, is missing or damaged.
        """
        return read_small_array(self._objects, name, dtype)

    def _array_of_k(self, name: str) -> Floats:
        """Read an array whose first axis has one entry per component."""
        array = self.array(name)
        if array.shape[:1] != (self.layout.components,):
            raise StoreError(
                f"{self.uri}: the array {name} is damaged: its shape is {array.shape}, expected "
                f"{self.layout.components} components"
            )
        return array

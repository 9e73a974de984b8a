"""Turn references into decoded batches: reads and decodes ahead of the consumer."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor

from densefeat.errors import StorageUnavailable
from pipeline.errors import ImageError
from pipeline.images.decoding.decode import Decoded, Geometry, decode
from pipeline.images.reading.read import read_images
from pipeline.reporting.seconds import StageSeconds
from schemas.configuration import SourceKind

_READERS = 64  # threads, which mostly wait: with requests of 150 ms, 427 per second
_PLACEHOLDER_GREY = 128  # pixel value of failed rows: they are computed with their batch, then discarded


@dataclass
class Batch:
    """A batch of consecutive rows.

    Attributes:
        pixels: uint8 [B, 3, H, W]. Failed rows keep their position, so the features of other rows do not depend on
            them.
        decoded: one entry per row: the decoded image, or the error.
    """

    pixels: Tensor
    decoded: list[Decoded | ImageError]

    def rows(self, start: int, end: int) -> "Batch":
        """Some of the rows."""
        return Batch(self.pixels[start:end], self.decoded[start:end])

    @property
    def usable_rows(self) -> Tensor:
        """Mask [B] bool of the rows that were decoded."""
        return torch.tensor([isinstance(image, Decoded) for image in self.decoded])

    def valid_cells(self, grid: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
        """Mask [B, h, w] bool of the feature-grid cells whose centre lies on the image, not on padding.

        Args:
            grid: (h, w).
            output_size: (height, width) of the grid in which the valid boxes are given.
        """
        y, x = ((torch.arange(cells) + 0.5) * (pixels / cells) for cells, pixels in zip(grid, output_size, strict=True))
        valid = torch.zeros(len(self.decoded), *grid, dtype=torch.bool)
        for i, image in enumerate(self.decoded):
            if isinstance(image, Decoded):
                y0, x0, y1, x1 = image.valid_box
                valid[i] = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
        return valid


class WorkStopped(Exception):  # noqa: N818 - says what happened
    """The work was asked to stop; this is not a failure."""


class Loader(Protocol):
    """Turns references into batches."""

    @property
    def stop(self) -> threading.Event:
        """As in `BatchLoader`."""

    def batches(
        self, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str] = MappingProxyType({})
    ) -> Iterator[Batch]:
        """As in `BatchLoader`."""


class BatchLoader:
    """Produces batches; its thread pools are shared by all shards that the worker processes.

    Args:
        geometry: target of decoding.
        batch_size: rows per batch; the last one may have fewer.
        source_kind: ``Source.kind``.
        image_column: ``Source.image_column``.
        max_pixels: see ``decode``.
        min_side: see ``decode``.
        threads: number of decoding threads.

    Attributes:
        stop: once set, no further batch is produced and all reads in progress, including waits for a storage, end at
            once with ``StorageUnavailable``.
    """

    def __init__(
        self,
        geometry: Geometry,
        batch_size: int,
        *,
        source_kind: SourceKind,
        image_column: str | None,
        max_pixels: int,
        min_side: int,
        threads: int,
    ) -> None:
        self.geometry = geometry
        self.batch_size = batch_size
        self._source_kind = source_kind
        self._image_column = image_column
        self._limits = {"max_pixels": max_pixels, "min_side": min_side}
        self._readers = ThreadPoolExecutor(max(_READERS, threads), "read")
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self.stop = threading.Event()

    def batches(
        self, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str] = MappingProxyType({})
    ) -> Iterator[Batch]:
        """Yield the rows of ``references`` in batches, in order; at most two are decoded ahead of the consumer.

        Args:
            references: the rows.
            seconds: the time of reading and decoding is added.
            crashed: position in ``references`` -> reason, of rows that are not to be read: they fail.

        Raises:
            StorageUnavailable, JobError: see ``read_images``; the state of the remaining images is unknown.
            WorkStopped: ``stop`` was set before the next batch.
        """
        reads = self._reads(references, seconds, crashed)
        pending: deque[Future[Decoded | ImageError]] = deque()
        while True:
            for data in islice(reads, 2 * self.batch_size - len(pending)):
                pending.append(self._decoders.submit(self._decode, data, seconds))
            if not pending:
                return
            if self.stop.is_set():
                raise WorkStopped
            yield self._stack([pending.popleft().result() for _ in range(min(self.batch_size, len(pending)))])

    def _reads(
        self, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str]
    ) -> Iterator[bytes | ImageError]:
        rows = range(references.num_rows)
        if crashed:
            references = references.take(pa.array([row for row in rows if row not in crashed], pa.int64()))
        images = self._kept_reads(references, seconds)
        for row in rows:
            yield ImageError("crashed", crashed[row]) if row in crashed else next(images)

    def _kept_reads(self, references: pa.Table, seconds: StageSeconds) -> Iterator[bytes | ImageError]:
        images = read_images(
            references, image_column=self._image_column, kind=self._source_kind, pool=self._readers, stop=self.stop
        )
        while True:
            with seconds.stage("read"):  # counts only the waiting; most reading overlaps with other work
                try:
                    data = next(images, None)
                except StorageUnavailable:
                    if self.stop.is_set():  # the read was stopped; the storage is not down
                        raise WorkStopped from None
                    raise
            if data is None:
                return
            yield data

    def _decode(self, data: bytes | ImageError, seconds: StageSeconds) -> Decoded | ImageError:
        if isinstance(data, ImageError):
            return data
        with seconds.stage("decode"):
            try:
                return decode(data, self.geometry, **self._limits)
            except ImageError as error:
                return error

    def _stack(self, decoded: list[Decoded | ImageError]) -> Batch:
        pixels = torch.full((len(decoded), 3, *self.geometry.size), _PLACEHOLDER_GREY, dtype=torch.uint8)
        for i, image in enumerate(decoded):
            if isinstance(image, Decoded):
                pixels[i] = torch.from_numpy(image.pixels)
        return Batch(pixels, decoded)

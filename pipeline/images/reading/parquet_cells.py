"""Stream the cells of a Parquet image column from the row groups that are needed."""

import io
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from densefeat.storage.parquet import cell_content
from pipeline.errors import ImageError
from pipeline.images.listing.inline import inline_image, is_inline_image
from pipeline.images.listing.names import escaped
from pipeline.images.reading.fetch import Fetch, Outcome

__all__ = ["Reference", "read_batches"]

# Read size; a column chunk may have hundreds of megabytes.
_BUFFER_BYTES = 4 << 20
_LONGEST_URI = 8192  # characters; signed URLs have thousands


class Reference(NamedTuple):
    """A row of ``Source.references`` without key and label."""

    uri: str
    offset: int | None
    nbytes: int | None


def read_batches(
    rows: Sequence[Reference], column: str, fetch: Fetch, batch_size: int
) -> Iterator[list[Outcome | str]]:
    """Yield the cells of ``rows`` in order, at most ``batch_size`` at a time.

    Only row groups that contain a requested row are read, each from its start to the last row needed, by range
    requests that are retried like those for images.

    Args:
        rows: references into Parquet files; ``offset`` is the row in the file.
        column: name of a column of type binary, string, or ``struct<bytes, path>``.
        fetch: reads ranges, and limits the bytes of an image.
        batch_size: maximum number of rows per list.

    Yields:
        For every row the image's bytes, the absolute URI to read them from, or an ``ImageError``.

    Raises:
        Exception: see ``Fetch``.
    """
    for run in _runs(rows):
        uri, numbers = run[0].uri, [row.offset or 0 for row in run]
        done = 0
        try:
            for cells in _stream(uri, numbers, column, fetch, batch_size):
                done += len(cells)
                yield cells
        except Exception as error:  # from pyarrow, or from any storage package
            yield [fetch.outcome(uri, error)] * (len(run) - done)


def _runs(rows: Sequence[Reference]) -> Iterator[list[Reference]]:
    """Split rows into runs that one pass over a file can read: same file, rows ascending."""
    run: list[Reference] = []
    for row in rows:
        if row.offset is None:
            raise ValueError(f"read_images: got a row of {row.uri} without offset, expected its row in the file.")
        if run and (row.uri != run[0].uri or row.offset <= (run[-1].offset or 0)):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _stream(
    uri: str, numbers: Sequence[int], column: str, fetch: Fetch, batch_size: int
) -> Iterator[list[Outcome | str]]:
    """Read the rows ``numbers`` (ascending) in one pass over a file; raises any error of the storage or pyarrow."""
    raw = io.BufferedReader(_Ranges(uri, fetch), _BUFFER_BYTES)
    # No pre_buffer: it would hold whole column chunks in memory.
    with raw, pq.ParquetFile(raw, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        if numbers[-1] >= file.metadata.num_rows:
            raise EOFError(f"row {numbers[-1]} was listed, but the file has {file.metadata.num_rows}: it has changed")
        groups, in_groups = _groups(file.metadata, numbers)
        wanted, missing = frozenset(numbers), len(numbers)
        for batch in file.iter_batches(batch_size, row_groups=groups, columns=[column], use_threads=False):
            # The batch must come first in zip: otherwise its end would consume one row number too many.
            cells = [
                _cell(value, uri, fetch) for value, n in zip(batch.column(0), in_groups, strict=False) if n in wanted
            ]
            missing -= len(cells)
            if cells:
                yield cells
            if not missing:
                return


class _Ranges(io.RawIOBase):
    """A file object whose every read is a fetched range: with retries, and complete or an error."""

    def __init__(self, uri: str, fetch: Fetch) -> None:
        self._uri, self._fetch = uri, fetch
        self._size, self._position = fetch.size(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        end = min(start + len(buffer), self._size)
        if start >= end:
            return 0
        data = self._fetch.read(self._uri, start, end, end - start)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _groups(metadata: pq.FileMetaData, numbers: Sequence[int]) -> tuple[list[int], Iterator[int]]:
    """The row groups that contain any of the rows, and the numbers of all their rows, in order."""
    groups, ranges = [], []
    first = 0
    for group in range(metadata.num_row_groups):
        end = first + metadata.row_group(group).num_rows
        if bisect_left(numbers, first) < bisect_left(numbers, end):
            groups.append(group)
            ranges.append(range(first, end))
        first = end
    return groups, chain.from_iterable(ranges)


def _cell(value: pa.Scalar, parquet_uri: str, fetch: Fetch) -> Outcome | str:
    content = cell_content(value)
    if content is None:
        return ImageError("unreadable", f"{parquet_uri}: the row's image is null.")
    if not isinstance(content, str):
        return fetch.check(content, parquet_uri)
    if is_inline_image(content):
        if len(content) * 3 // 4 > fetch.max_bytes:
            message = f"{parquet_uri}: an image of {len(content)} characters, more than max_bytes={fetch.max_bytes}."
            return ImageError("too_large", message)
        try:
            return fetch.check(inline_image(content), parquet_uri)
        except ValueError as error:
            return ImageError("corrupt", f"{parquet_uri}: the row's image is text, but {error}.")
    if len(content) > _LONGEST_URI:
        return ImageError(
            "unreadable",
            f"{parquet_uri}: the row's image is a text of {len(content)} characters, {content[:40]!r}…; expected a "
            "path, a URI, or a base64 image.",
        )
    if "://" in content:
        return content
    path = escaped(content)
    return path if path.startswith("/") else f"{parquet_uri.rpartition('/')[0]}/{path}"

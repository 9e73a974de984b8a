"""Read the encoded bytes of referenced images, ahead of the consumer."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from densefeat.storage.places import is_local
from densefeat.storage.retries import PATIENCE_S
from pipeline.errors import ImageError
from pipeline.images.reading.bounds import Bounds, Stop
from pipeline.images.reading.fetch import Fetch, Outcome
from pipeline.images.reading.parquet_cells import Reference, read_batches
from pipeline.images.reading.tar_members import read_member
from schemas.configuration import SourceKind

__all__ = ["read_images"]

_MAX_BYTES = 512 << 20
# Reading a gap of this size costs less than a second request.
_GAP_BYTES = 64 << 10
_RUN_BYTES = 16 << 20


_Cell = Outcome | str  # str: the URI to read the image from


class _Range(NamedTuple):
    """Byte range (half open) of a member's data in a tar."""

    uri: str
    start: int
    end: int


class _Task(NamedTuple):
    """Work for the pool that returns the outcomes of consecutive rows."""

    num_rows: int
    fetch: Callable[[], list[Outcome]]


def read_images(
    references: pa.Table,
    *,
    image_column: str | None,
    kind: SourceKind,
    pool: Executor,
    ahead: int = 16,
    max_bytes: int = _MAX_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    patience_s: float = PATIENCE_S,
    bounds: Bounds | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Outcome]:
    """Yield the encoded bytes of every row, in order, while later ones are fetched.

    Requests to a storage that does not answer are retried for `patience_s`; after that an error is raised instead of
    returning outcomes, because the state of the images is unknown. Filesystems are opened in the process that iterates,
    so a table of references can be sent to another process. Closing the iterator early cancels pending work and ends
    every wait.

    Args:
        references: a slice of ``Source.references``.
        image_column: ``Source.image_column``; required for Parquet.
        kind: ``Source.kind``.
        pool: threads that fetch; their tasks never wait for each other.
        ahead: number of rows held or being fetched beyond the consumer's current one.
        max_bytes: images with more encoded bytes are not fetched.
        storage_options: keyword arguments for the filesystem of the references.
        patience_s: how long to retry after the first failure.
        bounds: time limits of each request; by default those of `Bounds`.
        stop: when set, ends the iteration with `StorageUnavailable`.

    Returns:
        An iterator with one item per row: ``bytes`` (``b""`` for an empty file), or an ``ImageError`` with the status
        ``unreadable``, ``too_large`` or ``corrupt`` (damaged base64), which is returned, not raised.

    Raises:
        ValueError: ``ahead`` is below 1, or ``image_column`` is missing for Parquet; (while iterating) a row of a tar
            or of Parquet has no offset.
        StorageUnavailable: (while iterating) the storage of the next image did not answer, or its folder is gone.
        JobError: (while iterating) credentials are missing or expired, or a package is missing.
    """
    if ahead < 1:
        raise ValueError(f"read_images: got ahead={ahead}, expected at least 1 row.")
    if kind == "parquet" and image_column is None:
        raise ValueError("read_images: got image_column=None for Parquet, expected Source.image_column.")
    columns = (references[name].to_pylist() for name in ("uri", "offset", "nbytes"))
    rows = [Reference(*values) for values in zip(*columns, strict=True)]
    ended = Stop(stop)
    fetch = Fetch(
        rows[0].uri if rows else "",
        max_bytes,
        storage_options,
        patience_s=patience_s,
        bounds=bounds,
        stop=ended,
        folder=_common_folder(rows),
    )
    if kind == "parquet":
        # Up to half of the rows ahead are in two batches: the one being read and the one being yielded.
        batch_size = max(1, ahead // 4)
        batches = _read_ahead(read_batches(rows, str(image_column), fetch, batch_size), pool)
        tasks = (_Task(1, partial(_fetch_cell, cell, fetch)) for batch in batches for cell in batch)
        return _in_order(tasks, pool, max(1, ahead - 2 * batch_size), ended)
    if kind == "tar":
        return _in_order(_tar_tasks(rows, fetch, max_rows=max(1, ahead // 2)), pool, ahead, ended)
    return _in_order((_Task(1, partial(_fetch_file, row, fetch)) for row in rows), pool, ahead, ended)


def _common_folder(rows: list[Reference]) -> str | None:
    """The lowest folder that contains all rows, if all are local; else None."""
    folders = {row.uri.rpartition("/")[0] for row in rows}
    if not folders or not all(map(is_local, folders)):
        return None
    return os.path.commonpath(folder or "/" for folder in folders)


def _in_order(tasks: Iterable[_Task], pool: Executor, ahead: int, ended: Stop) -> Iterator[Outcome]:
    """Run tasks in the pool and yield their outcomes in order; at most ``ahead`` rows run ahead of the consumer."""
    waiting = iter(tasks)
    task = next(waiting, None)
    running: deque[Future[list[Outcome]]] = deque()
    ready: deque[Outcome] = deque()
    held = 0
    try:
        while task is not None or held:
            while task is not None and (held == 0 or held + task.num_rows <= ahead + 1):
                running.append(pool.submit(task.fetch))
                held += task.num_rows
                task = next(waiting, None)
            if not ready:
                ready.extend(running.popleft().result())
            held -= 1
            yield ready.popleft()
    finally:
        ended.set()
        for future in running:
            future.cancel()


def _fetch_file(row: Reference, fetch: Fetch) -> list[Outcome]:
    return [fetch(row.uri, nbytes=row.nbytes)]


def _fetch_cell(cell: _Cell, fetch: Fetch) -> list[Outcome]:
    return [fetch(cell) if isinstance(cell, str) else cell]


def _read_ahead(batches: Iterator[list[_Cell]], pool: Executor) -> Iterator[list[_Cell]]:
    """Read the next batch in the pool while the current one is consumed."""
    future = pool.submit(next, batches, None)
    while (batch := future.result()) is not None:
        future = pool.submit(next, batches, None)
        yield batch


def _tar_tasks(rows: Iterable[Reference], fetch: Fetch, *, max_rows: int) -> Iterator[_Task]:
    """Merge neighbouring members of a tar into one range request."""
    run: list[_Range] = []
    for row in rows:
        if row.offset is None:
            raise ValueError(f"read_images: got a row of {row.uri} without offset, expected it for a tar.")
        if row.nbytes is None:  # not a single byte range
            if run:
                yield _Task(len(run), partial(_fetch_run, run, fetch))
                run = []
            yield _Task(1, partial(_fetch_member, row.uri, row.offset, fetch))
            continue
        member = _Range(row.uri, row.offset, row.offset + row.nbytes)
        if run and (len(run) == max_rows or not _joins(run, member, fetch.max_bytes)):
            yield _Task(len(run), partial(_fetch_run, run, fetch))
            run = []
        run.append(member)
    if run:
        yield _Task(len(run), partial(_fetch_run, run, fetch))


def _fetch_member(uri: str, header: int, fetch: Fetch) -> list[Outcome]:
    return [read_member(uri, header, fetch)]


def _joins(run: list[_Range], member: _Range, max_bytes: int) -> bool:
    return (
        member.uri == run[0].uri
        and 0 <= member.start - run[-1].end <= _GAP_BYTES
        and member.end - run[0].start <= min(_RUN_BYTES, max_bytes)
    )


def _fetch_run(run: list[_Range], fetch: Fetch) -> list[Outcome]:
    uri, start, end = run[0].uri, run[0].start, run[-1].end
    data = fetch(uri, start=start, end=end, nbytes=end - start)
    if isinstance(data, ImageError):
        return [data] * len(run)
    return [_member(data, member, start) for member in run]


def _member(data: bytes, member: _Range, start: int) -> Outcome:
    image = data[member.start - start : member.end - start]
    if len(image) < member.end - member.start:
        return ImageError(
            "unreadable",
            f"{member.uri} has changed or is truncated: got {len(image)} of the {member.end - member.start} bytes at "
            f"byte {member.start}.",
        )
    return image

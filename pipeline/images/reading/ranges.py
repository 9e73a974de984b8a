"""One try to read an object, or a range of it, from any file system, within bounds of time and size."""

import os
import stat
import threading
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.storage.failures import http_status
from pipeline.images.reading.bounds import Bounds, TooLarge, run_bounded
from pipeline.images.reading.http import read_http

__all__ = ["object_size", "read_bytes"]


class _CutShortError(ConnectionError):
    """Fewer bytes came than there are, without an error."""


def read_bytes(
    filesystem: AbstractFileSystem,
    path: str,
    start: int | None,
    end: int | None,
    *,
    limit: int,
    expected: int | None,
    bounds: Bounds,
    stop: threading.Event,
) -> bytes:
    """All of an object, or its bytes from ``start`` (inclusive) to ``end`` (exclusive).

    Args:
        filesystem: where it is.
        path: there.
        start: None, with ``end``, for all of it.
        end: fewer bytes come only where the object ends before.
        limit: of bytes, for all of it.
        expected: how many bytes there should be, if known; fewer are only believed if the object ends there.
        bounds: of time; for a file system that has none of its own (local, in memory), they do not apply.
        stop: ends the wait for an answer.

    Raises:
        TooLarge: there are more than ``limit`` bytes.
        TimeoutError: no complete answer in time.
        Exception: what the storage raises.
    """
    if isinstance(filesystem, LocalFileSystem):
        return _read_local(path, start, end, limit)
    data = _read_remote(filesystem, path, start, end, limit, expected, bounds, stop)
    if start is None and len(data) > limit:
        raise TooLarge(None)
    if expected is not None and len(data) < expected:
        filesystem.invalidate_cache()  # of listings
        size = object_size(filesystem, path, bounds, stop)
        if size is None or size > (start or 0) + len(data):
            raise _CutShortError(f"got {len(data)} of {expected} bytes, and then no more")
    return data


def object_size(filesystem: AbstractFileSystem, path: str, bounds: Bounds, stop: threading.Event) -> int | None:
    """Bytes of an object; None if its storage does not say.

    Raises:
        Exception: what the storage raises.
    """
    if not _is_async(filesystem):
        size: int | None = filesystem.size(path)
        return size
    try:
        info: dict[str, Any] = run_bounded(filesystem, filesystem._info(path), bounds.for_bytes(0), stop)
    except Exception as error:
        if http_status(error) in (400, 403):  # the answer to HEAD has no body that says why: expired, or forbidden
            run_bounded(filesystem, filesystem._cat_file(path, start=0, end=1), bounds.for_bytes(0), stop)
        raise
    return info.get("size")


def _read_local(path: str, start: int | None, end: int | None, limit: int) -> bytes:
    status = os.stat(path)  # noqa: PTH116 - before it is opened: a pipe would make that wait for ever
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    first = start or 0
    count = max(0, (status.st_size if end is None else min(end, status.st_size)) - first)
    if start is None and count > limit:
        raise TooLarge(count)
    with open(path, "rb") as file:  # noqa: PTH123 - a string
        file.seek(first)
        return file.read(count)


def _read_remote(
    filesystem: AbstractFileSystem,
    path: str,
    start: int | None,
    end: int | None,
    limit: int,
    expected: int | None,
    bounds: Bounds,
    stop: threading.Event,
) -> bytes:
    if _is_http(filesystem):
        return run_bounded(filesystem, read_http(filesystem, path, start, end, limit, bounds), bounds.in_all_s, stop)
    try:
        if _is_async(filesystem):
            # A range, for all of it too: a bound on the answer, and no request before it that asks for the size.
            work = filesystem._cat_file(path, start=start or 0, end=limit + 1 if end is None else end)
            seconds = bounds.in_all_s if expected is None else bounds.for_bytes(expected)
            return bytes(run_bounded(filesystem, work, seconds, stop))
        if expected is None:
            start, end = start or 0, limit + 1 if end is None else end
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except Exception as error:
        if http_status(error) == 416:  # there is nothing from the start on: an empty object, or the end of one
            return b""
        raise


def _is_async(filesystem: AbstractFileSystem) -> bool:
    return bool(filesystem.async_impl) and not filesystem.asynchronous


def _is_http(filesystem: AbstractFileSystem) -> bool:
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple | list) else (filesystem.protocol,)
    return "http" in protocols and hasattr(filesystem, "set_session")

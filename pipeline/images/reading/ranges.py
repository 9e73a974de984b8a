"""Read an object, or a range of it, from any file system once, with limits on time and size."""

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
    """Fewer bytes were received than the object has, without an error."""


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
    """Read a whole object, or its bytes from ``start`` (inclusive) to ``end`` (exclusive).

    Args:
        filesystem: of the object.
        path: of the object.
        start: start of the range; None, as ``end``, for the whole object.
        end: end of the range; fewer bytes are returned only if the object ends before it.
        limit: maximum number of bytes of a whole object.
        expected: expected number of bytes, if known; fewer are accepted only if the object ends there.
        bounds: time limits; not applied to synchronous file systems (local, in memory).
        stop: ends the wait for a response.

    Raises:
        TooLarge: the whole object has more than ``limit`` bytes.
        TimeoutError: no complete response in time.
        Exception: any error of the storage.
    """
    if isinstance(filesystem, LocalFileSystem):
        return _read_local(path, start, end, limit)
    data = _read_remote(filesystem, path, start, end, limit, expected, bounds, stop)
    if start is None and len(data) > limit:
        raise TooLarge(None)
    if expected is not None and len(data) < expected:
        filesystem.invalidate_cache()  # cached listings
        size = object_size(filesystem, path, bounds, stop)
        if size is None or size > (start or 0) + len(data):
            raise _CutShortError(f"incomplete response: got {len(data)} of {expected} bytes")
    return data


def object_size(filesystem: AbstractFileSystem, path: str, bounds: Bounds, stop: threading.Event) -> int | None:
    """Size of an object in bytes; None if the storage does not report it.

    Raises:
        Exception: any error of the storage.
    """
    if not _is_async(filesystem):
        size: int | None = filesystem.size(path)
        return size
    try:
        info: dict[str, Any] = run_bounded(filesystem, filesystem._info(path), bounds.for_bytes(0), stop)
    except Exception as error:
        if http_status(error) in (400, 403):  # HEAD has no body that gives the reason (expired or forbidden): use GET
            run_bounded(filesystem, filesystem._cat_file(path, start=0, end=1), bounds.for_bytes(0), stop)
        raise
    return info.get("size")


def _read_local(path: str, start: int | None, end: int | None, limit: int) -> bytes:
    status = os.stat(path)  # noqa: PTH116 - before opening: opening a pipe would block forever
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
            # Always request a range: it limits the response, and avoids a request for the size.
            work = filesystem._cat_file(path, start=start or 0, end=limit + 1 if end is None else end)
            seconds = bounds.in_all_s if expected is None else bounds.for_bytes(expected)
            return bytes(run_bounded(filesystem, work, seconds, stop))
        if expected is None:
            start, end = start or 0, limit + 1 if end is None else end
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except Exception as error:
        if http_status(error) == 416:  # the range begins at or after the end of the object
            return b""
        raise


def _is_async(filesystem: AbstractFileSystem) -> bool:
    return bool(filesystem.async_impl) and not filesystem.asynchronous


def _is_http(filesystem: AbstractFileSystem) -> bool:
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple | list) else (filesystem.protocol,)
    return "http" in protocols and hasattr(filesystem, "set_session")

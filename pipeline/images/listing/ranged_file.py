"""A file object over range requests, for readers that skip most of a file, as tarfile does between headers."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.storage.retries import retried

__all__ = ["Ahead", "RangedFile", "open_ranged"]


class Ahead:
    """Read-ahead in bytes: ``least`` after a skip of at least ``skip``, otherwise doubling up to ``most``.

    A remote request takes as long as a few hundred kB of data, so shorter gaps are read rather than skipped.
    """

    def __init__(self, least: int, most: int, skip: int) -> None:
        self.least, self.most, self.skip = least, most, skip


_LOCAL = Ahead(least=2 << 10, most=256 << 10, skip=16 << 10)
_REMOTE = Ahead(least=16 << 10, most=4 << 20, skip=512 << 10)


class RangedFile(io.RawIOBase):
    """Fetches ranges on demand.

    Args:
        fetch: returns the bytes from a start to an end; fewer at the end of the file.
        ahead: how far to read ahead.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], ahead: Ahead = _REMOTE) -> None:
        self._fetch = fetch
        self._ahead = ahead
        self._more = ahead.least
        self._position = 0
        self._start = 0  # position of the buffered bytes
        self._held = b""

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte, relative to the start or the current position; fetches nothing."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the size of the file is not known")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read the next ``size`` bytes; fewer only at the end of the file."""
        if size < 0:
            raise io.UnsupportedOperation("read requires a size")
        start, end = self._position, self._position + size
        if not self._start <= start <= end <= self._start + len(self._held):
            gap = start - self._start - len(self._held)
            near = self._start <= start and gap < self._ahead.skip
            self._more = min(2 * self._more, self._ahead.most) if near and self._held else self._ahead.least
            self._start, self._held = start, self._fetch(start, max(end, start + self._more))
        data = self._held[start - self._start : end - self._start]
        self._position += len(data)
        return data


@contextmanager
def open_ranged(filesystem: AbstractFileSystem, path: str, place: str) -> Iterator[RangedFile]:
    """Open a file for ranged reads; transient failures are retried.

    Args:
        filesystem: of the file.
        path: of the file.
        place: name of the file in messages.
    """
    local = isinstance(filesystem, LocalFileSystem)

    def opened() -> io.RawIOBase:
        # Unbuffered: RangedFile has its own buffer.
        if local:
            return open(path, "rb", buffering=0)  # noqa: PTH123 - a string that may not be UTF-8
        file: io.RawIOBase = filesystem.open(path, "rb", cache_type="none")
        return file

    with retried(opened, place) as raw:

        def fetch(start: int, end: int) -> bytes:
            raw.seek(start)
            parts = []
            while start < end and (data := raw.read(end - start)):  # a raw file may return less than requested
                parts.append(data)
                start += len(data)
            return b"".join(parts)

        yield RangedFile(lambda start, end: retried(lambda: fetch(start, end), place), _LOCAL if local else _REMOTE)

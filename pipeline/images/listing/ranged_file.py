"""A file behind ranged reads, for readers that skip most of it, as tarfile does between two headers."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.storage.retries import retried

__all__ = ["Ahead", "RangedFile", "open_ranged"]


class Ahead:
    """How far to read ahead, in bytes: ``least`` after a skip of ``skip`` or more, up to ``most`` while there is none.

    A request to a remote storage takes as long as some hundred kB of data, so shorter stretches are read, not skipped.
    """

    def __init__(self, least: int, most: int, skip: int) -> None:
        self.least, self.most, self.skip = least, most, skip


_LOCAL = Ahead(least=2 << 10, most=256 << 10, skip=16 << 10)
_REMOTE = Ahead(least=16 << 10, most=4 << 20, skip=512 << 10)


class RangedFile(io.RawIOBase):
    """Reads ranges as they are needed.

    Args:
        fetch: gives the bytes from a start to an end; fewer where the file ends.
        ahead: how many more than asked for to fetch.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], ahead: Ahead = _REMOTE) -> None:
        self._fetch = fetch
        self._ahead = ahead
        self._more = ahead.least
        self._position = 0
        self._start = 0  # of the bytes that are held
        self._held = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the start or from where it is; fetches nothing."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes; fewer only where the file ends."""
        if size < 0:
            raise io.UnsupportedOperation("read needs a size")
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
    """A file of a file system; what passes of its failures is waited for.

    Args:
        filesystem: where it is.
        path: there.
        place: the same for a person.
    """
    local = isinstance(filesystem, LocalFileSystem)

    def opened() -> io.RawIOBase:
        # Without buffers of their own: what is held is held in RangedFile.
        if local:
            return open(path, "rb", buffering=0)  # noqa: PTH123 - a string, with what is not UTF-8 in it
        file: io.RawIOBase = filesystem.open(path, "rb", cache_type="none")
        return file

    with retried(opened, place) as raw:

        def fetch(start: int, end: int) -> bytes:
            raw.seek(start)
            parts = []
            while start < end and (data := raw.read(end - start)):  # a raw file may give less than asked for
                parts.append(data)
                start += len(data)
            return b"".join(parts)

        yield RangedFile(lambda start, end: retried(lambda: fetch(start, end), place), _LOCAL if local else _REMOTE)

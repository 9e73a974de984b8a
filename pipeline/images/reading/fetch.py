"""Fetch an object, or a range of it, as bytes, with retries; errors of an image are returned as its outcome.

Errors of the image (missing, forbidden, too large) fail its row permanently. Errors of the environment (the storage
does not answer, the file system is not mounted, credentials have expired, memory is full) are raised, so that the rows
are processed later.
"""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.errors import DensefeatError, StorageUnavailable, WrongClock
from densefeat.storage.failures import is_transient, is_unreachable, is_unreachable_for_good, lacks_credentials
from densefeat.storage.places import is_local, open_uri
from densefeat.storage.retries import PATIENCE_S, retried
from pipeline.errors import ImageError, JobError
from pipeline.images.listing.names import unescaped
from pipeline.images.reading.bounds import Bounds, TooLarge
from pipeline.images.reading.hosts import HOSTS, host_of, is_answer
from pipeline.images.reading.ranges import object_size, read_bytes
from pipeline.io.errors import explain_storage_error

__all__ = ["Fetch", "Outcome"]

# Errors of this process or program, independent of the image.
_NOT_OF_THE_IMAGE = (MemoryError, RuntimeError, TypeError, AttributeError, NameError, AssertionError)

Outcome = bytes | ImageError
Result = TypeVar("Result")


class Fetch:
    """Reads an object or a range of it. Keeps no connections itself; fsspec does. Thread-safe.

    Args:
        uri: any URI of the dataset; `storage_options` apply to its protocol.
        max_bytes: images with more encoded bytes are not read.
        storage_options: for the dataset's file system.
        patience_s: see `densefeat.storage.retries.retried`.
        bounds: of each request.
        stop: once set, all waits end.
        folder: local folder of all images; if it is missing or empty, images are not reported as missing.
    """

    def __init__(
        self,
        uri: str,
        max_bytes: int,
        storage_options: Mapping[str, Any] | None,
        *,
        patience_s: float = PATIENCE_S,
        bounds: Bounds | None = None,
        stop: threading.Event | None = None,
        folder: str | None = None,
    ) -> None:
        self._protocol, self._host = _protocol(uri), host_of(uri)
        self.max_bytes = max_bytes
        self._storage_options = storage_options
        self._patience_s = patience_s
        self._bounds = Bounds() if bounds is None else bounds
        self._stop = threading.Event() if stop is None else stop
        self._folder = folder

    def open_filesystem(self, uri: str) -> tuple[AbstractFileSystem, str]:
        """Open the file system of a URI. The options apply only to the dataset's protocol; others use defaults."""
        if is_local(uri):
            return open_uri(unescaped(uri))  # listing.names.escaped escaped it
        return open_uri(uri, self._storage_options if _protocol(uri) == self._protocol else None)

    def __call__(
        self, uri: str, *, start: int | None = None, end: int | None = None, nbytes: int | None = None
    ) -> Outcome:
        """Read ``uri``, or its bytes from ``start`` to ``end``; ``nbytes`` is how many that is, if known.

        Raises:
            StorageUnavailable: the storage did not answer within the retry period.
            WrongClock: it refuses requests of this machine.
            JobError: there are no credentials, or a package is missing.
        """
        if (nbytes or 0) > self.max_bytes:
            return self._too_large(uri, nbytes)
        if nbytes == 0:
            return b""
        try:
            return self.read(uri, start, end, nbytes)
        except Exception as error:  # every storage package has its own hierarchy
            return self.outcome(uri, error)

    def read(self, uri: str, start: int | None = None, end: int | None = None, expected: int | None = None) -> bytes:
        """Call `read_bytes` with retries; pass its errors to `outcome`."""
        return self._with_retries(uri, partial(self._read, start=start, end=end, expected=expected))

    def size(self, uri: str) -> int:
        """Size of an object in bytes, with retries; pass its errors to `outcome`."""
        size = self._with_retries(uri, lambda filesystem, path: object_size(filesystem, path, self._bounds, self._stop))
        if size is None:
            raise ValueError("the server does not report its size")
        return size

    def check(self, data: bytes, uri: str) -> Outcome:
        """Apply the limit ``max_bytes`` to bytes that were read in another way."""
        return self._too_large(uri, len(data)) if len(data) > self.max_bytes else data

    def outcome(self, uri: str, error: Exception) -> ImageError:
        """Turn a read error into the outcome of the image.

        Raises:
            DensefeatError: the error says nothing about the image: `StorageUnavailable`, `WrongClock`, or a
                ``JobError`` that says what to do.
            Exception: the error itself, if it is not from a storage.
        """
        if isinstance(error, ImageError):
            return error
        if isinstance(error, TooLarge):
            return self._too_large(uri, error.nbytes)
        if isinstance(error, _NOT_OF_THE_IMAGE) and not isinstance(error, NotImplementedError):
            raise error
        cause = error.__cause__ if isinstance(error, StorageUnavailable) else error
        if cause is not None and (lacks_credentials(cause) or isinstance(cause, ImportError)):
            explained = explain_storage_error(cause, uri, "read")
            assert explained is not None
            raise explained from cause
        if isinstance(error, StorageUnavailable) and cause is not None and self._host_is_dead(uri, cause):
            return _unreadable(uri, cause)
        if isinstance(error, StorageUnavailable | WrongClock | JobError):
            raise error
        return _unreadable(uri, error)

    def _with_retries(self, uri: str, operation: Callable[[AbstractFileSystem, str], Result]) -> Result:
        once = partial(self._once, uri, operation)
        return retried(once, uri, patience_s=self._patience_s, when=_is_worth_retrying, stop=self._stop)

    def _once(self, uri: str, operation: Callable[[AbstractFileSystem, str], Result]) -> Result:
        if self._stop.is_set():
            raise StorageUnavailable(f"{uri} was not read: stopped")
        filesystem, path = self.open_filesystem(uri)
        try:
            result = operation(filesystem, path)
        except Exception as error:
            if isinstance(filesystem, LocalFileSystem) and isinstance(error, OSError):
                self._refuse_missing_folder(error)
            if host_of(uri) and is_answer(error):
                HOSTS.answered(uri)
            if lacks_credentials(error):
                filesystem.clear_instance_cache()  # so that the next try looks up credentials again
            if (HOSTS.is_known_dead(uri) or is_unreachable_for_good(error)) and self._host_is_dead(uri, error):
                raise _unreadable(uri, error) from None
            raise
        if host_of(uri):
            HOSTS.answered(uri)
        return result

    def _read(
        self, filesystem: AbstractFileSystem, path: str, start: int | None, end: int | None, expected: int | None
    ) -> bytes:
        return read_bytes(
            filesystem, path, start, end,
            limit=self.max_bytes, expected=expected, bounds=self._bounds, stop=self._stop,
        )  # fmt: skip

    def _refuse_missing_folder(self, error: OSError) -> None:
        """Raise `_FolderGoneError` for a missing image in a missing or empty folder: it may not be mounted here."""
        if self._folder is None or not isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        _, folder = self.open_filesystem(self._folder)
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is not None:
                    return
        except OSError:
            pass
        raise _FolderGoneError(f"{error}, and its folder {folder} is gone or empty: is it mounted here?") from None

    def _host_is_dead(self, uri: str, error: BaseException) -> bool:
        """Whether the host of a URL in a column is dead; the dataset's own host never counts as dead."""
        if host_of(uri) in ("", self._host) or not is_unreachable(error):
            return False
        return HOSTS.is_dead(uri, lambda other: self._read(*self.open_filesystem(other), start=0, end=1, expected=None))

    def _too_large(self, uri: str, nbytes: int | None) -> ImageError:
        size = "" if nbytes is None else f"{nbytes} encoded bytes, "
        return ImageError("too_large", f"{uri}: {size}more than max_bytes={self.max_bytes}.")


class _FolderGoneError(ConnectionError):
    """The folder is missing or empty; the state of its files is unknown."""


def _is_worth_retrying(error: BaseException) -> bool:
    if isinstance(error, DensefeatError):
        return False
    return is_transient(error) or is_unreachable(error) or lacks_credentials(error)


def _protocol(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else ""


def _unreadable(uri: str, error: BaseException) -> ImageError:
    # The system's own words; `str` of such an error would name the file again.
    system = isinstance(error, OSError) and error.strerror and error.filename is not None
    reason = error.strerror if system and isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return ImageError("unreadable", f"Cannot read {uri}: {reason}")

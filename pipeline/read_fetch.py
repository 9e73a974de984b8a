"""One object, or a range of it, as bytes; with retries, and with errors as outcomes."""

import time
from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from densefeat.places import is_local, open_uri
from pipeline.errors import ImageError
from pipeline.source_names import unescaped

__all__ = ["BACKOFF_S", "Fetch", "Outcome", "is_transient", "unreadable"]

# Waits between attempts: four in all, within two seconds.
BACKOFF_S = (0.25, 0.5, 1.0)
# ValueError: the URI or the options are wrong, ImportError: its package is missing.
_NOT_TRANSIENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_RETRIED_CLIENT_ERRORS = (408, 429)  # HTTP: timeout, too many requests

Outcome = bytes | ImageError


class Fetch:
    """Reads one object or a range of it, with retries; errors become outcomes. Keeps nothing open: fsspec does."""

    def __init__(self, uri: str, max_bytes: int, storage_options: Mapping[str, Any] | None) -> None:
        self._protocol = _protocol(uri)
        self.max_bytes = max_bytes
        self._storage_options = storage_options

    def open_filesystem(self, uri: str) -> tuple[AbstractFileSystem, str]:
        """The options are for the dataset's filesystem; a column of URIs can lead to another, with its defaults."""
        if is_local(uri):
            return open_uri(unescaped(uri))  # as source_names.escaped wrote it
        return open_uri(uri, self._storage_options if _protocol(uri) == self._protocol else None)

    def __call__(
        self, uri: str, *, start: int | None = None, end: int | None = None, nbytes: int | None = None
    ) -> Outcome:
        """Read ``uri``, or its bytes from ``start`` to ``end``; ``nbytes`` is how many that is, if known."""
        attempt = 0
        while True:
            try:
                filesystem, path = self.open_filesystem(uri)
                # Over http, asking first makes fsspec report any error as "not found", which hides what can be retried.
                size = filesystem.size(path) if nbytes is None and not uri.startswith("http") else nbytes
                if (size or 0) > self.max_bytes:
                    return self._too_large(uri, size)
                data = b"" if size == 0 else bytes(filesystem.cat_file(path, start=start, end=end))
                return self._too_large(uri, len(data)) if len(data) > self.max_bytes else data
            except Exception as error:  # every storage package has its own hierarchy
                if attempt == len(BACKOFF_S) or not is_transient(uri, error):
                    return unreadable(uri, error)
            time.sleep(BACKOFF_S[attempt])
            attempt += 1

    def check(self, data: bytes, uri: str) -> Outcome:
        """Bytes that were read otherwise, held to the same bound."""
        return self._too_large(uri, len(data)) if len(data) > self.max_bytes else data

    def _too_large(self, uri: str, nbytes: int | None) -> ImageError:
        return ImageError("too_large", f"{uri}: {nbytes} encoded bytes, more than max_bytes={self.max_bytes}.")


def _protocol(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else ""


def unreadable(uri: str, error: Exception) -> ImageError:
    """Return the outcome of a row that could not be fetched."""
    return ImageError("unreadable", f"Cannot read {uri}: {type(error).__name__}: {error}")


def is_transient(uri: str, error: Exception) -> bool:
    """Tell whether trying again may help: remote, and neither missing, forbidden nor asked for wrongly."""
    status = getattr(error, "status", None)  # aiohttp's
    if isinstance(status, int) and 400 <= status < 500:
        return status in _RETRIED_CLIENT_ERRORS
    return bool(_protocol(uri)) and not isinstance(error, _NOT_TRANSIENT)

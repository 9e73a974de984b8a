"""Objects below one URI (a folder, ``s3://``, ``gs://`` …) as bytes by key: the storage layer of a store.

A thin layer over fsspec, or over the local file system (`densefeat.storage.local_files`), that adds guarantees which
fsspec lacks: local writes are atomic and durable, objects can be created only if they do not exist, transient failures
are retried, and a handle can be used in another process, forked or spawned.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fsspec import AbstractFileSystem

from densefeat.storage.local_files import LocalFolder
from densefeat.storage.places import absolute_place, is_local, open_place
from densefeat.storage.retries import PATIENCE_S, is_transient, retried

__all__ = ["Objects"]

Result = TypeVar("Result")


class Objects:
    """Bytes by key below ``uri``.

    Keys are relative paths with ``/``. Methods raise the errors of the file system: ``FileNotFoundError`` for a missing
    key, ``PermissionError``, ``OSError``. Transient errors are retried, and become ``StorageUnavailable`` if they
    persist. Picklable, and safe in a forked child: every process opens its own connection (s3fs refuses a handle that
    was opened in the parent).

    Args:
        uri: as for `absolute_place`.
        storage_options: for the file system, passed to fsspec.
        patience_s: how long to retry; None: `densefeat.storage.retries.PATIENCE_S`.

    Raises:
        PlaceError: ``uri`` is not a valid path or URI.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        *,
        patience_s: float | None = None,
    ) -> None:
        self.uri = absolute_place(uri)  # must mean the same on another machine, or in another working directory
        self.storage_options = storage_options
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._opened: tuple[int, LocalFolder | _Remote] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def local_path(self) -> Path | None:
        """The folder, if the objects are on a local file system; else None."""
        return Path(self.uri) if is_local(self.uri) else None

    @property
    def can_list(self) -> bool:
        """Whether objects can be listed. False over http(s): few servers list, each in its own format."""
        return not self.uri.startswith(("http://", "https://"))

    def get(self, key: str) -> bytes:
        """Read the whole object."""
        return self._retried(key, lambda storage: storage.get(key))

    def get_range(self, key: str, start: int, end: int, stop: threading.Event | None = None) -> bytes:
        """Read bytes ``start`` (inclusive) to ``end`` (exclusive) of the object; fewer if it ends before.

        Once ``stop`` is set, a failed request is not retried.
        """
        return self._retried(key, lambda storage: storage.get_range(key, start, end), stop)

    def size(self, key: str) -> int | None:
        """Size of the object in bytes; None if it does not exist."""
        return self._retried(key, lambda storage: storage.size(key))

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        return self._retried(key, lambda storage: storage.exists(key))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Keys and sizes in bytes of all objects below the folder ``prefix``; none if it does not exist.

        Local files that are being written are not included.
        """
        return self._retried(prefix, lambda storage: storage.list(prefix))

    def put(self, key: str, data: bytes) -> None:
        """Write the object atomically, replacing an existing one: readers see the old or the new one, never a part."""
        self._retried(key, lambda storage: storage.put(key, data))

    def create(self, key: str, data: bytes) -> None:
        """Write the object atomically, or raise ``FileExistsError`` if it exists (on S3 with If-None-Match).

        An existing object with the same bytes counts as created by this call: it may be from a first try whose response
        was lost. If it matters which writer was first, the bytes must identify the writer.
        """

        def create(storage: "LocalFolder | _Remote") -> None:
            try:
                storage.create(key, data)
            except FileExistsError:
                if storage.size(key) != len(data) or storage.get(key) != data:
                    raise

        self._retried(key, create)

    def delete(self, key: str) -> None:
        """Delete the object; a missing object is not an error."""
        self._retried(key, lambda storage: storage.delete(key))

    def delete_folder(self, key: str) -> None:
        """Delete a folder of a local file system if it is empty; other storages have no folders."""
        storage = self._storage()
        if isinstance(storage, LocalFolder):
            storage.delete_folder(key)

    def leaving_no_folders(self) -> AbstractContextManager[None]:
        """On exit, delete the local folders that this handle created in the block, if they are empty."""
        storage = self._storage()
        return storage.leaving_no_folders() if isinstance(storage, LocalFolder) else contextlib.nullcontext()

    def sweep(self, prefix: str = "", *, deep: bool = True) -> None:
        """Delete temporary local files at least a day old, left by killed processes. Safe while others write.

        Args:
            prefix: the folder to search.
            deep: whether to search the folders below it, too.
        """
        storage = self._storage()
        if isinstance(storage, LocalFolder):
            storage.sweep(prefix, deep=deep)

    def _retried(
        self, key: str, operation: Callable[["LocalFolder | _Remote"], Result], stop: threading.Event | None = None
    ) -> Result:
        # Opening is retried too: some file systems connect on creation.
        place = f"{self.uri}/{key}".rstrip("/")
        return retried(lambda: operation(self._storage()), place, patience_s=self.patience_s, stop=stop)

    def _storage(self) -> "LocalFolder | _Remote":
        if self._opened is None or self._opened[0] != os.getpid():
            local = self.local_path
            remote = _Remote if self.can_list else _Http
            self._opened = os.getpid(), remote(self.uri, self.storage_options) if local is None else LocalFolder(local)
        return self._opened[1]


class _Remote:
    """The same operations through fsspec. A put or create is one request, and atomic."""

    def __init__(self, uri: str, storage_options: dict[str, Any] | None) -> None:
        # Listings change (other workers write), and instances cached by fsspec may belong to a parent process.
        options = {"skip_instance_cache": True, "use_listings_cache": False, **(storage_options or {})}
        self._fs: AbstractFileSystem
        self._fs, root = open_place(uri, options)
        root = root.rstrip("/")
        self._root = f"{root}/" if root or self._fs.root_marker else ""
        # s3fs would ask for the size first, to read objects of more than 50 MB in parts: two requests for a small one.
        self._in_one_request = {"max_concurrency": 1} if "s3" in self._fs.protocol else {}

    def get(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(self._root + key, **self._in_one_request))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""  # s3fs would fetch the whole object
        try:
            return bytes(self._fs.cat_file(self._root + key, start=start, end=end))
        except Exception as error:
            if _is_beyond_the_end(error):
                return b""
            raise

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        try:  # not fs.exists, which returns False for any failure
            info = self._fs.info(self._root + key)
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else int(info["size"])

    def list(self, prefix: str) -> dict[str, int]:
        return dict(sorted(self._found(prefix)))

    def _found(self, prefix: str) -> Iterator[tuple[str, int]]:
        for path, info in self._fs.find(f"{self._root}{prefix}".rstrip("/"), detail=True).items():
            key = path.removeprefix(self._root)
            # Skip the root itself as an object, and placeholder objects for folders, as web consoles create them.
            if path.startswith(self._root) and key and not key.endswith("/"):
                yield key, int(info["size"])

    def put(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._root + key, data)

    def create(self, key: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(self._root + key, data, mode="create")
        except (FileExistsError, PermissionError):
            raise
        except Exception as error:  # clients report a failed precondition in different ways
            if is_transient(error) or self.size(key) is None:
                raise
            raise FileExistsError(self._root + key) from error

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._root + key)


class _Http(_Remote):
    """Objects on a web server: read-only, no listing, and range requests may not be supported."""

    def get(self, key: str) -> bytes:
        return bytes(_http().get(self._fs, self._url(key)))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return bytes(_http().get_range(self._fs, self._url(key), start, end))

    def exists(self, key: str) -> bool:
        return bool(_http().exists(self._fs, self._url(key)))

    def _url(self, key: str) -> str:
        """The URL of an object: in a key, "%", "#" and "?" are characters of names."""
        return self._root + quote(key, errors="surrogateescape")


def _http() -> Any:
    from densefeat.storage import http  # imports aiohttp, which is needed only here

    return http


def _is_beyond_the_end(error: Exception) -> bool:
    """Whether the range begins after the end of the object: s3fs reports it by errno, gcsfs by the HTTP status."""
    return getattr(error, "errno", None) == errno.EINVAL or str(getattr(error, "code", None)) == "416"

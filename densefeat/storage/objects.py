"""Objects below one URI (a folder, ``s3://``, ``gs://`` …) as bytes by key: all the storage that a store needs.

A thin layer over fsspec, and over the file system itself where it is local (`densefeat.storage.local_files`), that
adds what fsspec leaves open: a local write is atomic and durable, an object can be created if and only if it is not
there, failures that pass are waited out, and a handle can cross into another process, forked or spawned.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

from densefeat.storage.local_files import LocalFolder
from densefeat.storage.places import absolute_place, is_local, open_place
from densefeat.storage.retries import PATIENCE_S, is_transient, retried

__all__ = ["Objects"]

Result = TypeVar("Result")


class Objects:
    """Bytes by key below ``uri``.

    Keys are relative paths with ``/``. Errors are those of the file system: ``FileNotFoundError`` for an absent key,
    ``PermissionError``, ``OSError``; one that may pass is tried again, and ``StorageUnavailable`` if it does not.
    Picklable, and safe to use in a forked child: the connection is opened anew in every process (s3fs refuses a handle
    that was opened in the parent).

    Args:
        uri: as for `absolute_place`.
        storage_options: for the file system, as fsspec takes them.
        patience_s: how long what fails is tried again; None: `densefeat.storage.retries.PATIENCE_S`.

    Raises:
        PlaceError: ``uri`` names no place.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        *,
        patience_s: float | None = None,
    ) -> None:
        self.uri = absolute_place(uri)  # a worker on another machine, or in another folder, must find the same place
        self.storage_options = storage_options
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._opened: tuple[int, LocalFolder | _Remote] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def local_path(self) -> Path | None:
        """The folder, if the objects lie on a local file system."""
        return Path(self.uri) if is_local(self.uri) else None

    @property
    def can_list(self) -> bool:
        """False over http(s): few servers list, each in its own way."""
        return not self.uri.startswith(("http://", "https://"))

    def get(self, key: str) -> bytes:
        """The whole object."""
        return self._retried(key, lambda storage: storage.get(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` (inclusive) to ``end`` (exclusive) of the object, fewer if it ends before."""
        return self._retried(key, lambda storage: storage.get_range(key, start, end))

    def size(self, key: str) -> int | None:
        """Bytes of the object; None if it is not there."""
        return self._retried(key, lambda storage: storage.size(key))

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self._retried(key, lambda storage: storage.exists(key))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Keys and sizes in bytes of all objects below the folder ``prefix``, none if it is absent.

        Local files that are being written are not among them.
        """
        return self._retried(prefix, lambda storage: storage.list(prefix))

    def put(self, key: str, data: bytes) -> None:
        """Write the object whole, replacing what was there: it is the old one or the new one, never a part."""
        self._retried(key, lambda storage: storage.put(key, data))

    def create(self, key: str, data: bytes) -> None:
        """Write the object whole, or raise ``FileExistsError`` if there is one (on S3: If-None-Match).

        One with the same bytes is taken for ours: a first try whose answer was lost looks like that. Where it matters
        who was first, the bytes must name the writer.
        """

        def create(storage: "LocalFolder | _Remote") -> None:
            try:
                storage.create(key, data)
            except FileExistsError:
                if storage.size(key) != len(data) or storage.get(key) != data:
                    raise

        self._retried(key, create)

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is no error."""
        self._retried(key, lambda storage: storage.delete(key))

    def delete_folder(self, key: str) -> None:
        """Remove a folder of a local file system if it is empty; elsewhere there are none."""
        storage = self._storage()
        if isinstance(storage, LocalFolder):
            storage.delete_folder(key)

    def leaving_no_folders(self) -> AbstractContextManager[None]:
        """Local folders that this handle makes in the block go at its end, if they are empty by then."""
        storage = self._storage()
        return storage.leaving_no_folders() if isinstance(storage, LocalFolder) else contextlib.nullcontext()

    def sweep(self, prefix: str = "", *, deep: bool = True) -> None:
        """Remove what killed processes left half-written a day ago or earlier. Safe while others write.

        Args:
            prefix: the folder to look in.
            deep: whether to look in the folders below it, too.
        """
        storage = self._storage()
        if isinstance(storage, LocalFolder):
            storage.sweep(prefix, deep=deep)

    def _retried(self, key: str, operation: Callable[["LocalFolder | _Remote"], Result]) -> Result:
        # Opening is a part of it: some file systems connect when they are made.
        place = f"{self.uri}/{key}".rstrip("/")
        return retried(lambda: operation(self._storage()), place, patience_s=self.patience_s)

    def _storage(self) -> "LocalFolder | _Remote":
        if self._opened is None or self._opened[0] != os.getpid():
            local = self.local_path
            remote = _Remote if self.can_list else _Http
            self._opened = os.getpid(), remote(self.uri, self.storage_options) if local is None else LocalFolder(local)
        return self._opened[1]


class _Remote:
    """The same by way of fsspec. A put or create is one request there, whole or not at all."""

    def __init__(self, uri: str, storage_options: dict[str, Any] | None) -> None:
        # Listings change under us (other workers write), and instances cached by fsspec may be a parent's.
        options = {"skip_instance_cache": True, "use_listings_cache": False, **(storage_options or {})}
        self._fs: AbstractFileSystem
        self._fs, root = open_place(uri, options)
        root = root.rstrip("/")
        self._root = f"{root}/" if root or self._fs.root_marker else ""

    def get(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(self._root + key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""  # for which s3fs fetches the whole object
        try:
            return bytes(self._fs.cat_file(self._root + key, start=start, end=end))
        except Exception as error:
            if _is_beyond_the_end(error):
                return b""
            raise

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        try:  # not fs.exists, which says no to whatever goes wrong
            info = self._fs.info(self._root + key)
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else int(info["size"])

    def list(self, prefix: str) -> dict[str, int]:
        return dict(sorted(self._found(prefix)))

    def _found(self, prefix: str) -> Iterator[tuple[str, int]]:
        for path, info in self._fs.find(f"{self._root}{prefix}".rstrip("/"), detail=True).items():
            key = path.removeprefix(self._root)
            # The place itself as an object, and objects that stand for folders, as consoles make them.
            if path.startswith(self._root) and key and not key.endswith("/"):
                yield key, int(info["size"])

    def put(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._root + key, data)

    def create(self, key: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(self._root + key, data, mode="create")
        except (FileExistsError, PermissionError):
            raise
        except Exception as error:  # the clients name a failed precondition in different ways
            if is_transient(error) or self.size(key) is None:
                raise
            raise FileExistsError(self._root + key) from error

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._root + key)


class _Http(_Remote):
    """A store that somebody serves: nothing is listed, and ranges may not be known. Nothing is written."""

    def get(self, key: str) -> bytes:
        return bytes(_http().get(self._fs, self._root + key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return bytes(_http().get_range(self._fs, self._root + key, start, end))

    def exists(self, key: str) -> bool:
        return bool(_http().exists(self._fs, self._root + key))


def _http() -> Any:
    from densefeat.storage import http  # it imports aiohttp, which only this needs

    return http


def _is_beyond_the_end(error: Exception) -> bool:
    """Whether a storage says that a range begins behind the object: s3fs by its errno, gcsfs by HTTP's code."""
    return getattr(error, "errno", None) == errno.EINVAL or str(getattr(error, "code", None)) == "416"

"""Objects below one URI (a folder, ``s3://``, ``gs://`` …) as bytes by key: all the storage that a store needs.

A thin layer over fsspec that adds what fsspec leaves open: a local write is atomic and durable, and a handle can cross
into another process, forked or spawned.
"""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

# Local objects are written here first, then renamed into place. Beside them, so that it is the same file system.
TEMPORARY = "_tmp"


class Objects:
    """Bytes by key below ``uri``.

    Keys are relative paths with ``/``. Errors are those of the file system: ``FileNotFoundError`` for an absent key,
    ``PermissionError``, ``OSError``. Picklable, and safe to use in a forked child: the connection is opened anew in
    every process (s3fs refuses a handle that was opened in the parent).
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None) -> None:
        # A worker on another machine, or in another folder, must find the same place.
        self.uri = uri.rstrip("/") if "://" in uri else absolute_path(uri)
        self.storage_options = storage_options
        self._opened: tuple[int, Any, str] | None = None

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            # Listings change under us (other workers write), and instances cached by fsspec may be a parent's.
            options = {"skip_instance_cache": True, "use_listings_cache": False, **(self.storage_options or {})}
            fs, root = fsspec.core.url_to_fs(self.uri, **options)
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1], self._opened[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def local_path(self) -> Path | None:
        """The folder, if the objects lie on a local file system."""
        fs, root = self._open()
        return Path(root) if isinstance(fs, LocalFileSystem) else None

    @property
    def can_list(self) -> bool:
        """False over http(s): few servers list, each in its own way."""
        return not self.uri.startswith(("http://", "https://"))

    def get(self, key: str) -> bytes:
        """The whole object."""
        fs, root = self._open()
        if not self.can_list:
            return bytes(_http().get(fs, f"{root}/{key}"))
        return bytes(fs.cat_file(f"{root}/{key}"))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` (inclusive) to ``end`` (exclusive) of the object, fewer if it ends before."""
        fs, root = self._open()
        if not self.can_list:
            return bytes(_http().get_range(fs, f"{root}/{key}", start, end))
        if start >= end:
            return b""  # for which s3fs fetches the whole object
        try:
            return bytes(fs.cat_file(f"{root}/{key}", start=start, end=end))
        except Exception as error:
            if _is_beyond_the_end(error):
                return b""
            raise

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        fs, root = self._open()
        if not self.can_list:
            return bool(_http().exists(fs, f"{root}/{key}"))
        return bool(fs.exists(f"{root}/{key}"))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Keys and sizes in bytes of all objects below the folder ``prefix``, none if it is absent."""
        fs, root = self._open()
        found = fs.find(f"{root}/{prefix}".rstrip("/"), detail=True)
        return {path[len(root) + 1 :]: int(info["size"]) for path, info in sorted(found.items())}

    def put(self, key: str, data: bytes) -> None:
        """Write the object whole, replacing what was there: it is the old one or the new one, never a part."""
        fs, root = self._open()
        if isinstance(fs, LocalFileSystem):
            with _temporary_file(Path(root), data) as temporary:
                temporary.replace(_with_parents(Path(root, key)))
        else:
            fs.pipe_file(f"{root}/{key}", data)

    def create(self, key: str, data: bytes) -> None:
        """Write the object whole, or raise ``FileExistsError`` if there is one (on S3: If-None-Match)."""
        fs, root = self._open()
        if isinstance(fs, LocalFileSystem):
            with _temporary_file(Path(root), data) as temporary:
                _with_parents(Path(root, key)).hardlink_to(temporary)
        else:
            fs.pipe_file(f"{root}/{key}", data, mode="create")

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is no error."""
        fs, root = self._open()
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{key}")

    def tidy(self) -> None:
        """Remove what killed processes of this machine left half-written, and folders that are empty.

        Safe while others write: what belongs to a living process, or to another machine, stays.
        """
        root = self.local_path
        if root is None or not root.exists():
            return
        for path in (root / TEMPORARY).glob(f"{socket.gethostname()}-*"):
            if not _is_alive(int(path.name.rsplit("-", 2)[1])):
                path.unlink(missing_ok=True)
        for folder in (root / TEMPORARY, root):
            with contextlib.suppress(OSError):  # not empty, or gone
                folder.rmdir()


def _is_beyond_the_end(error: Exception) -> bool:
    """Whether a storage says that a range begins behind the object: s3fs by its errno, gcsfs by HTTP's code."""
    return getattr(error, "errno", None) == errno.EINVAL or str(getattr(error, "code", None)) == "416"


def _http() -> Any:
    from densefeat import http  # it imports aiohttp, which only this needs

    return http


def _with_parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def absolute_path(path: str) -> str:
    """A local path, the same text for the same place: absolute, without ``~`` and ``..``."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - Path.absolute keeps "..", resolve follows links


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and name of a local path or URI, e.g. for ``Objects(folder).get(name)``."""
    folder, _, name = (uri if "://" in uri else absolute_path(uri)).rpartition("/")
    return folder or "/", name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _make_temporary(folder: Path) -> tuple[int, str]:
    """A new file named after this process. ``tidy`` may remove the empty folder at any moment: then once more."""
    prefix = f"{socket.gethostname()}-{os.getpid()}-"
    for _ in range(10):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return tempfile.mkstemp(dir=folder, prefix=prefix)
    return tempfile.mkstemp(dir=folder, prefix=prefix)


@contextlib.contextmanager
def _temporary_file(root: Path, data: bytes) -> Iterator[Path]:
    """``data`` on disk (synced) under a name of its own; gone afterwards unless renamed."""
    descriptor, name = _make_temporary(root / TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)

"""A local folder as storage of bytes by key, for `densefeat.storage.objects`.

A file is written under a temporary name beside its target, synced, and then moved into place by one system call, so
that readers see the old or the new content even if a writer is killed. Temporary names contain a UUID, so that writers
on any host never share one; leftovers of killed writers are removed by age (`LocalFolder.sweep`).
"""

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["STALE_S", "LocalFolder", "create_from", "is_temporary"]

STALE_S = 24 * 3600.0  # age at which a temporary file is stale: no write takes a day
_CLAIM_STALE_S = 60.0  # the same for a claim on a name, which is held for a few milliseconds
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{32}|creating)\.partial")
_NAME_BYTES = 150  # of the target's name in a temporary name; names have at most 255
_TRIES = 10
# Errors of file systems without hard links: FAT and exFAT, gcsfuse, SMB and s3fs-fuse, mergerfs.
_NO_HARD_LINKS = frozenset(
    getattr(errno, name)
    for name in ("EPERM", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV")
    if hasattr(errno, name)
)
_NO_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))


def is_temporary(name: str) -> bool:
    """Whether the name is that of a temporary file: one being written, or left by a killed writer."""
    return _TEMPORARY.fullmatch(name) is not None


def create_from(temporary: Path, target: Path) -> None:
    """Give a complete file, on the same file system, an unused name; it may keep its temporary name as well.

    With hard links this is one atomic step. Otherwise a claim file, created with O_EXCL, ensures that only one writer
    at a time checks for the target and moves the file into place: as exclusive as O_EXCL is on that file system, and
    readers still never see a partial file. The claim of a killed writer expires after a minute.

    Raises:
        FileExistsError: the name is in use.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _create_claimed(temporary, target)


class LocalFolder:
    """Files below ``root`` by relative path, with ``/``. The folder is created on the first write.

    Methods raise the errors of the operating system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: list[Path] | None = None

    def get(self, key: str) -> bytes:
        """Read the whole file."""
        return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Read bytes ``start`` (inclusive) to ``end`` (exclusive); fewer if the file ends before."""
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def size(self, key: str) -> int | None:
        """Size of the file in bytes; None if it does not exist."""
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, key: str) -> bool:
        """Whether the file exists."""
        return self.size(key) is not None

    def list(self, prefix: str) -> dict[str, int]:
        """Keys and sizes of all files below the folder ``prefix`` except temporary ones; linked folders are entered."""
        sizes, root = {}, os.path.join(self.root, "")  # noqa: PTH118 - with a slash at its end; there can be many files
        for entry in _walk(self._path(prefix)):
            if not is_temporary(entry.name):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    sizes[entry.path.removeprefix(root).replace(os.sep, "/")] = _size(entry)
        return dict(sorted(sizes.items()))

    def put(self, key: str, data: bytes) -> None:
        """Write the file, replacing an existing one."""
        target = self._path(key)
        with self._temporary(target, data) as temporary:
            temporary.replace(target)
            _sync_folder(target.parent)

    def create(self, key: str, data: bytes) -> None:
        """Write the file, or raise ``FileExistsError`` if it exists; see `create_from`."""
        target = self._path(key)
        with self._temporary(target, data) as temporary:
            create_from(temporary, target)
            _sync_folder(target.parent)

    def delete(self, key: str) -> None:
        """Delete the file; a missing file is not an error."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def delete_folder(self, key: str) -> None:
        """Delete a folder if it exists and is empty."""
        with contextlib.suppress(OSError):
            self._path(key).rmdir()

    @contextlib.contextmanager
    def leaving_no_folders(self) -> Iterator[None]:
        """On exit, delete the folders that this object created in the block, if they are empty."""
        made: list[Path] = []
        self._made = made
        try:
            yield
        finally:
            self._made = None
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # in use by another writer
                    folder.rmdir()

    def sweep(self, prefix: str, *, deep: bool) -> None:
        """Delete temporary files older than `STALE_S` from the folder ``prefix``, and if ``deep``, from those below.

        Ages are measured by the clock of the file system. Files that cannot be deleted are left.
        """
        folder = self._path(prefix)
        with contextlib.suppress(OSError):
            temporaries = [Path(entry.path) for entry in _walk(folder, deep=deep) if is_temporary(entry.name)]
            if not temporaries:
                return
            with self._temporary(folder / "now", b"") as clock:
                now = clock.stat().st_mtime
            for path in temporaries:
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > STALE_S:
                        path.unlink()

    def _path(self, key: str) -> Path:
        return self.root / key

    @contextlib.contextmanager
    def _temporary(self, target: Path, data: bytes) -> Iterator[Path]:
        """Write ``data`` to disk (synced) under a temporary name beside ``target``; delete that name on exit."""
        path = _beside(target, uuid.uuid4().hex)
        descriptor = self._open_new(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in _NO_SYNC:
                        raise
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _open_new(self, path: Path) -> int:
        """Create a file with the permissions of the umask or the folder's ACL; create its folder if needed."""
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._make_folder(path.parent)  # another job that also created it may delete it again
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def _make_folder(self, folder: Path) -> None:
        try:
            try:
                folder.mkdir()
            except FileNotFoundError:
                if folder.parent == folder:
                    raise
                self._make_folder(folder.parent)
                folder.mkdir()
        except FileExistsError:
            if folder.is_dir():
                return
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        if self._made is not None:
            self._made.append(folder)


def _beside(target: Path, what: str) -> Path:
    name = os.fsencode(target.name)[:_NAME_BYTES].decode(errors="ignore")
    return target.with_name(f".{name}.{what}.partial")


def _create_claimed(temporary: Path, target: Path) -> None:
    """Move a file to an unused name, protected by a claim on that name (see `create_from`).

    Raises:
        FileExistsError: the name is in use.
    """
    claim, own = _beside(target, "creating"), uuid.uuid4().bytes
    while True:
        try:
            descriptor = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _refuse_existing(target)
            _drop_stale(claim, temporary)
            time.sleep(0.02)
            continue
        with os.fdopen(descriptor, "wb") as file:
            file.write(own)
        try:
            _refuse_existing(target)
            # Two writers can find the same stale claim, and one of them delete the other's new claim.
            if claim.read_bytes() == own:
                temporary.replace(target)
                return
        except FileNotFoundError:
            if not temporary.exists():
                raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                if claim.read_bytes() == own:
                    claim.unlink()


def _refuse_existing(target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.lstat()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _drop_stale(claim: Path, temporary: Path) -> None:
    """Delete a claim whose owner was killed; ``temporary`` gives the file system's time."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(temporary)
        if temporary.stat().st_mtime - claim.stat().st_mtime > _CLAIM_STALE_S:
            claim.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if the file system can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _walk(folder: Path, *, deep: bool = True) -> Iterator["os.DirEntry[str]"]:
    """Yield all files; none if the folder does not exist.

    fsspec's walk is not used, because it skips a whole folder if one of its files is deleted meanwhile.
    """
    waiting, seen = [str(folder)], set[tuple[int, int]]()
    while waiting:
        path = waiting.pop()
        try:
            status = os.stat(path)  # noqa: PTH116 - paths stay strings: there can be many
            entries = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            if (status.st_dev, status.st_ino) in seen:  # a link to a visited folder
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                if not _is_folder(entry):
                    yield entry
                elif deep:
                    waiting.append(entry.path)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a circular link
            raise
        return False


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return entry.stat(follow_symlinks=False).st_size

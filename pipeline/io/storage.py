"""Storage that a job writes to: checks of the required operations, and messages if one fails."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from densefeat.errors import StorageUnavailable, WrongClock
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.io.errors import explain_storage_error

__all__ = ["CHECK", "check_writable", "storage_explained", "temporary_folder"]

CHECK = "_check"  # folder of the objects written by `check_writable`
_BEFORE, _AFTER = b"densefeat", b"densefeat!"


def check_writable(objects: Objects, place: str) -> None:
    """Try every operation that writing a store needs: create, replace, read, read a range, list, delete.

    All test objects are deleted.

    Args:
        objects: the storage to write to.
        place: its name in messages, e.g. ``"--store s3://…"``.

    Raises:
        JobError: an operation fails; the message names it.
        StorageUnavailable: the storage does not answer.
    """
    if not objects.can_list:
        raise JobError(f"{place}: a web server can only be read: give the place of its files, or of another storage")
    key = f"{CHECK}/{uuid.uuid4().hex}"  # unique, because other jobs may run this check at the same time
    with objects.leaving_no_folders():
        try:
            with _tried(place, "create an object"):
                objects.create(key, _BEFORE)
            with _tried(
                place,
                "prevent two jobs from creating the same object (on S3 with If-None-Match, which not every compatible "
                "server supports)",
            ):
                with suppress(FileExistsError):
                    objects.create(key, _AFTER)
                    raise OSError("a second create replaced the first object")
                _expect(objects.get(key), _BEFORE)
            with _tried(place, "replace an object"):
                objects.put(key, _AFTER)
            with _tried(place, "read what was written"):
                _expect(objects.get(key), _AFTER)
            with _tried(place, "read a part of an object"):
                _expect(objects.get_range(key, 2, 5), _AFTER[2:5])
            with _tried(place, "list objects"):
                _expect(objects.list(CHECK).get(key), len(_AFTER))
            with _tried(place, "delete an object"):
                objects.delete(key)
                _expect(objects.size(key), None)
        except BaseException:
            with suppress(Exception):  # do not hide the error that is being raised
                objects.delete(key)
            raise


@contextmanager
def _tried(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except (StorageUnavailable, WrongClock):
        raise
    except Exception as error:  # each client has its own exception types
        if (explained := explain_storage_error(error, place)) is not None:
            raise JobError(f"{explained} (the storage cannot {what})") from error
        if not isinstance(error, OSError):
            raise
        raise JobError(f"{place}: the storage cannot {what}: {error}") from error


def _expect(got: object, expected: object) -> None:
    if got != expected:
        raise OSError(f"got {got!r}, expected {expected!r}")


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Create a local folder, and delete it on exit.

    Raises:
        JobError: it cannot be created.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise JobError(f"no folder for temporary files: {error}; set TMPDIR to a writable folder") from error
    with folder as path:
        yield Path(path)


@contextmanager
def storage_explained(uri: str, access: Literal["read", "write"] = "write") -> Iterator[None]:
    """Turn storage errors in the block that retrying does not fix into a ``JobError`` about ``uri``."""
    try:
        yield
    except Exception as error:
        explained = explain_storage_error(error, uri, access)
        if explained is None:
            raise
        raise explained from error

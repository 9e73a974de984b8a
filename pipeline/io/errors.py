"""Messages for storage errors that retrying does not fix; defined only here."""

import errno
from typing import Literal

from densefeat.errors import DensefeatError
from densefeat.storage.failures import is_full, is_transient, lacks_credentials, wrong_clock
from pipeline.errors import JobError

__all__ = ["explain_storage_error"]


def explain_storage_error(
    error: BaseException, place: str, access: Literal["read", "write"] = "write"
) -> JobError | None:
    """Turn a storage error into a ``JobError`` that says what to do.

    Args:
        error: raised by the file system.
        place: path, URI or option in question, as the user wrote it.
        access: the kind of access that failed.

    Returns:
        None if the error is transient, already explains itself, or is not from a storage.
    """
    if isinstance(error, ImportError):  # MissingPackage too
        return JobError(
            f"{place}: the package for this protocol is not installed ({error}). On a cluster, install it on every node"
        )
    if isinstance(error, DensefeatError) or is_transient(error):
        return None
    if (clock := wrong_clock(error)) is not None:
        return JobError(f"{place}: {clock}")
    if lacks_credentials(error):
        return JobError(
            f"{place}: no credentials, or they were refused ({type(error).__name__}: {error}). Set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (GOOGLE_APPLICATION_CREDENTIALS for gs://), give the machine a "
            "role, or set FSSPEC_S3_ANON=true if it is public; on a cluster, on every node. Renew expired credentials"
        )
    if is_full(error):
        return JobError(
            f"no space left for {place} ({error.strerror}): free some, and run the job again; with --resume, if it has "
            "that option: finished work is kept"
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in (errno.EROFS, errno.EACCES):
        if access == "read":
            return JobError(
                f"{place}: no permission to read: {error}. Grant this user permission to list and read, or use other "
                "credentials"
            )
        return JobError(f"no permission to write {place}: {error}; choose another location, or request write access")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return JobError(f"{place}: a name is too long for this file system ({error.strerror}): choose a shorter one")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if access == "read":
            missing = error.filename or (error.args[-1] if error.args else place)
            return JobError(f"{place}: {missing} does not exist. Check the spelling")
        if isinstance(error, NotADirectoryError):
            return JobError(f"{place} cannot be written: a file has that name, or that of a folder above: {error}")
        return JobError(f"{place} cannot be written: {error}; the bucket or file system must exist")
    return None

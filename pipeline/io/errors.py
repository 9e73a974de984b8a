"""What to do about the errors of a storage that waiting does not mend: the one place that words them."""

import errno
from typing import Literal

from densefeat.errors import DensefeatError
from densefeat.storage.failures import is_transient, lacks_credentials
from pipeline.errors import JobError

__all__ = ["explain_storage_error"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_storage_error(
    error: BaseException, place: str, access: Literal["read", "write"] = "write"
) -> JobError | None:
    """What to do about an error of a storage; None for one that may pass, says so itself, or is not of a storage.

    Args:
        error: as the file system raised it.
        place: what it was about, as its user wrote it.
        access: what was tried.
    """
    if isinstance(error, DensefeatError) or is_transient(error):
        return None
    if lacks_credentials(error):
        return JobError(
            f"{place}: no credentials that are accepted ({type(error).__name__}: {error}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE (GOOGLE_APPLICATION_CREDENTIALS for gs://), give the machine a role, "
            "or set FSSPEC_S3_ANON=true if it is public; on a cluster, on every node. Renew those that have expired, "
            "and check the clock"
        )
    if isinstance(error, ImportError):
        return JobError(
            f"{place}: the package for this protocol is not installed ({error}). Install densefeat[s3], "
            "densefeat[gcs] or densefeat[http]; on a cluster, on every node"
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return JobError(
            f"no space left for {place} ({error.strerror}): free some and run the job again with --resume; what is "
            "finished is kept"
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in (errno.EROFS, errno.EACCES):
        if access == "read":
            return JobError(
                f"{place}: not allowed to read: {error}. Give this user the permission to list and to read, or other "
                "credentials"
            )
        return JobError(f"no permission to write {place}: {error}; choose another place, or ask for the right to write")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if access == "read":
            missing = error.filename or (error.args[-1] if error.args else place)
            return JobError(f"{place}: {missing} does not exist. Check the spelling")
        return JobError(f"{place} cannot be written: {error}; the bucket or the file system must be there")
    return None

"""Failures of storage that pass: which they are, and waiting for them to pass.

An outage, a throttled request, a stale handle say nothing about the object that was asked for. They are tried again
for a minute or more; what still fails then is `StorageUnavailable`, never "this object is bad".
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from densefeat.errors import StorageUnavailable

__all__ = ["PATIENCE_S", "is_transient", "retried"]

logger = logging.getLogger(__name__)

PATIENCE_S = 75.0  # after the first failure; S3's and GCS's own advice is to back off for up to a minute
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0

Result = TypeVar("Result")

_TRANSIENT_HTTP = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
_TRANSIENT_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED",
        "EPIPE", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ENOBUFS",
        "EREMOTEIO", "ENOLINK", "ECOMM", "ENODEV", "ENFILE", "EMFILE", "ENOLCK",
    )
    if hasattr(errno, name)
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: what failed is the way to the object, not the object."""
    return any(_passes(cause) for cause in _causes(error))


def retried(operation: Callable[[], Result], place: str, *, patience_s: float = PATIENCE_S) -> Result:
    """The result of ``operation``, tried again with growing, random waits while it fails in a way that passes.

    Args:
        operation: reads, or writes something that may be written twice.
        place: what it is about, for the message.
        patience_s: how long after the first failure it is tried again.

    Raises:
        StorageUnavailable: it still fails.
        Exception: any other error of ``operation``, as it is.
    """
    wait, end = _FIRST_WAIT_S, None
    while True:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            end = now + patience_s if end is None else end
            pause = wait * random.uniform(0.5, 1.5)  # so that many workers do not come back at the same moment
            if now + pause > end:
                raise StorageUnavailable(f"{place} did not answer: {type(error).__name__}: {error}") from error
            logger.debug("%s: %s: %s; trying again in %.1f s", place, type(error).__name__, error, pause)
        time.sleep(pause)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: file systems translate what their client raised."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _passes(error: BaseException) -> bool:
    status = _http_status(error)
    if status is not None:
        return status in _TRANSIENT_HTTP
    if isinstance(error, TimeoutError | ConnectionError):  # asyncio's, fsspec's and socket's time-outs are TimeoutError
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNO
    return False


def _http_status(error: BaseException) -> int | None:
    """Of aiohttp (``status``), gcsfs (``code``) or botocore (``response``)."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if str(value).isdigit():
            return int(str(value))
    return None

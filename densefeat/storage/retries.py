"""Waiting for failures of storage to pass.

An outage, a throttled request, a stale handle say nothing about the object that was asked for. They are tried again
for a minute or more; what still fails then is `StorageUnavailable`, never "this object is bad". Which errors these are:
`densefeat.storage.failures`.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from densefeat.errors import StorageUnavailable
from densefeat.storage.failures import is_transient, retry_after

__all__ = ["PATIENCE_S", "is_transient", "retried"]

logger = logging.getLogger(__name__)

PATIENCE_S = 75.0  # after the first failure; S3's and GCS's own advice is to back off for up to a minute
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0

Result = TypeVar("Result")


def retried(
    operation: Callable[[], Result],
    place: str,
    *,
    patience_s: float = PATIENCE_S,
    when: Callable[[BaseException], bool] = is_transient,
    stop: threading.Event | None = None,
) -> Result:
    """The result of ``operation``, tried again with growing, random waits while it fails in a way that passes.

    A server that says when to come back (``Retry-After``) is not asked before, as far as the patience reaches. At the
    end of the patience comes a last try.

    Args:
        operation: reads, or writes something that may be written twice.
        place: what it is about, for the message.
        patience_s: how long after the first failure it is tried again.
        when: whether an error is worth another try.
        stop: once set, there is no other try, and no wait.

    Raises:
        StorageUnavailable: it still fails, or was stopped.
        Exception: any other error of ``operation``, as it is.
    """
    wait, end = _FIRST_WAIT_S, None
    while True:
        try:
            return operation()
        except Exception as error:
            if not when(error):
                raise
            failure = error
        now = time.monotonic()
        end = now + patience_s if end is None else end
        if now >= end:
            raise StorageUnavailable(_message(place, failure, patience_s)) from failure
        pause = wait * random.uniform(0.5, 1.5)  # so that many workers do not come back at the same moment
        pause = min(max(pause, retry_after(failure) or 0), end - now)
        logger.debug("%s: %s: %s; trying again in %.1f s", place, type(failure).__name__, failure, pause)
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise StorageUnavailable(f"{place}: stopped while waiting for it to answer") from failure
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _message(place: str, failure: Exception, patience_s: float) -> str:
    return (
        f"{place} did not answer, though it was asked again for {patience_s:.0f} s: {type(failure).__name__}: {failure}"
    )

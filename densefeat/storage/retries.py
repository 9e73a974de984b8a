"""Retry transient storage failures.

An outage, a throttled request or a stale handle says nothing about the requested object. Such errors are retried for a
minute or more; if they persist, `StorageUnavailable` is raised, which never means that the object is bad.
`densefeat.storage.failures` defines which errors are transient.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from densefeat.errors import StorageUnavailable, WrongClock
from densefeat.storage.failures import is_transient, retry_after, wrong_clock

__all__ = ["PATIENCE_S", "is_transient", "retried"]

logger = logging.getLogger(__name__)

PATIENCE_S = 75.0  # after the first failure; S3 and GCS recommend backing off for up to a minute
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
    """Return the result of ``operation``, retrying transient errors with exponential backoff and jitter.

    ``Retry-After`` of a server is respected, but never beyond ``patience_s``. The last try is at the end of
    ``patience_s``.

    Args:
        operation: reads, or writes idempotently.
        place: object in question, for the message.
        patience_s: how long to retry after the first failure.
        when: whether an error is worth retrying.
        stop: once set, retries and waits end.

    Raises:
        StorageUnavailable: the operation still fails, or was stopped.
        WrongClock: the storage refuses requests of this machine.
        Exception: any other error of ``operation``, unchanged.
    """
    wait, end = _FIRST_WAIT_S, None
    while True:
        try:
            return operation()
        except Exception as error:
            if (clock := wrong_clock(error)) is not None:
                raise WrongClock(f"{place}: {clock}") from error
            if not when(error):
                raise
            failure = error
        now = time.monotonic()
        end = now + patience_s if end is None else end
        if now >= end:
            raise StorageUnavailable(_message(place, failure, patience_s)) from failure
        pause = wait * random.uniform(0.5, 1.5)  # so that workers do not all retry at once
        pause = min(max(pause, retry_after(failure) or 0), end - now)
        logger.debug("%s: %s: %s; trying again in %.1f s", place, type(failure).__name__, failure, pause)
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise StorageUnavailable(f"{place}: stopped while waiting for an answer") from failure
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _message(place: str, failure: Exception, patience_s: float) -> str:
    return f"{place} did not answer, although retried for {patience_s:.0f} s: {type(failure).__name__}: {failure}"

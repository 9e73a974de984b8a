"""Limits on the time and size of a response, independent of the server."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem

from densefeat.errors import StorageUnavailable

__all__ = ["Bounds", "Stop", "TooLarge", "run_bounded"]

_POLL_S = 0.25  # maximum delay until a wait notices that it was stopped

Result = TypeVar("Result")


@dataclass(frozen=True)
class Bounds:
    """Timeouts of one request, in seconds.

    Attributes:
        connect_s: to connect, including TLS.
        between_bytes_s: without receiving a byte, once connected.
        slack_s: for a response without bytes; each byte adds to it.
        bytes_per_s: minimum rate after the slack; a slower response is aborted.
        in_all_s: for any response.
    """

    connect_s: float = 10.0
    between_bytes_s: float = 30.0
    slack_s: float = 60.0
    bytes_per_s: float = 50_000.0
    in_all_s: float = 900.0  # half of the time that a worker may make no progress (--stall-timeout-s)

    def for_bytes(self, nbytes: int) -> float:
        """Time limit of a response of ``nbytes`` bytes."""
        return min(self.slack_s + nbytes / self.bytes_per_s, self.in_all_s)


class Stop(threading.Event):
    """An event that is also set when ``outer`` is, to stop a single read or all reads of a worker."""

    def __init__(self, outer: threading.Event | None = None) -> None:
        super().__init__()
        self._outer = outer

    def is_set(self) -> bool:
        """Whether it or ``outer`` is set."""
        return super().is_set() or (self._outer is not None and self._outer.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it or ``outer`` is set, noticed within a quarter of a second; return whether it is."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True


class TooLarge(Exception):  # noqa: N818 - says what it is
    """There are more bytes than allowed.

    Attributes:
        nbytes: how many there are, if known.
    """

    def __init__(self, nbytes: int | None) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


def run_bounded(
    filesystem: AsyncFileSystem, work: Coroutine[Any, Any, Result], seconds: float, stop: threading.Event
) -> Result:
    """Run a coroutine in the event loop of its file system; cancel it after ``seconds``, or when stopped.

    Raises:
        TimeoutError: the coroutine took longer.
        StorageUnavailable: it was stopped.
        Exception: any error of the coroutine.
    """
    future = asyncio.run_coroutine_threadsafe(_within(work, seconds), filesystem.loop)
    while not wait([future], timeout=_POLL_S).done:
        if stop.is_set():
            future.cancel()
            raise StorageUnavailable("stopped while waiting for an answer")
    return future.result()


async def _within(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await work
    except TimeoutError as error:
        if not deadline.expired():  # a timeout of the client
            raise
        raise TimeoutError(f"no complete answer in {seconds:.0f} s") from error

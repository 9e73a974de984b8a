"""How long an answer may take, and how large it may be, whatever a server does."""

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

_POLL_S = 0.25  # how soon what is waited for ends when it is stopped

Result = TypeVar("Result")


@dataclass(frozen=True)
class Bounds:
    """Time-outs of one request, in seconds.

    Attributes:
        connect_s: for the connection, with its encryption.
        between_bytes_s: without a byte, once connected.
        slack_s: for an answer of no bytes at all; each byte adds to it.
        bytes_per_s: an answer that is slower than this, after the slack, is given up.
        in_all_s: for any answer.
    """

    connect_s: float = 10.0
    between_bytes_s: float = 30.0
    slack_s: float = 60.0
    bytes_per_s: float = 50_000.0
    in_all_s: float = 900.0  # half of what a worker is allowed without progress (--stall-timeout-s)

    def for_bytes(self, nbytes: int) -> float:
        """How long an answer of so many bytes may take."""
        return min(self.slack_s + nbytes / self.bytes_per_s, self.in_all_s)


class Stop(threading.Event):
    """An event that counts as set, too, when ``outer`` is: one reading ends by itself, or with all of a worker."""

    def __init__(self, outer: threading.Event | None = None) -> None:
        super().__init__()
        self._outer = outer

    def is_set(self) -> bool:
        """Whether it or ``outer`` is set."""
        return super().is_set() or (self._outer is not None and self._outer.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it or ``outer`` is set, within a quarter of a second; whether it is."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True


class TooLarge(Exception):  # noqa: N818 - says what it is
    """There are more bytes than are wanted.

    Attributes:
        nbytes: how many there are, if that is known.
    """

    def __init__(self, nbytes: int | None) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


def run_bounded(
    filesystem: AsyncFileSystem, work: Coroutine[Any, Any, Result], seconds: float, stop: threading.Event
) -> Result:
    """Run a coroutine in the loop of its file system; cancelled after so many seconds, or when stopped.

    Raises:
        TimeoutError: it took longer.
        StorageUnavailable: it was stopped.
        Exception: what it raises.
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
        if not deadline.expired():  # one of the client's
            raise
        raise TimeoutError(f"no complete answer in {seconds:.0f} s") from error

"""Child processes that are killed, or stopped, before one of the operations on their storage; waiting for others."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from densefeat.storage.objects import Objects

FORK = multiprocessing.get_context("fork")  # nothing that children here do needs more than a file system


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    """What ``condition`` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError


def before_operation(number: int, what: Callable[[], None]) -> None:
    """Do ``what`` before the operation of that number (from 0) of those that change something, in this process.

    Those of leases, which threads of their own write from time to time, do not count.
    """
    counted = iter(range(10_000))

    def wrapped(operation: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Objects, *arguments: Any) -> None:
            if not str(arguments[0]).startswith("_jobs/") and next(counted) == number:
                what()
            operation(self, *arguments)

        return wrapper

    for name in ("put", "create", "delete"):
        setattr(Objects, name, wrapped(getattr(Objects, name)))


def run_killed(number: int, job: Callable[[], Any]) -> bool:
    """Run ``job`` in a child that is killed by SIGKILL before that operation; whether it was, or came to its end."""
    child = FORK.Process(target=_run_killed, args=(number, job))
    child.start()
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def _run_killed(number: int, job: Callable[[], Any]) -> None:
    before_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    job()

"""Work in a bounded number of threads, with results in order."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["PARALLEL_REQUESTS", "Threads", "emptied", "in_order", "results_of"]

# Small objects at once: enough to hide the latency of an object store, few enough for its limits and for file handles.
PARALLEL_REQUESTS = 32

_CLOSING_S = 5.0  # how long to wait for tasks that have begun, when a pool is closed

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = PARALLEL_REQUESTS
) -> Iterator[Result]:
    """Apply ``function`` to each item in ``threads`` threads; yield the results in the order of the items.

    At most ``threads`` results are computed ahead of the one that is yielded. The first error, in the order of the
    items, is raised; items not yet begun are then dropped, as when the iterator is closed.
    """
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def emptied(items: list[Item]) -> Iterator[Item]:
    """Yield the items in order, and take them out of the list, so that whoever gets them alone has them."""
    items.reverse()
    while items:
        yield items.pop()


def results_of(futures: list[Future[Any] | None]) -> Iterator[Any]:
    """Yield the results in order, None for None, and empty the list.

    Raises:
        Exception: that of the first task that failed.
    """
    for future in emptied(futures):
        yield None if future is None else future.result()


class Threads:
    """A pool of daemon threads that is closed with its ``with`` block.

    Closing drops the tasks that have not begun, and waits up to 5 seconds for the others. A thread that still waits for
    an answer of the storage then ends with that answer; it does not keep the interpreter from exiting, as threads of a
    ``ThreadPoolExecutor`` do.

    Args:
        count: number of threads.

    Attributes:
        stopping: set when the pool is being closed, so that tasks can end early.
    """

    def __init__(self, count: int) -> None:
        self.stopping = threading.Event()
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="densefeat", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + _CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with contextlib.suppress(queue.Empty):
            while True:
                _cancel(self._tasks.get_nowait())

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run ``function`` in a thread; tasks begin in the order in which they are submitted."""
        future: Future[Result] = Future()
        self._tasks.put((future, function))
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            if self.stopping.is_set():
                _cancel(task)
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # for whoever waits for the result
                    future.set_exception(error)
            del task, future, function  # or an idle thread would hold their memory


def _cancel(task: "tuple[Future[Any], Callable[[], Any]] | None") -> None:
    if task is not None and task[0].cancel():
        task[0].set_running_or_notify_cancel()  # wakes whoever waits

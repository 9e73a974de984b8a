"""Work in a bounded number of threads, with results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["PARALLEL_REQUESTS", "in_order"]

# Small objects at once: enough to hide the latency of an object store, few enough for its limits and for file handles.
PARALLEL_REQUESTS = 32

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

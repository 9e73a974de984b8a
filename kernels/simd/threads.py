"""Work shared out over Python's threads: numba's own are neither thread- nor fork-safe.

Torch's are not fork-safe either. So what converts nothing works in a forked process, a stage of float32, and what calls
torch's loops hangs there, as they do by themselves: half precision, and gradients.

Compiled functions run without Python's lock. What each job writes must not depend on who does it, nor on how the work
was cut into jobs.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["in_threads", "row_jobs"]

Job = TypeVar("Job")


def row_jobs(images: int, rows: int, least: int) -> list[tuple[int, int, int]]:
    """All rows of some images, cut into (image, first row, past the last).

    Several jobs for each thread, as then one that is held up delays less, but of so many rows at least.
    """
    step = max(least, images * rows // (4 * torch.get_num_threads()))
    return [(image, start, min(start + step, rows)) for image in range(images) for start in range(0, rows, step)]


def in_threads(jobs: Iterable[Job], worker: Callable[[], Callable[[Job], None]], most: int) -> None:
    """Do all jobs, on torch's number of threads, this one included.

    Args:
        jobs: in any order.
        worker: called once by each thread; makes its scratch memory and returns what does a job.
        most: threads, of which each should have a tenth of a millisecond to do: it takes as long to wake one.
    """
    left = deque(jobs)

    def work() -> None:
        do = worker()
        while True:
            try:
                job = left.popleft()
            except IndexError:
                break
            do(job)

    count = min(torch.get_num_threads(), len(left), most) - 1  # none if most is 0
    helpers = [_pool(os.getpid()).submit(work) for _ in range(count)]
    try:
        work()
    finally:
        left.clear()  # if this thread failed
        done, _ = wait([helper for helper in helpers if not helper.cancel()])
    for helper in done:
        helper.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Kept, as to start threads takes longer than a small stage; by process, as a fork has none of its parent's."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, torch.get_num_threads()), thread_name_prefix="kernels")

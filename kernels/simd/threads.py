"""Distribute work over Python threads, because numba's own threads are neither thread- nor fork-safe.

Torch's threads are not fork-safe either. In a forked process, a stage in float32 works, because it converts nothing.
Half precision and gradients call torch's loops and hang there, as those loops do by themselves.

Compiled functions run without Python's lock. What a job writes must not depend on the thread that runs it, nor on how
the work was split into jobs.
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
    """Split all rows of a batch into jobs (image, first row, row after the last).

    There are several jobs per thread, so that a slow thread causes less delay.

    Args:
        images: number of images.
        rows: rows of each image.
        least: smallest number of rows in a job, except for the last job of an image.
    """
    step = max(least, images * rows // (4 * torch.get_num_threads()))
    return [(image, start, min(start + step, rows)) for image in range(images) for start in range(0, rows, step)]


def in_threads(jobs: Iterable[Job], worker: Callable[[], Callable[[Job], None]], most: int) -> None:
    """Run all jobs on torch's number of threads, including this one.

    Args:
        jobs: the jobs, which may run in any order.
        worker: called once in each thread; allocates its scratch memory and returns the function that runs a job.
        most: maximum number of threads. Each should have a tenth of a millisecond of work: waking one takes as long.
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
    """Cached, because starting threads takes longer than a small stage; per process, as a fork has no threads."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, torch.get_num_threads()), thread_name_prefix="kernels")

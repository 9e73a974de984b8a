"""The interface of a job's workers, and the simplest implementation: one worker in this process.

``pipeline/run/ray/workers.py`` has the workers on a Ray cluster.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeVar

from densefeat.errors import WrongClock
from pipeline.errors import JobError
from pipeline.run.failures import FailureLog, OutageLog, is_suspect
from pipeline.run.feature_worker import FeatureWorker, WorkerSpec, pick_device
from pipeline.run.queue import OUTAGE_S, TaskFailed, TaskQueue
from pipeline.run.resources import threads_in_operations, torch_threads
from pipeline.run.shard_worker import make_worker

__all__ = ["InlineWorkers", "Result", "TaskFailed", "Workers", "if_given_up"]

Result = TypeVar("Result")

_POLL_S = 0.5
_STOP_S = 10.0


class Workers(Protocol):
    """Runs methods of a worker, many at a time."""

    @property
    def count(self) -> int:
        """Number of workers that the job asks for, at most."""
        ...

    def map(
        self,
        method: Callable[..., Result],
        tasks: Sequence[tuple[Any, ...]],
        on_progress: Callable[[int], None] = lambda images: None,
        *,
        attempts: int | None = None,
        alone: bool = False,
    ) -> Iterator[tuple[int, Result | TaskFailed]]:
        """Call a method of the worker with each task's arguments.

        Args:
            method: method of the worker's class, unbound, e.g. ``ShardWorker.make_shard``.
            tasks: arguments of each task, without the worker.
            on_progress: called regularly with the number of images done since the last call.
            attempts: number of failures after which a task is given up; None: the workers' own.
            alone: whether each task runs alone on its worker, because it may make the worker fail.

        Yields:
            (index of the task, its result or ``TaskFailed``), in the order in which tasks end.

        A task that fails is retried later, on another worker if there is one, up to a number of attempts.

        Raises:
            JobError: a task raised it: the job cannot continue.
        """
        ...

    def share(self, value: Any) -> Any:
        """Prepare ``value`` for use in many tasks: it is sent to each machine only once."""
        ...


class InlineWorkers:
    """One worker, in this process, without Ray: for debuggers, profilers, and where Ray cannot start.

    Args:
        spec: spec of the worker.
        attempts: number of failures after which a task is given up.
        first_wait_s: as for `TaskQueue`.
        outage_s: as for `TaskQueue`.
        make: builds the worker.

    Attributes:
        worker: the worker, once entered.
    """

    count = 1

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        attempts: int = 3,
        first_wait_s: float = 5.0,
        outage_s: float = OUTAGE_S,
        make: Callable[[WorkerSpec], FeatureWorker] = make_worker,
    ) -> None:
        self._spec, self._make = spec, make
        self._attempts, self._first_wait_s = attempts, first_wait_s
        self._running: dict[Future[Any], int] = {}
        self._failures, self._outage_s, self._outages = FailureLog(), outage_s, OutageLog(outage_s)
        self._entered = ExitStack()

    def __enter__(self) -> "InlineWorkers":
        """Build the worker."""
        threads = threads_in_operations(pick_device(self._spec.device), self._spec.threads)
        with ExitStack() as stack:
            stack.enter_context(torch_threads(threads))
            self.worker = self._make(self._spec)
            self._pool = ThreadPoolExecutor(self.worker.tasks_at_once, "task")
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop tasks that are still running (after an error) before their next batch."""
        with self._entered:
            self.worker.stop()
            self._pool.shutdown(wait=False, cancel_futures=True)
            wait([task for task in self._running if not task.cancelled()], timeout=_STOP_S)

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def map(
        self,
        method: Callable[..., Result],
        tasks: Sequence[tuple[Any, ...]],
        on_progress: Callable[[int], None] = lambda images: None,
        *,
        attempts: int | None = None,
        alone: bool = False,
    ) -> Iterator[tuple[int, Result | TaskFailed]]:
        """As ``Workers.map``."""
        before = self.worker.images_done
        queue = TaskQueue[InlineWorkers](
            len(tasks),
            attempts=attempts or self._attempts,
            first_wait_s=self._first_wait_s,
            outage_s=self._outage_s,
            alone=alone,
        )
        queue.join(self, None, self.worker.tasks_at_once, time.monotonic())
        while queue.left:
            for _, task in queue.hand_out(time.monotonic()):
                self._running[self._pool.submit(method, self.worker, *tasks[task])] = task
            if not self._running:
                time.sleep(min(_POLL_S, self._first_wait_s))
            for future in wait(self._running, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                yield from self._settle(queue, self._running.pop(future), future)
            self._outages.watch(queue.outage)
            on_progress(self.worker.images_done - before)
            before = self.worker.images_done

    def _settle(
        self, queue: "TaskQueue[InlineWorkers]", task: int, future: Future[Result]
    ) -> Iterator[tuple[int, Result | TaskFailed]]:
        """Handle a task that has ended; yields it unless it is to be retried."""
        error = future.exception()
        if error is None:
            queue.done(task, time.monotonic())
            yield task, future.result()
            return
        if isinstance(error, JobError | WrongClock) or not isinstance(error, Exception):
            raise error
        reason, now = self._failures.told(error, "a task failed"), time.monotonic()
        suspect = is_suspect(error)
        given_up = queue.failed(task, reason, now, suspect=True) if suspect else queue.unavailable(task, reason, now)
        yield from if_given_up(task, given_up)


def if_given_up(task: int, given_up: TaskFailed | None) -> Iterator[tuple[int, TaskFailed]]:
    """Yield a task that is not tried again."""
    if given_up is not None:
        yield task, given_up

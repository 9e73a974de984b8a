"""What a job needs of its workers, and the simplest that gives it: one, in this process.

``pipeline/runner.py`` has those that run on a Ray cluster.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from pipeline.feature_worker import WorkerSpec, shards_in_worker
from pipeline.worker import make_worker

_POLL_S = 0.5


@dataclass(frozen=True)
class TaskFailed:
    """A task that was given up.

    Attributes:
        attempts: how often it was tried.
        reason: of the last failure, one line.
    """

    attempts: int
    reason: str


class Workers(Protocol):
    """Something that runs a worker's methods, many at a time."""

    count: int

    def map(
        self, method: str, tasks: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None] = lambda images: None
    ) -> Iterator[tuple[int, Any]]:
        """Call the worker's ``method`` with each task's arguments.

        Args:
            method: name of a ``pipeline.worker`` method.
            tasks: arguments.
            on_progress: called now and then with the images done since the last call.

        Yields:
            (index of the task, its result or ``TaskFailed``), as they end.

        Raises:
            JobError: a worker says that the job cannot go on.
        """
        ...

    def share(self, value: Any) -> Any:
        """``value`` for use in many tasks: sent to each machine once."""
        ...


class InlineWorkers:
    """One worker, in this process, without Ray: for debuggers, profilers, and where Ray cannot start.

    An error is raised, not tried again: it is here to be looked at.
    """

    count = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = make_worker(spec)
        self._tasks_at_once = shards_in_worker(self._worker.device.type, spec.threads)

    def __enter__(self) -> "InlineWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to let go: the worker's threads end with the process."""

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def map(
        self, method: str, tasks: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None] = lambda images: None
    ) -> Iterator[tuple[int, Any]]:
        """As ``Workers.map``."""
        before = self._worker.images_done
        with ThreadPoolExecutor(self._tasks_at_once) as pool:
            waiting = iter(enumerate(tasks))
            running: dict[Future[Any], int] = {}
            while True:
                while len(running) < self._tasks_at_once and (task := next(waiting, None)) is not None:
                    running[pool.submit(getattr(self._worker, method), *task[1])] = task[0]
                if not running:
                    return
                ended, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield running.pop(future), future.result()
                on_progress(self._worker.images_done - before)
                before = self._worker.images_done

"""Which task goes to which worker, and when: all of the policy, and no Ray. Time is passed in.

A task that failed is tried again later, elsewhere, and, where it may have been at fault itself, alone. A worker that is
lost with its node costs its tasks nothing.
"""

from bisect import insort
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["TaskFailed", "TaskQueue"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 60.0
_ELSEWHERE_S = 60.0
_MOST_LOSSES = 10

Worker = TypeVar("Worker", bound=Hashable)


@dataclass(frozen=True)
class TaskFailed:
    """A task that was given up.

    Attributes:
        attempts: how often it was tried.
        reason: of the last failure, one line.
    """

    attempts: int
    reason: str


@dataclass
class _Task:
    attempts: int = 0  # that failed
    losses: int = 0
    suspect: bool = False  # it may be what stops its workers: it runs alone
    not_before: float = 0.0
    on: tuple[Hashable, str | None] = (None, None)  # worker and node that have it, or had it last
    workers: set[Hashable] = field(default_factory=set)  # that it failed on
    nodes: set[str] = field(default_factory=set)


@dataclass
class _Worker:
    node: str | None
    room: int
    running: set[int] = field(default_factory=set)
    moved_at: float = 0.0  # when it last showed progress
    paused: bool = False


class TaskQueue(Generic[Worker]):
    """The tasks 0 … count - 1 of one map, and the workers that take them.

    Args:
        count: of tasks.
        attempts: how often a task may fail before it is given up.
        first_wait_s: before a task that failed is tried again; doubled with every further failure, up to a minute.
        elsewhere_s: how long a task that failed waits for a worker that it did not fail on.
        most_losses: how often a task may be lost with its node before that counts as a failure of its own.
    """

    def __init__(
        self,
        count: int,
        *,
        attempts: int,
        first_wait_s: float = _FIRST_WAIT_S,
        elsewhere_s: float = _ELSEWHERE_S,
        most_losses: int = _MOST_LOSSES,
    ) -> None:
        self._attempts, self._most_losses = attempts, most_losses
        self._first_wait_s, self._elsewhere_s = first_wait_s, elsewhere_s
        self._fresh = deque(range(count))
        self._again: list[int] = []  # failed or lost before: after all others
        self._tasks = {task: _Task() for task in range(count)}
        self._workers: dict[Worker, _Worker] = {}

    @property
    def left(self) -> int:
        """Tasks that are neither done nor given up."""
        return len(self._tasks)

    def join(self, worker: Worker, node: str | None, room: int, now: float) -> None:
        """A worker is ready.

        Args:
            worker: anything that identifies it.
            node: that it is on.
            room: tasks that it can have at once.
            now: seconds of a monotonic clock, here and everywhere else.
        """
        self._workers[worker] = _Worker(node, room, moved_at=now)

    def leave(self, worker: Worker) -> list[int]:
        """A worker is gone; the tasks it had, each of which has to be called ``failed`` or ``lost``."""
        gone = self._workers.pop(worker, None)
        return sorted(gone.running) if gone else []

    def pause(self, worker: Worker, paused: bool = True) -> None:
        """Give a worker no new tasks for now."""
        if worker in self._workers:
            self._workers[worker].paused = paused

    def hand_out(self, now: float) -> list[tuple[Worker, int]]:
        """Tasks to be started now: breadth first, so that the last tasks spread over all workers."""
        handed: list[tuple[Worker, int]] = []
        while True:
            for worker in sorted(self._workers, key=lambda name: len(self._workers[name].running)):
                task = self._take(worker, now)
                if task is not None:
                    handed.append((worker, task))
                    break
            else:
                return handed

    def done(self, task: int, now: float) -> None:
        """A task ended well."""
        self._release(task, now)
        del self._tasks[task]

    def failed(self, task: int, reason: str, now: float, *, suspect: bool) -> TaskFailed | None:
        """A task failed: it goes to the end, or is given up, which is what is returned then.

        Args:
            task: that failed.
            reason: one line.
            now: as everywhere.
            suspect: whether it may be what made its worker fail (a crash, no memory): it runs alone from now on. The
                storage's silence is nobody's fault.
        """
        self._release(task, now)
        state = self._tasks[task]
        state.attempts += 1
        if state.attempts >= self._attempts:
            del self._tasks[task]
            return TaskFailed(state.attempts, reason)
        state.suspect |= suspect
        state.not_before = now + min(self._first_wait_s * 2 ** (state.attempts - 1), _LONGEST_WAIT_S)
        worker, node = state.on
        state.workers.add(worker)
        if node is not None:
            state.nodes.add(node)
        self._put_back(task)
        return None

    def lost(self, task: int, reason: str, now: float) -> TaskFailed | None:
        """The task's worker went with its node, or out of reach. That is no failure, unless it happens all the time."""
        self._release(task, now)
        state = self._tasks[task]
        state.losses += 1
        if state.losses > self._most_losses:
            return self.failed(task, reason, now, suspect=True)
        state.not_before = now
        self._put_back(task)
        return None

    def progressed(self, worker: Worker, now: float) -> None:
        """A worker did something."""
        if worker in self._workers:
            self._workers[worker].moved_at = now

    def stalled(self, timeout_s: float, now: float) -> list[Worker]:
        """Workers that have tasks and showed no progress for so long."""
        return [worker for worker, state in self._workers.items() if state.running and now - state.moved_at > timeout_s]

    def _take(self, worker: Worker, now: float) -> int | None:
        state = self._workers[worker]
        if state.paused or len(state.running) >= state.room or any(self._tasks[t].suspect for t in state.running):
            return None
        task = self._fresh.popleft() if self._fresh else self._take_again(worker, now)
        if task is not None:
            if not state.running:
                state.moved_at = now
            state.running.add(task)
            self._tasks[task].on = worker, state.node
        return task

    def _take_again(self, worker: Worker, now: float) -> int | None:
        """A task that failed before, and may run here: the one that has been due longest."""
        idle = not self._workers[worker].running
        for task in self._again:
            state = self._tasks[task]
            if state.not_before > now:
                return None
            if (idle or not state.suspect) and self._may_go(state, worker, now):
                self._again.remove(task)
                return task
        return None

    def _may_go(self, task: _Task, worker: Worker, now: float) -> bool:
        """Whether no other worker is a better place for it, or it has waited for one long enough."""
        if now >= task.not_before + self._elsewhere_s:
            return True
        others = [name for name, state in self._workers.items() if not state.paused]
        return self._familiarity(task, [worker]) <= self._familiarity(task, others)

    def _familiarity(self, task: _Task, workers: Iterable[Worker]) -> int:
        """0: one of the workers is on a node that the task never failed on; 1: a new worker; 2: it failed on all."""
        return min(2 if worker in task.workers else int(self._workers[worker].node in task.nodes) for worker in workers)

    def _put_back(self, task: int) -> None:
        insort(self._again, task, key=lambda task: self._tasks[task].not_before)

    def _release(self, task: int, now: float) -> None:
        """Take a task from its worker, if that is still there."""
        for worker in self._workers.values():
            if task in worker.running:
                worker.running.remove(task)
                worker.moved_at = now

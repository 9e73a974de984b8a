"""Decide which task goes to which worker, and when. All scheduling decisions are here, independent of Ray. Time is
passed in.

A task that failed is retried later, on another worker if possible, and alone if it may itself be the cause. The loss
of a worker with its node counts as a failed attempt of its tasks only after many losses.
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
        attempts: number of failed attempts.
        reason: reason of the last failure, one line.
    """

    attempts: int
    reason: str


@dataclass
class _Task:
    attempts: int = 0  # failed attempts
    losses: int = 0
    suspect: bool = False  # it may be what makes its workers fail, so it runs alone
    not_before: float = 0.0
    on: tuple[Hashable, str | None] = (None, None)  # current or last worker, and its node
    workers: set[Hashable] = field(default_factory=set)  # workers and nodes on which it failed
    nodes: set[str] = field(default_factory=set)


@dataclass
class _Worker:
    node: str | None
    room: int
    running: set[int] = field(default_factory=set)
    moved_at: float = 0.0  # when it last showed progress
    paused: bool = False


class TaskQueue(Generic[Worker]):
    """The tasks 0 … count - 1 of one map, and the workers that run them.

    Args:
        count: number of tasks.
        attempts: number of failures after which a task is given up.
        first_wait_s: wait before the first retry of a task; doubled with every further failure, up to a minute.
        elsewhere_s: how long a failed task waits for a worker on which it has not failed.
        most_losses: how often a task may be lost with its node before a loss counts as a failure.
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
        self._again: list[int] = []  # failed or lost before; they run after all others
        self._tasks = {task: _Task() for task in range(count)}
        self._workers: dict[Worker, _Worker] = {}

    @property
    def left(self) -> int:
        """Tasks that are neither done nor given up."""
        return len(self._tasks)

    def join(self, worker: Worker, node: str | None, room: int, now: float) -> None:
        """Add a worker that is ready.

        Args:
            worker: anything that identifies it.
            node: its node.
            room: number of tasks that it can run at once.
            now: seconds of a monotonic clock, as in all methods.
        """
        self._workers[worker] = _Worker(node, room, moved_at=now)

    def leave(self, worker: Worker) -> list[int]:
        """Remove a worker; returns its tasks, for each of which ``failed`` or ``lost`` must be called."""
        gone = self._workers.pop(worker, None)
        return sorted(gone.running) if gone else []

    def pause(self, worker: Worker, paused: bool = True) -> None:
        """Give a worker no new tasks until it is resumed with ``paused=False``."""
        if worker in self._workers:
            self._workers[worker].paused = paused

    def hand_out(self, now: float) -> list[tuple[Worker, int]]:
        """Tasks to start now, with their workers; breadth first, so that the last tasks spread over all workers."""
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
        """Record that a task succeeded."""
        self._release(task, now)
        del self._tasks[task]

    def failed(self, task: int, reason: str, now: float, *, suspect: bool) -> TaskFailed | None:
        """Record that a task failed: it is retried after all others, or given up.

        Args:
            task: the task.
            reason: reason of the failure, one line.
            now: as in `join`.
            suspect: whether the task may have made its worker fail (a crash, no memory); it then runs alone from now
                on. Storage that does not answer is not the task's fault.

        Returns:
            The failure if the task is given up, else None.
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
        """Record that a task's worker was lost with its node or is unreachable. Arguments and result as for `failed`.

        A loss counts as a failure only after more than ``most_losses`` of them.
        """
        self._release(task, now)
        state = self._tasks[task]
        state.losses += 1
        if state.losses > self._most_losses:
            return self.failed(task, reason, now, suspect=True)
        state.not_before = now
        self._put_back(task)
        return None

    def progressed(self, worker: Worker, now: float) -> None:
        """Record that a worker made progress."""
        if worker in self._workers:
            self._workers[worker].moved_at = now

    def stalled(self, timeout_s: float, now: float) -> list[Worker]:
        """Workers that have tasks and made no progress for more than ``timeout_s``."""
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
        """Take the failed or lost task that has been due longest and may run on this worker, if there is one."""
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
        """Whether no other worker is a better choice for the task, or it has waited long enough for one."""
        if now >= task.not_before + self._elsewhere_s:
            return True
        others = [name for name, state in self._workers.items() if not state.paused]
        return self._familiarity(task, [worker]) <= self._familiarity(task, others)

    def _familiarity(self, task: _Task, workers: Iterable[Worker]) -> int:
        """0: a worker is on a node where the task never failed; 1: it never failed on a worker; 2: it failed on all."""
        return min(2 if worker in task.workers else int(self._workers[worker].node in task.nodes) for worker in workers)

    def _put_back(self, task: int) -> None:
        insort(self._again, task, key=lambda task: self._tasks[task].not_before)

    def _release(self, task: int, now: float) -> None:
        """Take a task from its worker, if the worker is still here."""
        for worker in self._workers.values():
            if task in worker.running:
                worker.running.remove(task)
                worker.moved_at = now

"""Decide which task goes to which worker, and when. All scheduling decisions are here, independent of Ray. Time is
passed in.

A task that failed is retried later, on another worker if possible, and alone if it may itself be the cause. The loss
of a worker with its node counts as a failed attempt of its tasks only after many losses. A storage that answers nobody
counts as no attempt at all: the queue then pauses, and tries one task at a time until the storage is back.

The cost of every call is independent of the number of tasks; only tasks in trouble are remembered.
"""

import heapq
from bisect import insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from densefeat.storage.retries import PATIENCE_S

__all__ = ["OUTAGE_S", "TaskFailed", "TaskQueue"]

OUTAGE_S = 3600.0
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
        suspect: whether the task itself may be the cause, and not the storage.
    """

    attempts: int
    reason: str
    suspect: bool = field(default=False, compare=False)


@dataclass
class _Task:
    attempts: int = 0  # failed attempts
    losses: int = 0
    suspect: bool = False  # it may be what makes its workers fail, so it runs alone
    unserved: bool = False  # the storage failed it while it served others
    not_before: float = 0.0
    workers: set[Hashable] = field(default_factory=set)  # workers and nodes on which it failed
    nodes: set[str] = field(default_factory=set)


@dataclass
class _Worker:
    number: int  # in the order in which they joined
    node: str | None
    room: int
    running: set[int] = field(default_factory=set)
    moved_at: float = 0.0  # when it last showed progress
    paused: bool = False

    @property
    def open(self) -> bool:
        return not self.paused and len(self.running) < self.room


@dataclass
class _Outage:
    since: float
    next_try: float
    tries: int = 0
    trying: int | None = None  # the task that is tried


class TaskQueue(Generic[Worker]):
    """The tasks 0 … count - 1 of one map, and the workers that run them.

    Args:
        count: number of tasks.
        attempts: number of failures after which a task is given up.
        first_wait_s: wait before the first retry of a task; doubled with every further failure, up to a minute.
        elsewhere_s: how long a failed task waits for a worker on which it has not failed.
        most_losses: how often a task may be lost with its node before a loss counts as a failure.
        outage_s: how long the storage may answer nobody before that counts as failures.
        alone: whether every task runs alone on its worker from the start, because it may make the worker fail.
    """

    def __init__(
        self,
        count: int,
        *,
        attempts: int,
        first_wait_s: float = _FIRST_WAIT_S,
        elsewhere_s: float = _ELSEWHERE_S,
        most_losses: int = _MOST_LOSSES,
        outage_s: float = OUTAGE_S,
        alone: bool = False,
    ) -> None:
        self._attempts, self._most_losses, self._alone = attempts, most_losses, alone
        self._first_wait_s, self._elsewhere_s, self._outage_s = first_wait_s, elsewhere_s, outage_s
        self._count, self._next, self._over = count, 0, 0
        self._again: list[int] = []  # failed or lost before; they run after all others
        self._troubled: dict[int, _Task] = {}  # tasks that failed or were lost
        self._on: dict[int, tuple[Worker, str | None]] = {}  # task -> its current or last worker, and its node
        self._workers: dict[Worker, _Worker] = {}
        self._open: dict[Worker, _Worker] = {}
        self._joined = 0
        self._outage: _Outage | None = None
        self._done_at = float("-inf")  # when a task last succeeded

    @property
    def left(self) -> int:
        """Tasks that are neither done nor given up."""
        return self._count - self._over

    @property
    def waiting(self) -> int:
        """Tasks that no worker is running now."""
        return self._count - self._next + len(self._again)

    @property
    def outage(self) -> tuple[float, float] | None:
        """When the storage stopped to answer, and when the next task is tried; None: the queue is not paused."""
        return None if self._outage is None else (self._outage.since, self._outage.next_try)

    def join(self, worker: Worker, node: str | None, room: int, now: float) -> None:
        """Add a worker that is ready.

        Args:
            worker: anything that identifies it.
            node: its node.
            room: number of tasks that it can run at once.
            now: seconds of a monotonic clock, as in all methods.
        """
        self._joined += 1
        self._workers[worker] = _Worker(self._joined, node, room, moved_at=now)
        self._update(worker)

    def leave(self, worker: Worker) -> list[int]:
        """Remove a worker; returns its tasks, for each of which ``failed`` or ``lost`` must be called."""
        gone = self._workers.pop(worker, None)
        self._open.pop(worker, None)
        return sorted(gone.running) if gone else []

    def pause(self, worker: Worker, paused: bool = True) -> None:
        """Give a worker no new tasks until it is resumed with ``paused=False``."""
        if worker in self._workers:
            self._workers[worker].paused = paused
            self._update(worker)

    def runs_alone(self, task: int) -> bool:
        """Whether a task runs alone on its worker, because it may make the worker fail."""
        return self._alone or (task in self._troubled and self._troubled[task].suspect)

    def idle(self) -> list[Worker]:
        """Workers that run no task."""
        return [worker for worker, state in self._workers.items() if not state.running]

    def hand_out(self, now: float) -> list[tuple[Worker, int]]:
        """Tasks to start now, with their workers; breadth first, so that the last tasks spread over all workers."""
        if self._outage is not None:
            return self._hand_out_one(self._outage, now)
        return self._hand_out(now, self.waiting)

    def done(self, task: int, now: float) -> None:
        """Record that a task succeeded."""
        self._release(task, now)
        self._end(task)
        self._done_at = now
        self._outage = None

    def failed(self, task: int, reason: str, now: float, *, suspect: bool) -> TaskFailed | None:
        """Record that a task failed: it is retried after all others, or given up.

        Args:
            task: the task.
            reason: reason of the failure, one line.
            now: as in `join`.
            suspect: whether the task may have made its worker fail (a crash, no memory); it then runs alone from now
                on.

        Returns:
            The failure if the task is given up, else None.
        """
        self._release(task, now)
        state = self._troubled.setdefault(task, _Task())
        state.attempts += 1
        state.suspect |= suspect
        if state.attempts >= self._attempts:
            self._end(task)
            return TaskFailed(state.attempts, reason, suspect)
        state.not_before = now + self._wait(state.attempts)
        worker, node = self._on[task]
        state.workers.add(worker)
        if node is not None:
            state.nodes.add(node)
        self._put_back(task)
        return None

    def unavailable(self, task: int, reason: str, now: float) -> TaskFailed | None:
        """Record that the storage did not answer a task. Arguments and result as for `failed`.

        It counts as a failure if the storage served other tasks while this one was retrying, now or at an earlier time:
        then the objects of this task are what does not answer. Otherwise the storage is down, and the queue pauses.
        """
        state = self._troubled.setdefault(task, _Task())
        state.unserved |= now - self._done_at < PATIENCE_S
        outage = self._outage
        if state.unserved or (outage is not None and now - outage.since > self._outage_s):
            return self.failed(task, reason, now, suspect=False)
        self._release(task, now)
        if outage is None:
            outage = self._outage = _Outage(now, now)
        outage.tries += 1
        outage.next_try = now + self._wait(outage.tries)
        state.not_before = now
        self._put_back(task)
        return None

    def lost(self, task: int, reason: str, now: float) -> TaskFailed | None:
        """Record that a task's worker was lost with its node or is unreachable. Arguments and result as for `failed`.

        A loss counts as a failure only after more than ``most_losses`` of them.
        """
        self._release(task, now)
        state = self._troubled.setdefault(task, _Task())
        state.losses += 1
        if state.losses > self._most_losses:
            return self.failed(task, reason, now, suspect=True)
        state.not_before = now
        self._put_back(task)
        return None

    def returned(self, task: int, now: float) -> None:
        """Record that a task was not run, by no fault of its own: it costs nothing, and runs after all others."""
        self._release(task, now)
        self._troubled.setdefault(task, _Task()).not_before = now
        self._put_back(task)

    def progressed(self, worker: Worker, now: float) -> None:
        """Record that a worker made progress."""
        if worker in self._workers:
            self._workers[worker].moved_at = now

    def stalled(self, timeout_s: float, now: float) -> list[Worker]:
        """Workers that have tasks and made no progress for more than ``timeout_s``."""
        return [worker for worker, state in self._workers.items() if state.running and now - state.moved_at > timeout_s]

    def _hand_out(self, now: float, most: int) -> list[tuple[Worker, int]]:
        handed: list[tuple[Worker, int]] = []
        if not self._may_hand_out(now):
            return handed
        workers = [(len(state.running), state.number, worker) for worker, state in self._open.items()]
        heapq.heapify(workers)
        while workers and len(handed) < most:
            load, number, worker = heapq.heappop(workers)
            task = self._take(worker, now)
            if task is None:
                continue
            handed.append((worker, task))
            if worker in self._open:
                heapq.heappush(workers, (load + 1, number, worker))
        return handed

    def _hand_out_one(self, outage: _Outage, now: float) -> list[tuple[Worker, int]]:
        """While the storage is down: one task at a time."""
        if now < outage.next_try or outage.trying in self._running_tasks():
            return []
        handed = self._hand_out(now, 1)
        if handed:
            outage.trying = handed[0][1]
        return handed

    def _running_tasks(self) -> set[int]:
        return {task for state in self._workers.values() for task in state.running}

    def _may_hand_out(self, now: float) -> bool:
        due = self._again and self._troubled[self._again[0]].not_before <= now
        return bool(self._open) and bool(self._next < self._count or due)

    def _take(self, worker: Worker, now: float) -> int | None:
        state = self._workers[worker]
        if any(self.runs_alone(task) for task in state.running):
            return None
        if self._next < self._count and not (self._alone and state.running):
            task: int | None = self._next
            self._next += 1
        else:
            task = self._take_again(worker, now)
        if task is not None:
            if not state.running:
                state.moved_at = now
            state.running.add(task)
            self._on[task] = worker, state.node
            self._update(worker)
        return task

    def _take_again(self, worker: Worker, now: float) -> int | None:
        """Take the failed or lost task that has been due longest and may run on this worker, if there is one."""
        idle = not self._workers[worker].running
        for task in self._again:
            state = self._troubled[task]
            if state.not_before > now:
                return None
            if (idle or not self.runs_alone(task)) and self._may_go(state, worker, now):
                self._again.remove(task)
                return task
        return None

    def _may_go(self, task: _Task, worker: Worker, now: float) -> bool:
        """Whether no other worker is a better choice for the task, or it has waited long enough for one."""
        if not task.workers or now >= task.not_before + self._elsewhere_s:
            return True
        others = [name for name, state in self._workers.items() if not state.paused]
        return self._familiarity(task, [worker]) <= self._familiarity(task, others)

    def _familiarity(self, task: _Task, workers: Iterable[Worker]) -> int:
        """0: a worker is on a node where the task never failed; 1: it never failed on a worker; 2: it failed on all."""
        return min(2 if worker in task.workers else int(self._workers[worker].node in task.nodes) for worker in workers)

    def _wait(self, failures: int) -> float:
        return float(min(self._first_wait_s * 2 ** min(failures - 1, 30), _LONGEST_WAIT_S))

    def _put_back(self, task: int) -> None:
        insort(self._again, task, key=lambda task: self._troubled[task].not_before)

    def _end(self, task: int) -> None:
        self._over += 1
        self._troubled.pop(task, None)
        self._on.pop(task, None)

    def _release(self, task: int, now: float) -> None:
        """Take a task from its worker, if the worker is still here."""
        worker = self._on[task][0]
        if worker in self._workers and task in self._workers[worker].running:
            self._workers[worker].running.remove(task)
            self._workers[worker].moved_at = now
            self._update(worker)

    def _update(self, worker: Worker) -> None:
        """Keep the workers that can take a task."""
        if self._workers[worker].open:
            self._open[worker] = self._workers[worker]
        else:
            self._open.pop(worker, None)

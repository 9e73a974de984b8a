"""Decide how many workers to start and when, how long their setup may take, and when to give up starting them.

Independent of Ray. Time is passed in, as seconds of a monotonic clock.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from pipeline.errors import JobError

__all__ = ["IDLE_S", "WorkerStarts"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 300.0
_NODES_COME_S = 600.0
IDLE_S = 30.0


class _State(Enum):
    DOWN = "to be started when its wait is over"
    PLACING = "requested, not on a node yet"
    SETTING_UP = "on a node, building its stages"
    READY = "ready"


@dataclass
class _Slot:
    state: _State = _State.DOWN
    since: float = 0.0  # when the state began
    not_before: float = 0.0
    failures: int = 0  # failed setups of this slot since it was last ready
    failed_in_row: int = 0  # failed setups of this slot since any worker became ready


class WorkerStarts:
    """The workers 0 … count - 1 of a job, each in a slot that is filled again when its worker dies.

    Failed setups end the job only if none succeeds: a bad node among good ones is retried less and less often.

    Args:
        count: largest number of workers.
        attempts: number of failed setups in a row of each worker, while none is ready, after which the job fails.
        timeout_s: limit of a setup, from the time the worker is on a node; the wait for a node is not limited.
        first_wait_s: wait between a failed setup and the next; doubled with every further failure, up to 5 minutes.
        nodes_come_s: how long after the first failed setup workers without a node are still expected to get one.
        least: workers to keep even if no task waits for one; None: all.
        idle_s: how long no task must have waited before workers beyond ``least`` are released.
    """

    def __init__(
        self,
        count: int,
        *,
        attempts: int,
        timeout_s: float,
        first_wait_s: float = _FIRST_WAIT_S,
        nodes_come_s: float = _NODES_COME_S,
        least: int | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self._least, self._idle_s = least, idle_s
        self._waited_at = float("-inf")  # when a task last waited for a worker
        self._slots = [_Slot() for _ in range(count)]
        self._attempts, self._timeout_s = attempts, timeout_s
        self._first_wait_s, self._nodes_come_s = first_wait_s, nodes_come_s
        self._row_began = 0.0

    @property
    def any_on_a_node(self) -> bool:
        """Whether any worker is on a node."""
        return any(slot.state in (_State.SETTING_UP, _State.READY) for slot in self._slots)

    @property
    def count(self) -> int:
        """Largest number of workers."""
        return len(self._slots)

    def add(self) -> int:
        """Add a slot, for a node that joined; returns its number."""
        self._slots.append(_Slot())
        return len(self._slots) - 1

    def due(self, now: float, tasks: int | None = None, most: int | None = None) -> list[int]:
        """Slots to fill now; from here on, they count as requested.

        Args:
            now: the time.
            tasks: tasks that wait for a worker; None: as many as there are slots. Without any, only ``least`` workers
                are kept.
            most: largest number of slots to fill now; None: no limit.
        """
        if tasks is None or tasks:
            self._waited_at = now
        down = [i for i, slot in enumerate(self._slots) if slot.state is _State.DOWN]
        up = len(self._slots) - len(down)
        coming = sum(slot.state in (_State.PLACING, _State.SETTING_UP) for slot in self._slots)
        wanted = max(self._kept - up, (len(self._slots) if tasks is None else tasks) - coming, 0)
        due = [i for i in down if self._slots[i].not_before <= now][:wanted][:most]
        for i in due:
            self._slots[i].state, self._slots[i].since = _State.PLACING, now
        return due

    def surplus(self, idle: Collection[int], now: float) -> list[int]:
        """Slots beyond ``least`` to be released, because no task has waited for a worker for a while.

        Args:
            idle: slots of workers that are ready and run nothing; requests without a node are released, too.
            now: the time.
        """
        if now - self._waited_at < self._idle_s:
            return []
        placing = [i for i, slot in enumerate(self._slots) if slot.state is _State.PLACING]
        up = sum(slot.state is not _State.DOWN for slot in self._slots)
        return [*placing, *sorted(idle, reverse=True)][: max(up - self._kept, 0)]

    @property
    def _kept(self) -> int:
        return len(self._slots) if self._least is None else min(self._least, len(self._slots))

    def on_a_node(self, slot: int, now: float) -> None:
        """Record that a worker is alive on a node and begins its setup."""
        self._slots[slot].state, self._slots[slot].since = _State.SETTING_UP, now

    def ready(self, slot: int) -> None:
        """Record that a worker is set up."""
        self._slots[slot].state, self._slots[slot].failures = _State.READY, 0
        for other in self._slots:
            other.failed_in_row = 0

    def gone(self, slot: int) -> None:
        """Record that a worker died after it was ready, or with its node, or was released: its slot is empty."""
        self._slots[slot].state, self._slots[slot].not_before = _State.DOWN, 0.0

    def failed(self, slot: int, reason: str, now: float) -> None:
        """Record that a setup failed, timed out, or ended with the death of its worker.

        Raises:
            JobError: no setup is expected to succeed any more.
        """
        failed = self._slots[slot]
        if not any(other.failed_in_row for other in self._slots):
            self._row_began = now
        failed.not_before = now + min(self._first_wait_s * 2**failed.failures, _LONGEST_WAIT_S)
        failed.state = _State.DOWN
        failed.failures += 1
        failed.failed_in_row += 1
        if self._hopeless(now):
            count = sum(other.failed_in_row for other in self._slots)
            raise JobError(
                f"no worker can be started: {count} setups failed in a row, the last with: {reason}. See the "
                "warnings above, and Ray's log files of the workers (by default in /tmp/ray/session_latest/logs)"
            )

    def overdue(self, now: float) -> list[int]:
        """Slots whose worker exceeds the time limit of its setup."""
        return [
            i
            for i, slot in enumerate(self._slots)
            if slot.state is _State.SETTING_UP and now - slot.since > self._timeout_s
        ]

    def _hopeless(self, now: float) -> bool:
        late = now - self._row_began >= self._nodes_come_s
        return all(self._has_failed(slot, late) for slot in self._slots)

    def _has_failed(self, slot: _Slot, late: bool) -> bool:
        if slot.state in (_State.SETTING_UP, _State.READY):
            return False
        # A slot without failures waits for a node, which may still be added.
        return slot.failed_in_row >= self._attempts or (slot.failed_in_row == 0 and late)

"""The actors of a job: started when they are needed, replaced when they die, released when nothing is left for them.

`pipeline.run.ray.starts` decides when a worker is started, `pipeline.run.ray.nodes` where none is.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from densefeat.errors import WrongClock
from pipeline.errors import JobError
from pipeline.run.ray.cluster import free_resources, living_nodes, room_for
from pipeline.run.ray.nodes import NodeFailures
from pipeline.run.ray.remote_worker import RemoteWorker
from pipeline.run.ray.starts import WorkerStarts
from pipeline.run.resources import Slot

__all__ = ["Crew"]

logger = logging.getLogger(__name__)

_JOINED_S = 10.0  # between looks for nodes that joined
_FIRST_WARNING_S, _LAST_WARNING_S = 30.0, 600.0  # between warnings that no worker has been placed yet


class Crew:
    """The actors that are requested, being set up, or ready.

    Args:
        slots: resources that each worker requests.
        starts: as many slots.
        joined: called with the slots from time to time; returns slots for nodes that joined the cluster.
    """

    def __init__(
        self, slots: Sequence[Slot], starts: WorkerStarts, joined: Callable[[Sequence[Slot]], Sequence[Slot]]
    ) -> None:
        self._slots, self.starts = list(slots), starts
        self._joined, self._joined_at = joined, time.monotonic()
        self._actors: dict[int, RemoteWorker] = {}  # by slot
        self._nodes = NodeFailures()
        self._requests = 0
        self._warn_at: float | None = None  # None: nobody waits yet; infinity: a worker was placed
        self._warn_again_s = _FIRST_WARNING_S

    def __iter__(self) -> Iterator[RemoteWorker]:
        return iter(list(self._actors.values()))

    def __contains__(self, actor: RemoteWorker) -> bool:
        return self._actors.get(actor.slot) is actor

    def __len__(self) -> int:
        return len(self._actors)

    def start_due(self, tasks: int, *, ahead: bool = False) -> None:
        """Start the workers that are due.

        Args:
            tasks: number of tasks that wait for a worker.
            ahead: as for `WorkerActor`. Only workers that fit on the cluster now are started: nothing is certain yet
                that would be worth another node.
        """
        now = time.monotonic()
        if now - self._joined_at > _JOINED_S:
            self._joined_at = now
            for more in self._joined(self._slots):
                self.starts.add()
                self._slots.append(more)
        due = self.starts.due(now, tasks, room_for(self._slots[0]) if ahead else None)
        left_out = self._left_out(now) if due else []
        for slot in due:
            self._requests += 1
            self._actors[slot] = RemoteWorker(slot, self._slots[slot], self._requests, left_out, ahead)
        if ahead:
            return
        if self._warn_at is None:
            self._warn_at = now + _FIRST_WARNING_S
        self._warn_if_none_is_placed(now)

    def placed(self, actor: RemoteWorker) -> None:
        """Record that an actor is on its node."""
        self.starts.on_a_node(actor.slot, time.monotonic())
        self._warn_at = float("inf")

    def remove(self, actor: RemoteWorker) -> None:
        """Kill an actor. Its slot is to be filled again or not, as ``starts`` is told."""
        actor.kill()
        del self._actors[actor.slot]

    def refill(self, actor: RemoteWorker, lost: bool) -> None:
        """Let the slot of a removed actor be filled again, on any node if its own is ``lost``."""
        if lost:
            self._slots[actor.slot] = self._slots[actor.slot].anywhere(living_nodes())
        self.starts.gone(actor.slot)

    def surplus(self, idle: Sequence[RemoteWorker]) -> list[RemoteWorker]:
        """Workers to be removed, because no task has waited for one for a while; ``idle`` are those without tasks."""
        slots = self.starts.surplus([actor.slot for actor in idle], time.monotonic())
        return [self._actors[slot] for slot in slots]

    def overdue(self) -> list[RemoteWorker]:
        """Workers whose setup takes too long."""
        return [self._actors[slot] for slot in self.starts.overdue(time.monotonic())]

    def failed_on(self, node: str | None) -> None:
        """Record that a worker failed on a node, by no fault of a task."""
        if self._nodes.failed(node, time.monotonic()):
            logger.warning("workers keep failing on node %s: it is left out for a while, if there is another", node)

    def wrong_clock_of(self, actor: RemoteWorker, error: WrongClock) -> None:
        """Record that the storage refuses a removed worker for the clock of its node; its slot is filled elsewhere.

        Raises:
            JobError: it refuses those of all nodes.
        """
        assert actor.node is not None  # it answered
        now = time.monotonic()
        self._nodes.has_wrong_clock(actor.node, now)
        logger.warning("node %s gets no work for a while: %s", actor.node, error)
        self.refill(actor, lost=True)
        for other in self:
            if other.node is None:  # requested before: it would get the place that is free now
                self.remove(other)
                self.starts.gone(other.slot)
        if not {other.name for other in living_nodes() if other.cpus or other.gpus} - {*self._left_out(now)}:
            raise JobError(f"the clocks of all nodes are wrong. The last one: {error}. Then run the job with --resume")

    def succeeded_on(self, node: str | None) -> None:
        """Record that a task was done on a node."""
        self._nodes.succeeded(node)

    def kill(self) -> None:
        """Kill all actors."""
        for actor in self:
            actor.kill()

    def _left_out(self, now: float) -> list[str]:
        """Nodes on which workers keep failing."""
        if not self._nodes:
            return []
        return self._nodes.left_out((node.name for node in living_nodes() if node.cpus or node.gpus), now)

    def _warn_if_none_is_placed(self, now: float) -> None:
        assert self._warn_at is not None
        if now < self._warn_at:
            return
        self._warn_again_s = min(2 * self._warn_again_s, _LAST_WARNING_S)
        self._warn_at = now + self._warn_again_s
        logger.warning(
            "no worker has started yet: each needs %s; the %d nodes of the cluster have %s free. If nodes are to be "
            "added, see `ray status`; if other jobs use them, this one waits",
            " or ".join(sorted({f"{slot.cpus} CPUs and {slot.gpus:g} GPUs" for slot in self._slots})),
            len(living_nodes()),
            free_resources(),
        )

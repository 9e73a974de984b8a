"""A worker on a Ray cluster, as the driver sees it: its actor, and the calls under way."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.run.ray.actor import WorkerActor
from pipeline.run.resources import Slot

__all__ = ["RemoteWorker", "result_of"]

_GET_S = 60.0  # for a result that is there, from another node


@dataclass(eq=False)
class RemoteWorker:
    """First it is placed, then it sets up, then it takes tasks.

    Attributes:
        slot: number of the one that it fills.
        wanted: what it asks of the cluster.
        node: that it is on; None: on none yet.
        room: tasks at once; 0: it is not ready.
        images: that it had done when it last answered; None: what it did before this map is not known yet.
        start: reference of the call that places it, then of its set-up; None once it is ready.
        tasks: reference of a call -> its task.
        asked: reference of the call under way that asks for its progress.
        asked_at: when that was made.
        unreachable_since: when it last could not be reached; None: it can.
        in_doubt: tasks whose calls were lost while it could not be reached.
    """

    slot: int
    wanted: Slot
    node: str | None = None
    room: int = 0
    images: int | None = None
    tasks: dict[Any, int] = field(default_factory=dict)
    asked: Any = None
    asked_at: float = 0.0
    unreachable_since: float | None = None
    in_doubt: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Ask the cluster for it."""
        strategy: Any = "SPREAD"
        if self.wanted.node is not None:
            strategy = NodeAffinitySchedulingStrategy(self.wanted.node, soft=True)
        options = {"num_cpus": self.wanted.cpus, "num_gpus": self.wanted.gpus, "scheduling_strategy": strategy}
        actor: Any = ray.remote(WorkerActor)
        self._handle = actor.options(**options).remote()
        self.start: Any = self._handle.node.remote()

    def set_up(self, spec: Any) -> None:
        """It is on a node: let it build its stages."""
        self.start = self._handle.set_up.remote(spec, self.wanted.cpus)

    def call(self, method: Callable[..., Any], arguments: tuple[Any, ...], task: int) -> None:
        """Give it a task."""
        self.tasks[self._handle.call.remote(method, *arguments)] = task

    def ask(self) -> None:
        """Ask for its progress."""
        self.asked, self.asked_at = self._handle.progress.remote(), time.monotonic()

    def kill(self) -> None:
        """End it, whatever it does."""
        ray.kill(self._handle)


def result_of(call: Any) -> Any:
    """The result of a call that has ended; or the error, as Ray puts it."""
    try:
        return ray.get(call, timeout=_GET_S)
    except RayError as error:
        return error

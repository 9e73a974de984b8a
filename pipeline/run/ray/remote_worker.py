"""The driver's handle of a worker on a Ray cluster: its actor, and its pending calls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.run.ray.actor import WorkerActor
from pipeline.run.resources import Slot

__all__ = ["NODE_ID", "Dead", "RemoteWorker", "result_of"]

NODE_ID = "ray.io/node-id"  # a label that Ray gives to every node
_GET_S = 60.0  # to fetch a finished result from another node


@dataclass(eq=False)
class RemoteWorker:
    """A worker that is first placed on a node, then set up, then given tasks.

    Attributes:
        slot: number of its slot.
        wanted: resources that it requests from the cluster.
        number: number of the request, unique in the job; it is in the actor's name, which Ray's dashboard shows.
        left_out: nodes on which it is not to be placed.
        ahead: as for `WorkerActor`.
        node: its node; None: not placed yet.
        room: number of tasks that it can run at once; 0: not ready.
        images: images done in total at its last answer; None: not known yet in the current map.
        start: reference of the call that waits for its placement, then of its setup; None once it is ready.
        tasks: call reference -> task.
        progress_call: reference of the pending progress request.
        requested_at: time of that request.
        unreachable_since: when it became unreachable; None: it is reachable.
        in_doubt: tasks whose calls were lost while it was unreachable, or when it died.
    """

    slot: int
    wanted: Slot
    number: int
    left_out: InitVar[Sequence[str]] = ()
    ahead: InitVar[bool] = False
    node: str | None = None
    room: int = 0
    images: int | None = None
    tasks: dict[Any, int] = field(default_factory=dict)
    progress_call: Any = None
    requested_at: float = 0.0
    unreachable_since: float | None = None
    in_doubt: list[int] = field(default_factory=list)

    def __post_init__(self, left_out: Sequence[str], ahead: bool) -> None:
        """Request the actor from the cluster."""
        strategy: Any = "SPREAD"
        if self.wanted.node is not None and self.wanted.node not in left_out:
            strategy = NodeAffinitySchedulingStrategy(self.wanted.node, soft=True)
        options: dict[str, Any] = {
            "name": f"densefeat worker {self.number}",
            "num_cpus": self.wanted.cpus,
            "num_gpus": self.wanted.gpus,
            "scheduling_strategy": strategy,
        }
        if left_out:
            options["label_selector"] = {NODE_ID: f"!in({','.join(left_out)})"}
        actor: Any = ray.remote(WorkerActor)
        self._handle = actor.options(**options).remote(ahead)
        self.start: Any = self._handle.node.remote()

    def set_up(self, *what: Any) -> None:
        """Make the actor, which is on a node now, build its stages; ``what`` as for `WorkerActor`."""
        self.start = self._handle.set_up.remote(*what, self.wanted.cpus, self.wanted.gpus)

    def call(self, method: Callable[..., Any], arguments: tuple[Any, ...], task: int) -> None:
        """Start a task on the worker."""
        self.tasks[self._handle.call.remote(method, *arguments)] = task

    def request_progress(self) -> None:
        """Request the worker's progress."""
        self.progress_call, self.requested_at = self._handle.progress.remote(), time.monotonic()

    def kill(self) -> None:
        """Kill the actor, even while it runs tasks."""
        ray.kill(self._handle)


@dataclass
class Dead:
    """A worker that died; whether its tasks failed or are lost is known when it is known whether its node is gone."""

    actor: RemoteWorker
    tasks: list[int]
    error: RayError
    settle_at: float


def result_of(call: Any) -> Any:
    """Result of a call that has ended, or Ray's error; the error is returned, not raised."""
    try:
        return ray.get(call, timeout=_GET_S)
    except RayError as error:
        return error

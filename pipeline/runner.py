"""Ray: actors on the cluster's devices, tasks to them, and what to do when they die.

Beside train/runner.py the only file that imports ray. Tasks are given out here rather than left to Ray's own retries
because what is retried is a shard, up to a number of attempts, and never on a worker that stopped answering.
"""

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import JobError
from pipeline.feature_worker import FeatureWorker, WorkerSpec, shards_in_worker
from pipeline.ray_token import ensure_token
from pipeline.worker import make_worker
from pipeline.workers import TaskFailed
from schemas.config import FeatureConfig

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_WAITING_S = 30.0  # until it is said that the cluster has no room for the workers yet


class WorkerActor:
    """A worker in an actor. Building the stages is a call of its own, so that its error arrives as it was raised."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: FeatureWorker | None = None

    def set_up(self) -> None:
        """Build the stages."""
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        logging.getLogger("pipeline").setLevel(logging.INFO)
        self._worker = make_worker(self._spec)

    def images_done(self) -> int:
        """Progress: answers while tasks run."""
        return self._worker.images_done if self._worker else 0

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a task."""
        return getattr(self._worker, method)(*arguments)


@dataclass(eq=False)
class _Actor:
    handle: Any
    set_up: Any  # reference to the set-up call; None once it has ended well
    tasks: dict[Any, int] = field(default_factory=dict)  # reference of a call -> index of its task
    counter: Any = None  # reference of the images_done call under way
    images: int = 0
    moved_at: float = field(default_factory=time.monotonic)  # when it last showed progress


class RayWorkers:
    """Workers as Ray actors, each pinned to its device.

    Args:
        spec: for every worker.
        count: how many.
        gpus: of each, 0 or 1.
        cpus: of each.
        attempts: times a task is tried.
        stall_timeout_s: a worker with tasks that shows no progress for so long is killed and replaced.
    """

    def __init__(
        self, spec: WorkerSpec, count: int, *, gpus: int, cpus: int, attempts: int = 3, stall_timeout_s: float = 1800
    ) -> None:
        self.count = count
        self._spec = ray.put(spec)
        self._tasks_at_once = shards_in_worker("cuda" if gpus else "cpu", spec.threads)
        # Its tasks and the progress call run at the same time, in threads.
        self._actor_class = ray.remote(WorkerActor).options(
            num_gpus=gpus, num_cpus=cpus, max_concurrency=self._tasks_at_once + 1
        )
        self._attempts = attempts
        self._stall_timeout_s = stall_timeout_s
        self._actors = [self._new_actor() for _ in range(count)]
        self._dead: list[_Actor] = []  # with calls that have not ended in an error yet
        self._deaths_at_set_up = 0

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)

    def share(self, value: Any) -> Any:
        """A reference into the object store."""
        return ray.put(value)

    def map(
        self, method: str, tasks: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None] = lambda images: None
    ) -> Iterator[tuple[int, Any]]:
        """As ``Workers.map``."""
        for actor in self._actors:
            if actor.set_up is None:  # what it did for an earlier map is not progress of this one
                with suppress(RayError):
                    actor.images, actor.counter = ray.get(actor.handle.images_done.remote()), None
        waiting = deque(range(len(tasks)))
        tried = [0] * len(tasks)
        left = len(tasks)
        said_waiting = False
        started = time.monotonic()
        while left:
            self._hand_out(method, tasks, waiting, tried)
            if not said_waiting and time.monotonic() - started > _WAITING_S and all(a.set_up for a in self._actors):
                said_waiting = True
                logger.warning("no worker has started yet: the cluster has %s", ray.available_resources())
            for actor, call in self._ended():
                task = actor.tasks.pop(call, None)
                try:
                    result = ray.get(call)
                except RayError as error:
                    reason = self._after_failure(actor, call, error)
                    if task is None:
                        continue
                    if tried[task] < self._attempts:
                        waiting.append(task)
                        continue
                    result = TaskFailed(tried[task], reason)
                if call is actor.set_up:
                    actor.set_up, actor.moved_at = None, time.monotonic()
                elif task is not None:
                    left -= 1
                    yield task, result
            on_progress(self._count_images())

    def _new_actor(self) -> _Actor:
        handle: Any = self._actor_class.remote(self._spec)
        return _Actor(handle, handle.set_up.remote())

    def _hand_out(self, method: str, tasks: Sequence[tuple[Any, ...]], waiting: deque[int], tried: list[int]) -> None:
        """Give waiting tasks to actors with room: breadth first, so that the last tasks spread over all of them."""
        for room in range(self._tasks_at_once):
            for actor in self._actors:
                if not waiting:
                    return
                # A task that failed before runs alone: if it kills its worker again, it takes no other with it.
                alone = tried[waiting[0]] > 0 or any(tried[task] > 1 for task in actor.tasks.values())
                if actor.set_up is None and len(actor.tasks) <= (0 if alone else room):
                    task = waiting.popleft()
                    tried[task] += 1
                    if not actor.tasks:
                        actor.moved_at = time.monotonic()
                    actor.tasks[actor.handle.call.remote(method, *tasks[task])] = task

    def _ended(self) -> list[tuple[_Actor, Any]]:
        """Calls that ended, with their actors; waits for one a little while."""
        self._dead = [actor for actor in self._dead if actor.tasks]
        actors = [*self._actors, *self._dead]
        calls = {call: actor for actor in actors for call in [actor.set_up, *actor.tasks] if call is not None}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S)
        return [(calls[call], call) for call in ready]

    def _after_failure(self, actor: _Actor, call: Any, error: RayError) -> str:
        """Replace the actor if it died; the reason in a line.

        Raises:
            JobError: trying again would not help.
        """
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, JobError):
                raise error.cause from None
            if call is actor.set_up:
                raise JobError(f"a worker could not be set up: {_last_line(error)}") from error
            reason = f"{type(error.cause).__name__}: {error.cause}"
            logger.warning("a task failed, it is tried again: %s", reason)
            return reason
        reason = f"its worker died: {_last_line(error)}"
        if actor in self._actors:
            self._deaths_at_set_up += call is actor.set_up
            if self._deaths_at_set_up >= self._attempts:
                raise JobError(f"workers die while they are set up: {_last_line(error)}") from error
            logger.warning("a worker died and is replaced: %s", _last_line(error))
            ray.kill(actor.handle)  # it may be only unreachable, or out of memory
            self._actors[self._actors.index(actor)] = self._new_actor()
            actor.set_up = None
            self._dead.append(actor)
        return reason

    def _count_images(self) -> int:
        """Images done since the last call; kills actors that have stalled."""
        done = 0
        for actor in self._actors:
            if actor.counter is not None and ray.wait([actor.counter], timeout=0)[0]:
                try:
                    images = ray.get(actor.counter)
                except RayError:
                    images = actor.images  # dead: its calls tell
                if images > actor.images:
                    done += images - actor.images
                    actor.images, actor.moved_at = images, time.monotonic()
                actor.counter = None
            if actor.counter is None and actor.set_up is None:
                actor.counter = actor.handle.images_done.remote()
            if actor.tasks and actor.set_up is None and time.monotonic() - actor.moved_at > self._stall_timeout_s:
                logger.warning("a worker showed no progress for %.0f s: it is killed", self._stall_timeout_s)
                actor.moved_at = time.monotonic()
                ray.kill(actor.handle)
        return done


@contextmanager
def connected(*, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (``ray job submit`` sets it), or start Ray in this process.

    Args:
        dashboard: whether a Ray that is started has one; Ray Train asks it, and complains every second without.
    """
    # Otherwise Ray announces a change of a default that does not concern us, and how it secures its own ports.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address="auto", logging_level=logging.ERROR)
        else:
            ensure_token()
            ray.init(address="local", include_dashboard=dashboard, logging_level=logging.ERROR)
    except Exception as error:  # RuntimeError, ConnectionError, RPC errors: as far as Ray got
        where = f"the Ray cluster at RAY_ADDRESS={address} does not answer" if address else "Ray does not start"
        raise JobError(f"{where}: {error}. Mend or unset that, or use --workers 0 to run without Ray") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which prints a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def ray_workers(spec: WorkerSpec, count: int | None, *, attempts: int, stall_timeout_s: float) -> RayWorkers:
    """Workers on the connected cluster: ``count`` of them, or one per GPU, or where there is none, one per node.

    Args:
        spec: its device and threads are settled here.
        count: None to fill the cluster as it is now.
        attempts: as ``RayWorkers``.
        stall_timeout_s: as ``RayWorkers``.

    Raises:
        JobError: the cluster lacks the devices asked for, and no count says that it will have them.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    device = spec.config.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
        if not gpus and os.environ.get("RAY_ADDRESS"):
            logger.warning(
                "the cluster has no GPU at present: running on CPUs; --device cuda --workers N asks for GPUs"
            )
    # A cluster can add nodes when they are asked for; Ray in this process has what the machine has.
    if device == "cuda" and not gpus and not (count and os.environ.get("RAY_ADDRESS")):
        raise JobError(
            "--device cuda, but there is no GPU: use --device cpu; or on a cluster that adds GPU nodes when they are "
            "asked for, give --workers N"
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1:
        _warn_of_local_folders(spec.config, nodes)
    count = count or (gpus if device == "cuda" else nodes)
    threads = max(1, cpus // max(count, nodes))
    if device == "cuda" and gpus:
        threads = max(1, cpus // gpus)
    return RayWorkers(
        spec.on(device, threads),
        count,
        gpus=int(device == "cuda"),
        # On a GPU node its one worker a GPU may use all cores, but asks for one, so that it always fits.
        cpus=threads if device == "cpu" else 1,
        attempts=attempts,
        stall_timeout_s=stall_timeout_s,
    )


def _warn_of_local_folders(config: FeatureConfig, nodes: int) -> None:
    for option in ("images", "store", "weights"):
        place = getattr(config, option, "")
        if "://" not in place and "/" in place:
            logger.warning(
                "the cluster has %d nodes: --%s %s must be the same folder on all of them (a network file system)",
                nodes, option, place,
            )  # fmt: skip


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]

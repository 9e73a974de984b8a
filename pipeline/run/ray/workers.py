"""Workers as actors on the devices of a Ray cluster.

This is glue. `pipeline.run.queue` decides which task goes to which worker, `pipeline.run.ray.crew` has the actors, and
`pipeline.run.resources` decides which resources they request. Tasks are assigned here and not left to Ray's own
retries, because a shard is to be retried up to a number of attempts, and never on a worker that stopped answering.

Nothing here waits for an actor without a timeout: an actor may hang at any moment, and Ray then does not answer for it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from densefeat.errors import WrongClock
from pipeline.errors import JobError
from pipeline.run.failures import FailureLog, OutageLog, is_suspect
from pipeline.run.feature_worker import FeatureWorker, WorkerSpec
from pipeline.run.queue import OUTAGE_S, TaskFailed, TaskQueue
from pipeline.run.ray.actor import WorkerProgress
from pipeline.run.ray.cluster import is_death, is_lost_node, last_line
from pipeline.run.ray.crew import Crew
from pipeline.run.ray.remote_worker import Dead, RemoteWorker, result_of
from pipeline.run.ray.starts import IDLE_S, WorkerStarts
from pipeline.run.resources import Slot
from pipeline.run.shard_worker import make_worker
from pipeline.run.workers import Result, if_given_up

__all__ = ["RayWorkers"]

logger = logging.getLogger(__name__)
Make = Callable[[WorkerSpec], FeatureWorker]

_POLL_S = 0.5
_PROGRESS_CALLS_PER_S, _RAREST_PROGRESS_S = 100, 8.0  # Ray forgets a worker's gauges after 20 s
_SET_UP_S = 1800.0
_UNREACHABLE_S = 60.0  # until an unreachable worker is replaced
_NODE_DEATH_S = 2.0  # when a node is taken down, its workers die before the cluster knows that it is gone


class RayWorkers:
    """Workers as Ray actors, each pinned to its device.

    Args:
        spec: spec of every worker, with a resolved device; None: `build` says it before the first map, and the workers
            import their libraries meanwhile.
        slots: resources that each worker requests.
        least: workers to keep; the others are requested while tasks wait for a worker, and released when none has
            waited for a while. None: all.
        joined: called with the slots from time to time; returns slots for nodes that joined the cluster.
        attempts: number of times that a task may fail, and a worker's setup while no setup succeeds.
        stall_timeout_s: a worker that has tasks and makes no progress for this long is killed and replaced.
        set_up_timeout_s: the same for a worker's setup, from the time it is on a node.
        first_wait_s: as for `TaskQueue` and `WorkerStarts`.
        outage_s: as for `TaskQueue`.
        idle_s: as for `WorkerStarts`.
        make: builds a worker; an importable function.
    """

    def __init__(
        self,
        spec: WorkerSpec | None,
        slots: Sequence[Slot],
        *,
        least: int | None = None,
        joined: Callable[[Sequence[Slot]], Sequence[Slot]] = lambda slots: (),
        attempts: int = 3,
        stall_timeout_s: float = 1800,
        set_up_timeout_s: float = _SET_UP_S,
        first_wait_s: float = 5.0,
        outage_s: float = OUTAGE_S,
        idle_s: float = IDLE_S,
        make: Make = make_worker,
    ) -> None:
        self._what: tuple[Any, ...] = ()
        if spec is not None:
            self.build(spec, make)
        self._attempts, self._first_wait_s, self._stall_timeout_s = attempts, first_wait_s, stall_timeout_s
        self._starts = WorkerStarts(
            len(slots), attempts=attempts, timeout_s=set_up_timeout_s, first_wait_s=first_wait_s, least=least,
            idle_s=idle_s,
        )  # fmt: skip
        self._crew = Crew(slots, self._starts, joined)
        self._outage_s, self._outages = outage_s, OutageLog(outage_s)
        self._dead, self._failures = list[Dead](), FailureLog()
        self._queue = TaskQueue[RemoteWorker](0, attempts=attempts)

    @property
    def count(self) -> int:
        """Number of workers that the job asks for at most."""
        return self._starts.count

    def __enter__(self) -> "RayWorkers":
        self._crew.start_due(0, ahead=not self._what)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._crew.kill()

    def build(self, spec: WorkerSpec, make: Make = make_worker, files: Mapping[str, bytes] | None = None) -> None:
        """Say what the workers are. Arguments as for the constructor; ``files``: as for `WorkerActor.set_up`."""
        self._what = ray.put(ray.cloudpickle.dumps((spec, make))), ray.put(files or {})

    def share(self, value: Any) -> Any:
        """Put ``value`` into Ray's object store; returns the reference."""
        return ray.put(value)

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
        self._queue = TaskQueue(
            len(tasks),
            attempts=attempts or self._attempts,
            first_wait_s=self._first_wait_s,
            outage_s=self._outage_s,
            alone=alone,
        )
        self._dead = []
        for actor in self._crew:
            # Images of an earlier map are not progress of this one. The actor may have died or hung since, so it gets
            # tasks only when it answers.
            actor.images, actor.tasks, actor.in_doubt = None, {}, []
            if actor.room:
                actor.request_progress()
        while self._queue.left:
            self._crew.start_due(self._queue.waiting)
            for actor, task in self._queue.hand_out(time.monotonic()):
                actor.call(method, tasks[task], task)
            for actor, call, result in self._ended():
                yield from self._settle(actor, call, result)
            self._outages.watch(self._queue.outage)
            on_progress(self._progress())
            yield from self._settle_dead()
            yield from self._end_hung_workers()
            for actor in self._crew.surplus(self._queue.idle()):
                logger.info("releasing worker %d: no shard waits for it", actor.number)
                self._remove(actor)
                self._starts.gone(actor.slot)

    def _started(self, actor: RemoteWorker, result: Any) -> None:
        """Advance an actor whose ``start`` call succeeded: set it up, or give it to the queue."""
        if actor.node is None:
            actor.node = result
            actor.set_up(*self._what)
            self._crew.placed(actor)
        else:
            actor.start, actor.room, actor.images = None, result, 0
            self._starts.ready(actor.slot)
            self._queue.join(actor, actor.node, actor.room, time.monotonic())
            actor.request_progress()

    def _ended(self) -> list[tuple[RemoteWorker, Any, Any]]:
        """Actor, call, and result or error of each call that ended; waits up to ``_POLL_S`` for the first one."""
        calls = {call: actor for actor in self._crew for call in [actor.start, *actor.tasks] if call is not None}
        waited_for = [*calls, *(actor.progress_call for actor in self._crew if actor.room and actor.images is None)]
        if not waited_for:
            time.sleep(_POLL_S)
            return []
        ready, _ = ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
        if not ready:
            ready, _ = ray.wait(waited_for, num_returns=1, timeout=_POLL_S)
        ended = [(calls[call], call, result_of(call)) for call in ready if call in calls]
        # Results first: a result that arrived must not be lost because its actor died afterwards.
        return sorted(ended, key=lambda entry: isinstance(entry[2], RayError))

    def _settle(self, actor: RemoteWorker, call: Any, result: Any) -> Iterator[tuple[int, Any]]:
        """Handle a call that has ended; yields tasks that are done or given up."""
        if actor not in self._crew:  # another of its calls has already reported its death
            return
        task = actor.tasks.pop(call, None)
        if isinstance(result, RayTaskError) and isinstance(result.cause, JobError):
            raise result.cause from None
        if isinstance(result, RayTaskError) and isinstance(result.cause, WrongClock):
            self._leave_node(actor, result.cause, [] if task is None else [task])
        elif task is None:
            if isinstance(result, RayError):
                self._set_up_failed(actor, result)
            else:
                self._started(actor, result)
        elif not isinstance(result, RayError):
            self._crew.succeeded_on(actor.node)
            self._queue.done(task, time.monotonic())
            yield task, result
        elif is_death(result):
            actor.in_doubt.append(task)
            if isinstance(result, ActorUnavailableError):
                self._unreachable(actor, result)
            else:
                self._died(actor, result)
        else:
            cause = result.cause if isinstance(result, RayTaskError) else result
            reason = self._log_failure(result, "a task failed")
            if is_suspect(cause):
                yield from self._failed(task, reason)
            else:
                yield from if_given_up(task, self._queue.unavailable(task, reason, time.monotonic()))

    def _failed(self, task: int, reason: str) -> Iterator[tuple[int, TaskFailed]]:
        yield from if_given_up(task, self._queue.failed(task, reason, time.monotonic(), suspect=True))

    def _set_up_failed(self, actor: RemoteWorker, error: RayError) -> None:
        self._remove(actor)
        if is_death(error) and not isinstance(error, ActorUnavailableError) and is_lost_node(error, actor.node):
            self._crew.refill(actor, lost=True)
            return
        self._crew.failed_on(actor.node)
        reason = self._log_failure(error, "a worker could not be set up")
        self._starts.failed(actor.slot, reason, time.monotonic())

    def _log_failure(self, error: RayError, what: str) -> str:
        """Log an error; returns it in one line."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            return self._failures.told(cause, what, traceback=str(error))
        reason = last_line(cause)  # Ray's own errors are long
        logger.warning("%s: %s", what, reason)
        return reason

    def _died(self, actor: RemoteWorker, error: RayError) -> None:
        """Replace an actor. Its tasks count as lost or failed once it is known whether its node is gone."""
        tasks = self._remove(actor)
        now = time.monotonic()
        lost = is_lost_node(error, actor.node)
        logger.warning(
            "replacing worker %d, which died: %s",
            actor.number,
            f"its node {actor.node} is gone" if lost else f"{last_line(error)} (node {actor.node})",
        )
        if not lost:
            self._blame_node(actor, tasks)
        self._dead.append(Dead(actor, tasks, error, now if lost else now + _NODE_DEATH_S))
        self._crew.refill(actor, lost)

    def _settle_dead(self) -> Iterator[tuple[int, TaskFailed]]:
        now = time.monotonic()
        due = [dead for dead in self._dead if dead.settle_at <= now]
        self._dead = [dead for dead in self._dead if dead.settle_at > now]
        for dead in due:
            reason = f"its worker died: {last_line(dead.error)}"
            lost = bool(dead.tasks) and is_lost_node(dead.error, dead.actor.node)
            for task in dead.tasks:
                if lost:
                    yield from self._lost(task, "its node was lost")
                else:
                    yield from self._failed(task, reason)

    def _lost(self, task: int, reason: str) -> Iterator[tuple[int, TaskFailed]]:
        yield from if_given_up(task, self._queue.lost(task, reason, time.monotonic()))

    def _leave_node(self, actor: RemoteWorker, error: WrongClock, tasks: list[int]) -> None:
        """End a worker whose node has a wrong clock; its tasks, and those that were refused, run elsewhere."""
        for task in {*tasks, *self._remove(actor)}:
            self._queue.returned(task, time.monotonic())
        self._crew.wrong_clock_of(actor, error)

    def _blame_node(self, actor: RemoteWorker, tasks: Sequence[int]) -> None:
        if not any(self._queue.runs_alone(task) for task in tasks):  # else the task may be the cause
            self._crew.failed_on(actor.node)

    def _remove(self, actor: RemoteWorker) -> list[int]:
        """Kill and remove an actor; returns the tasks it had."""
        self._crew.remove(actor)
        return sorted({*self._queue.leave(actor), *actor.tasks.values(), *actor.in_doubt})

    def _progress(self) -> int:
        """Images done since the last call."""
        done, now = 0, time.monotonic()
        asked = {actor.progress_call: actor for actor in self._crew if actor.room and actor.progress_call is not None}
        answered = ray.wait([*asked], num_returns=len(asked), timeout=0)[0] if asked else []
        for call in answered:
            actor, answer = asked[call], result_of(call)
            actor.progress_call = None
            if isinstance(answer, ActorUnavailableError):
                self._unreachable(actor, answer)
            elif isinstance(answer, RayError) and is_death(answer):
                self._died(actor, answer)
            elif not isinstance(answer, RayError):
                done += self._answered(actor, answer)
        pause = min(len(self._crew) / _PROGRESS_CALLS_PER_S, _RAREST_PROGRESS_S)
        for actor in self._crew:
            if actor.room and actor.progress_call is None and now - actor.requested_at >= pause:
                actor.request_progress()
        return done

    def _answered(self, actor: RemoteWorker, answer: WorkerProgress) -> int:
        """Images that an actor did since its last answer."""
        now = time.monotonic()
        if actor.images is None:
            actor.images = answer.images
            self._queue.join(actor, actor.node, actor.room, now)
            return 0
        done = answer.images - actor.images
        actor.images = answer.images
        if done:
            self._queue.progressed(actor, now)
        if actor.unreachable_since is not None:
            actor.unreachable_since = None
            logger.warning("a worker is reachable again")
        if answer.running <= len(actor.tasks):  # otherwise it still runs tasks whose calls were lost
            self._queue.pause(actor, False)
        return done

    def _unreachable(self, actor: RemoteWorker, error: RayError) -> None:
        """Pause an actor that does not answer. It may not be dead, so requests to it are repeated for a while."""
        if actor.unreachable_since is None:
            actor.unreachable_since = time.monotonic()
            logger.warning("a worker is unreachable, trying again: %s", last_line(error))
        self._queue.pause(actor)

    def _end_hung_workers(self) -> Iterator[tuple[int, TaskFailed]]:
        now = time.monotonic()
        for actor in self._crew.overdue():
            logger.warning("killing a worker that was not ready in time")
            self._crew.failed_on(actor.node)
            self._remove(actor)
            self._starts.failed(actor.slot, "setup took too long", now)
        stalled = self._queue.stalled(self._stall_timeout_s, now)
        for actor in self._crew:
            reachable = actor.unreachable_since is None
            if reachable and actor.in_doubt:  # it is reachable again, but the results of these calls are lost
                tasks, actor.in_doubt = actor.in_doubt, []
            elif not reachable and now - (actor.unreachable_since or now) > _UNREACHABLE_S:
                logger.warning("replacing a worker that was unreachable for %.0f s", _UNREACHABLE_S)
                tasks = self._remove(actor)
                self._crew.refill(actor, lost=True)
            else:
                silent = actor.room and actor.images is None and now - actor.requested_at > self._stall_timeout_s
                if actor in stalled or silent:
                    logger.warning("killing a worker: no progress for %.0f s", self._stall_timeout_s)
                    self._starts.gone(actor.slot)
                    tasks = self._remove(actor)
                    self._blame_node(actor, tasks)
                    for task in tasks:
                        yield from self._failed(task, f"its worker made no progress for {self._stall_timeout_s:.0f} s")
                continue
            for task in tasks:
                yield from self._lost(task, "its worker could not be reached")

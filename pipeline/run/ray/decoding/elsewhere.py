"""Decode images on nodes without a GPU, for a worker whose GPU waits for the cores of its own node.

A shard whose input is read and decoded elsewhere is one task of Ray, which finds a place for it, queues it and ends it
with its worker. Nothing about the shard depends on the task: it sends decoded pixels and damaged images. Whatever else
happens there (no free CPU, a death, an error, a file that is not found), these rows are read and decoded here, so that
errors are those of this node, and the row, the shard or the job fails as if there were no other node.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError

from densefeat.storage.retries import PATIENCE_S
from pipeline.errors import ImageError
from pipeline.images.batches import Batch, BatchLoader, Loader, WorkStopped
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.ray.cluster import last_line, living_nodes
from pipeline.run.ray.decoding.task import SentBatch, decode_rows
from pipeline.run.ray.remote_worker import NODE_ID

__all__ = ["ElsewhereLoader", "Room", "decode_elsewhere"]

logger = logging.getLogger(__name__)

_PLACE_S = 5.0  # for a task to get a free CPU and a process
_SILENCE_S = 2 * PATIENCE_S  # until the next batch: storage that does not answer raises before
_REST_S = 10.0  # after a task that found no place, or failed
_NODES_S = 60.0  # until the cluster is asked again for its nodes: a thousand workers ask the same head
_MOST_NODES = 16  # that a worker uses, of its own choice: their names go with every task
_AHEAD = 2  # batches that a task has ready
_POLL_S = 0.5
_THREADS_OF_A_SHARD = 8  # that one shard keeps busy, whose images are read from a bucket


def decode_elsewhere(
    worker: FeatureWorker,
    *,
    decoded: Callable[[int], None] = lambda images: None,
    starving: Callable[[], bool] | None = None,
) -> None:
    """Let a worker that is connected to a cluster use the cluster's nodes without a GPU.

    Args:
        worker: the worker, before its first task.
        decoded: called with numbers of images that were decoded elsewhere.
        starving: whether its device has nothing to do now; by default, whether no task waits for it.
    """
    worker.loader = ElsewhereLoader(
        worker.loader,
        worker.spec.recipe.images.loader_maker(worker.batch_size, 1),
        starving=starving or (lambda: worker.computing.waiting == 0),
        least_here=1 + worker.spec.threads // _THREADS_OF_A_SHARD,
        decoded=decoded,
    )


class Room:
    """How many tasks a worker may have elsewhere at once: as many as found a place, and one that waits for the next.

    If that one waits in vain, there is none for a while. Time is passed in, as seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._most = float("inf")
        self._used = self._placed = 0
        self._quiet_until = 0.0

    def take(self, now: float) -> bool:
        """Whether there may be one more, which is then counted."""
        if self._used > self._most or (self._used == self._most and now < self._quiet_until):
            return False
        self._used += 1
        return True

    def placed(self) -> None:
        """A task has a place."""
        self._placed += 1
        self._most = max(self._most, self._placed)

    def ended(self, placed: bool) -> None:
        """A task has ended, or was cancelled."""
        self._used -= 1
        self._placed -= placed

    def shrink(self, now: float) -> None:
        """After a task, which has ended, that found no place or failed: there is room for those that have a place."""
        self._most, self._quiet_until = self._placed, now + _REST_S


class ElsewhereLoader:
    """A loader that sends reading and decoding to other nodes when the worker's device starves.

    Args:
        here: the worker's own loader.
        make: builds a loader with the same batches, in another process; it can be pickled.
        starving: whether the device has nothing to do now.
        least_here: number of iterations over references that are served here before any goes elsewhere.
        decoded: called with numbers of images that were decoded elsewhere.
        nodes: names of the nodes that may be used.
        place_s: how long a task may take to begin.
        silence_s: how long a task that has begun may take to send a batch.

    Attributes:
        stop: as in `BatchLoader`.
    """

    def __init__(
        self,
        here: Loader,
        make: Callable[[], BatchLoader],
        *,
        starving: Callable[[], bool],
        least_here: int = 1,
        decoded: Callable[[int], None] = lambda images: None,
        nodes: Callable[[], list[str]] | None = None,
        place_s: float = _PLACE_S,
        silence_s: float = _SILENCE_S,
    ) -> None:
        self.stop = here.stop
        self._here, self._starving, self._decoded = here, starving, decoded
        self._least_here, self._place_s, self._silence_s = least_here, place_s, silence_s
        self._nodes = nodes or _NodesWithoutGpu()
        self._make = [ray.put(make)]
        self._task: Any = ray.remote(decode_rows)
        self._lock = threading.Lock()
        self._room, self._served_here = Room(), 0
        self._said: set[str] = set()

    def batches(
        self, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str] = MappingProxyType({})
    ) -> Iterator[Batch]:
        """As `BatchLoader.batches`, with the same batches."""
        start = 0
        if nodes := self._where():
            for batch in self._from(nodes, references, seconds, crashed):
                yield batch
                start += len(batch.decoded)
            if start == references.num_rows:
                return
            with self._lock:
                self._served_here += 1
        try:
            yield from self._rows_here(references, seconds, crashed, range(start, references.num_rows))
        finally:
            with self._lock:
                self._served_here -= 1

    def _where(self) -> list[str]:
        """Choose nodes for an iteration, and count it there; none: it is served here."""
        nodes = self._nodes() if self._starving() else []
        with self._lock:
            if nodes and self._served_here >= self._least_here and self._room.take(time.monotonic()):
                return nodes
            self._served_here += 1
            return []

    def _rows_here(
        self, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str], rows: range
    ) -> Iterator[Batch]:
        crashed = {row - rows.start: reason for row, reason in crashed.items() if row in rows}
        return self._here.batches(references.slice(rows.start, len(rows)), seconds, crashed)

    def _from(
        self, nodes: list[str], references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str]
    ) -> Iterator[Batch]:
        """Batches from a task on one of the nodes, until all rows are there or something goes wrong."""
        options: dict[str, Any] = {
            "name": "densefeat decoding", "num_cpus": 1, "max_retries": 0, "num_returns": "streaming",
            "_generator_backpressure_num_objects": _AHEAD, "scheduling_strategy": "SPREAD",
            "label_selector": {NODE_ID: f"in({','.join(nodes)})"},
        }  # fmt: skip
        call = self._task.options(**options).remote(self._make, references, {**crashed})
        start, placed = 0, False
        problem: Exception | None = None
        try:
            self._next(call, self._place_s)
            placed = True
            with self._lock:
                self._room.placed()
            known: dict[str, float] = {}
            while start < references.num_rows:
                sent: SentBatch = self._next(call, self._silence_s)
                for stage, total in sent.seconds.items():
                    seconds.add(stage, total - known.get(stage, 0.0))
                known, rows = sent.seconds, range(start, start + len(sent.decoded))
                start = rows.stop
                yield from self._checked(sent, references, seconds, crashed, rows)
        except (RayError, EOFError) as error:
            problem = error
        finally:
            if start < references.num_rows:
                ray.cancel(call, force=True)  # its process too: it may hang
            with self._lock:
                self._room.ended(placed)
                if problem:
                    self._room.shrink(time.monotonic())
        if isinstance(problem, GetTimeoutError) and not placed:
            self._say("the nodes without a GPU have no CPU free at times: decoding more here")
        elif problem:
            logger.warning("decoding on a node without a GPU failed, going on here: %s", last_line(problem))

    def _checked(
        self, sent: SentBatch, references: pa.Table, seconds: StageSeconds, crashed: Mapping[int, str], rows: range
    ) -> Iterator[Batch]:
        """The batch that was sent; from here, if files could not be read there, which may be the fault of that node."""
        if any(isinstance(image, ImageError) and image.status == "unreadable" for image in sent.decoded):
            yield from self._rows_here(references, seconds, crashed, rows)
            return
        self._say("the GPU waits for the cores of its node: decoding on nodes without a GPU too (--decode-elsewhere)")
        self._decoded(len(rows))
        yield sent.batch()

    def _next(self, call: Any, within_s: float) -> Any:
        """What a task yields next.

        Raises:
            GetTimeoutError: it yields nothing within the time.
            RayError: the task failed, or its node is lost.
            EOFError: the task has ended.
            WorkStopped: ``stop`` is set.
        """
        until = time.monotonic() + within_s
        self._wait(call, until)
        reference = next(call, None)
        if reference is None:
            raise EOFError("it ended too early")
        self._wait(reference, until)
        return ray.get(reference, timeout=within_s)

    def _wait(self, what: Any, until: float) -> None:
        begun = time.monotonic()
        while True:
            if self.stop.is_set():
                raise WorkStopped
            if ray.wait([what], timeout=max(0.0, min(_POLL_S, until - time.monotonic())))[0]:
                return
            if time.monotonic() >= until:
                raise GetTimeoutError(f"nothing came for {until - begun:.0f} s")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)


class _NodesWithoutGpu:
    """Names of some living nodes that have CPUs and no GPU. The cluster is asked rarely; the choice changes little."""

    def __init__(self) -> None:
        self._asked_at, self._names = float("-inf"), list[str]()
        self._order = random.Random()  # workers share the nodes

    def __call__(self) -> list[str]:
        now = time.monotonic()
        if now - self._asked_at > _NODES_S:
            self._asked_at = now
            try:
                names = [node.name for node in living_nodes() if node.cpus and not node.gpus]
            except RayError:  # the head does not answer
                return self._names
            kept = [name for name in self._names if name in names]
            others = [name for name in names if name not in kept]
            self._order.shuffle(others)
            self._names = [*kept, *others][:_MOST_NODES]
        return self._names

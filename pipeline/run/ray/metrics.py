"""Metrics of a job on a Ray cluster, for Prometheus: every node's Ray exports those of the processes on it.

Ray adds the prefix ``ray_`` to each name, and ``_total`` to the names of counters; and the labels NodeAddress, WorkerId
and SessionName. It exports every ten seconds. A worker that is killed takes the counts since its last export with it;
the ledger and the report of the job are exact. Gauges are forgotten unless they are set again within two exports.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge

from schemas.ledger import LedgerRecord

__all__ = ["METRICS", "JobMetrics", "Metric", "WorkerMetrics"]


@dataclass(frozen=True)
class Metric:
    """A metric as it is defined.

    Attributes:
        name: without what Ray adds.
        kind: counter, or gauge.
        help: description, with the unit.
        tags: names of its labels.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    def make(self) -> Any:
        """The metric in this process, as Ray's `Counter` or `Gauge`."""
        return (Counter if self.kind == "counter" else Gauge)(self.name, self.help, self.tags)


_IMAGES = Metric("densefeat_images", "counter", "Images in committed shards, by outcome", ("status",))
_COMPUTED = Metric(
    "densefeat_images_computed", "counter", "Images computed, before they are written; again if a shard is retried"
)
_ELSEWHERE = Metric(
    "densefeat_images_decoded_elsewhere", "counter", "Images decoded for a worker on a node without a GPU"
)
_BYTES = Metric("densefeat_bytes_written", "counter", "Bytes of committed shards")
_SECONDS = Metric(
    "densefeat_stage_seconds", "counter", "Busy seconds of committed shards by stage, over all threads", ("stage",)
)
_SHARDS_MADE = Metric("densefeat_shards_made", "counter", "Shards committed")
_RUNNING = Metric("densefeat_tasks_running", "gauge", "Tasks that a worker is running, mostly shards")
_READY = Metric("densefeat_workers_ready", "gauge", "1 for each worker that is set up and answers")
_WANTED = Metric("densefeat_workers_wanted", "gauge", "Workers that the job asked for")
_SHARDS = Metric("densefeat_shards", "gauge", "Shards of the job by state: done, left, given up", ("state",))

METRICS = (_IMAGES, _COMPUTED, _ELSEWHERE, _BYTES, _SECONDS, _SHARDS_MADE, _RUNNING, _READY, _WANTED, _SHARDS)


class WorkerMetrics:
    """The metrics of a worker, in its process."""

    def __init__(self) -> None:
        self._images, self._computed, self._bytes = _IMAGES.make(), _COMPUTED.make(), _BYTES.make()
        self._seconds, self._shards = _SECONDS.make(), _SHARDS_MADE.make()
        self._running, self._ready = _RUNNING.make(), _READY.make()
        self._elsewhere = _ELSEWHERE.make()
        self._counted: set[int] = set()
        self._images_before = 0

    def finished(self, result: Any) -> None:
        """Count a task's result if it is the record of a shard that this process made, and only once."""
        if not isinstance(result, LedgerRecord) or result.shard in self._counted:
            return
        if (result.made_by.get("host"), result.made_by.get("pid")) != (socket.gethostname(), str(os.getpid())):
            return  # another process was first
        self._counted.add(result.shard)
        for outcome in result.outcomes["status"].value_counts().to_pylist():
            self._images.inc(outcome["counts"], {"status": outcome["values"]})
        for stage, seconds in result.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {"stage": stage})
        if result.total_nbytes:
            self._bytes.inc(result.total_nbytes)
        self._shards.inc()

    def decoded_elsewhere(self, images: int) -> None:
        """Count images that another node decoded."""
        self._elsewhere.inc(images)

    def progress(self, images: int, running: int) -> None:
        """Show the live state of a worker that is set up.

        Args:
            images: images computed in total.
            running: tasks that are running.
        """
        if images > self._images_before:
            self._computed.inc(images - self._images_before)
            self._images_before = images
        self._running.set(running)
        self._ready.set(1)


class JobMetrics:
    """The metrics of the driver.

    Args:
        shards: of the job.
        done: shards of the job that were done before.
        workers: number of workers that the job asked for.
    """

    def __init__(self, shards: int, done: int, workers: int) -> None:
        self._total, self._before, self._wanted = shards, done, workers
        self._shards, self._workers = _SHARDS.make(), _WANTED.make()

    def show(self, made: int, given_up: int) -> None:
        """Set the gauges; call it at least every few seconds.

        Args:
            made: shards made since.
            given_up: shards given up.
        """
        done = self._before + made
        states = {"done": done, "given up": given_up, "left": self._total - done - given_up}
        for state, shards in states.items():
            self._shards.set(shards, {"state": state})
        self._workers.set(self._wanted)

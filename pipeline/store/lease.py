"""A job's lease on the shards that it makes, or on all of a store or a training; it refuses a second job on the same.

The lease is an object in the store, which its job writes anew every few seconds with a higher count. Another job tells
by its own monotonic clock whether the count goes on: clocks of machines are never compared. A lease that stands still
for a minute is that of a dead job, and so is one at once whose process is known to have ended on this machine.

A lease saves work and no more. What is in the store is right without it, because every shard is committed at most once
(`pipeline.store.shard`): also when a job that was stopped for more than a minute goes on until it finds its lease gone.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from densefeat import layout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.io.process import Process, this_process

__all__ = ["Lease"]

logger = logging.getLogger(__name__)

_BEAT_S = 5.0
_DEAD_S = 60.0  # without a beat; a request is retried for longer, but then the storage answers nobody
_POLL_S = 0.5


@dataclass(frozen=True)
class _Held:
    """A lease as it was read.

    Attributes:
        name: of the lease.
        data: its bytes.
        shards: [first, end) of its shards; None: all.
        making: whether its job makes them; False: its job asks whether it may.
        process: the process of its job; None if that cannot be read.
        since: when its job began, by its own clock, for messages.
    """

    name: str
    data: bytes
    shards: tuple[int, int] | None
    making: bool
    process: Process | None
    since: str

    def meets(self, shards: tuple[int, int] | None) -> bool:
        return self.shards is None or shards is None or max(self.shards[0], shards[0]) < min(self.shards[1], shards[1])

    def __str__(self) -> str:
        which = "all of it" if self.shards is None else f"shards {self.shards[0]} to {self.shards[1] - 1}"
        if self.process is None:
            return f"{which}, since {self.since}"
        return f"{which}, in process {self.process.pid} on {self.process.host}, since {self.since}"


class Lease:
    """The lease of a job, held while the context lasts.

    Args:
        objects: the store, which may not be set up yet.
        shards: the shards that the job makes; None: all, also because it deletes or repairs them.
        beat_s: seconds between two counts.
        dead_s: seconds without a count after which the job of a lease is dead.
    """

    def __init__(
        self, objects: Objects, shards: range | None, *, beat_s: float = _BEAT_S, dead_s: float = _DEAD_S
    ) -> None:
        self._beat_s, self._dead_s = beat_s, dead_s
        self._objects = Objects(objects.uri, objects.storage_options, patience_s=objects.patience_s)
        # Neither a beat nor the end of the job may take long; the next beat is another try.
        self._impatient = Objects(objects.uri, objects.storage_options, patience_s=beat_s)
        self._folders = ExitStack()
        self._shards = None if shards is None else (shards.start, shards.stop)
        self._name, self._since = uuid.uuid4().hex, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self._beats, self._making = 0, False
        self._replaced: set[str] = set()  # leases of jobs that this one took for dead
        self._apart: set[str] = set()  # leases on other shards
        self._over, self._lost = threading.Event(), threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            JobError: another job holds a lease on some of the shards, and is alive.
        """
        self._folders.enter_context(self._objects.leaving_no_folders())
        try:
            self._write(self._objects)
            self._thread.start()
            self._watch(asking=True)
            self._making = True
            self._write(self._objects)
            self._watch(asking=False)  # in case this process was stopped before it wrote, and taken for dead
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """Check that no other job took the lease away.

        Raises:
            JobError: it is gone.
        """
        if self._lost.is_set():
            raise JobError(
                f"the lease of this job on {self._objects.uri} is gone: the job stood still for "
                f"{self._dead_s:.0f} s and another one took its place, or the store was deleted; finished shards stay"
            )

    def clear(self) -> None:
        """Delete the leases of other jobs that make shards: there is nothing left to make."""
        for other in self._others():
            if other.making:
                self._objects.delete(layout.job_key(other.name))

    def _write(self, objects: Objects) -> None:
        with self._writing:
            if self._over.is_set():
                return
            self._beats += 1
            document = {
                "shards": self._shards,
                "making": self._making,
                "beats": self._beats,
                "since": self._since,
                **asdict(this_process()),
            }
            objects.put(layout.job_key(self._name), json.dumps(document).encode())

    def _beat_on(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                if not self._impatient.exists(layout.job_key(self._name)):
                    self._lost.set()
                    return
                self._write(self._impatient)
                if self._making and self._is_replaced():
                    self._lost.set()
                    return
            except Exception as error:  # each client has its own exception types
                logger.warning("the lease of this job could not be renewed now: %s: %s", type(error).__name__, error)

    def _is_replaced(self) -> bool:
        """Whether another job makes the same shards now, because it took this one for dead.

        A count that reaches the storage late brings a lease back that the other job has deleted. The job that took the
        other's place goes on, and deletes that lease again.
        """
        replaced = False
        for other in self._others(self._impatient):
            if other.name in self._replaced:
                self._impatient.delete(layout.job_key(other.name))
            elif other.making and other.process is not None and not other.process.has_ended():
                replaced = True
        return replaced

    def _end(self) -> None:
        self._over.set()
        try:
            with self._writing:  # a beat on its way must not bring the lease back
                self._impatient.delete(layout.job_key(self._name))
            self._impatient.delete_folder(layout.JOBS)
            self._folders.close()
        except Exception as error:
            logger.warning(
                "the lease of this job could not be deleted, so the next job on its shards waits for %.0f s: %s: %s",
                self._dead_s, type(error).__name__, error,
            )  # fmt: skip

    def _watch(self, *, asking: bool) -> None:
        """Wait until every other lease on these shards is over or dead.

        Args:
            asking: whether to watch jobs that ask, too. Of two that ask, the one with the lower name goes on.

        Raises:
            JobError: the job of one is alive.
        """
        seen: dict[str, tuple[bytes, float]] = {}
        while rivals := [other for other in self._others() if (other.making or asking) and not self._ended(other)]:
            now = time.monotonic()
            for rival in rivals:
                data, since = seen.setdefault(rival.name, (rival.data, now))
                if rival.name in self._replaced:  # a late count brought it back
                    self._objects.delete(layout.job_key(rival.name))
                elif rival.data != data:
                    self._refuse(rival)
                elif since == now:
                    logger.info("waiting up to %.0f s to see if another job is alive: %s", self._dead_s, rival)
                elif now - since > self._dead_s:
                    logger.warning("a job is dead, and this one takes its place: %s", rival)
                    self._replaced.add(rival.name)
                    self._objects.delete(layout.job_key(rival.name))
            time.sleep(min(_POLL_S, self._beat_s))
        self.check()

    def _ended(self, rival: _Held) -> bool:
        """Whether the process of a lease has ended on this machine; its lease is then deleted."""
        if rival.process is None or not rival.process.has_ended():
            return False
        self._objects.delete(layout.job_key(rival.name))
        return True

    def _refuse(self, rival: _Held) -> None:
        if not rival.making and rival.name > self._name:
            return  # it asks as well, and will be refused
        share = "" if self._shards is None else ", or give each job its own --shards"
        raise JobError(f"another job is at work on {self._objects.uri}: {rival}. Wait for its end, or stop it{share}")

    def _others(self, objects: Objects | None = None) -> Iterator[_Held]:
        """Other leases on the same shards."""
        objects = objects or self._objects
        for key in objects.list(layout.JOBS):
            name = key.removeprefix(f"{layout.JOBS}/").removesuffix(".json")
            if name == self._name or name in self._apart:
                continue
            with suppress(FileNotFoundError):  # its job has just ended
                other = _read(name, objects.get(key))
                if other.meets(self._shards):
                    yield other
                else:
                    self._apart.add(name)


def _read(name: str, data: bytes) -> _Held:
    """Read a lease; one of a later version, or a damaged one, is taken for one on all shards."""
    try:
        document: dict[str, Any] = json.loads(data)
        first_end = document["shards"]
        shards = None if first_end is None else (int(first_end[0]), int(first_end[1]))
        process = Process(*(document[field] for field in Process.__dataclass_fields__))
        return _Held(name, data, shards, bool(document["making"]), process, str(document["since"]))
    except (ValueError, LookupError, TypeError):
        return _Held(name, data, None, True, None, "an unknown time")

"""Workers that do as they are told: fail, die, stop; and the real one with a decoder that poison in an image kills.

Where they count, they count in files: they may be any process.
"""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from densefeat.errors import StorageUnavailable, WrongClock
from pipeline.errors import JobError
from pipeline.images.batches import BatchLoader, WorkStopped
from pipeline.images.decoding.decode import Geometry
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.recipe import FeatureRecipe, ImageRecipe, Stages
from pipeline.run.shard_worker import ShardWorker

_IMAGES = ImageRecipe("folder", None, Geometry((8, 8), "crop", (8, 8)), 64, 1)
_RECIPE = FeatureRecipe(_IMAGES, "none", (0,), "random", "layer", "token", {})
SPEC = WorkerSpec(_RECIPE, "cpu", None, 2)


class ScriptedWorker:
    """Stands in for a ``FeatureWorker``."""

    tasks_at_once = 2

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.images_done = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def double(self, number: int) -> int:
        self.images_done += 1
        return 2 * number

    def same(self, value: Any) -> Any:
        return value

    def where(self) -> tuple[int, int, int]:
        """Process, threads of the worker, and torch's inside of operations."""
        return os.getpid(), self.spec.threads, torch.get_num_threads()

    def slow(self, seconds: float, number: int) -> int:
        for _ in range(int(seconds / 0.05)):
            if self._stopped.is_set():
                raise WorkStopped
            time.sleep(0.05)
            self.images_done += 1
        return number

    def raises(self, error: type[Exception], text: str, number: int) -> int:
        """Odd numbers fail."""
        if number % 2:
            raise error(text)
        return number

    def storage_is_back_after(self, log: Path, failures: int) -> int:
        if (tried := count(log)) <= failures:
            raise StorageUnavailable("the storage did not answer")
        return tried

    def refused_on(self, node: str, number: int) -> int:
        """A storage refuses that node for its clock."""
        import ray

        if ray.get_runtime_context().get_node_id() == node:
            raise WrongClock("s3://x: the clock of here says 1970: set it")
        return self.slow(0.5, number)

    def job_error(self, number: int) -> int:
        raise JobError(f"this cannot be done ({number})")

    def killed(self, log: Path, times: int, number: int) -> int:
        """Takes its process with it, a number of times."""
        if count(log) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def count(log: Path) -> int:
    """How often this was called, from any process."""
    with log.open("ab", buffering=0) as file:
        file.write(b"x")
    return log.stat().st_size


def make(spec: WorkerSpec) -> Any:
    return ScriptedWorker(spec)


def _make_badly(log: Path, times: int, how: str, spec: WorkerSpec) -> Any:
    if count(log) <= times:
        if how == "raises":
            raise OSError("no weights")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(3600)
        raise JobError("the backbone is not the driver's")
    return ScriptedWorker(spec)


def making_badly(log: Path, times: int, how: str) -> Any:
    """Set-ups that fail a number of times, and how: "raises", "dies", "hangs", "refuses"."""
    return partial(_make_badly, log, times, how)


KILLS, RAISES = b"this image kills", b"this image raises"


def make_struck(log: Path, times: int, spec: WorkerSpec, stages: Stages | None = None) -> ShardWorker:
    """The real worker, but images with `RAISES` fail a number of times, and then no more."""
    worker = ShardWorker(spec, stages)
    assert isinstance(worker.loader, BatchLoader)
    decode = worker.loader._decode

    def struck(data: Any, seconds: StageSeconds) -> Any:
        if isinstance(data, bytes) and RAISES in data and count(log) <= times:
            raise RuntimeError("by no fault of the image")
        return decode(data, seconds)

    worker.loader._decode = struck  # type: ignore[method-assign]
    return worker


def make_poisoned(spec: WorkerSpec, stages: Stages | None = None) -> ShardWorker:
    """The real worker, but a decoder with two bugs: one takes the process with it, as a crash in a library does."""
    worker = ShardWorker(spec, stages)
    assert isinstance(worker.loader, BatchLoader)
    poison(worker.loader)
    return worker


def poison(loader: BatchLoader) -> BatchLoader:
    """Give a loader the decoder with two bugs."""
    decode = loader._decode

    def poisoned(data: Any, seconds: StageSeconds) -> Any:
        if isinstance(data, bytes) and KILLS in data:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(data, bytes) and RAISES in data:
            raise RuntimeError("a bug in the decoder")
        return decode(data, seconds)

    loader._decode = poisoned  # type: ignore[method-assign]
    return loader

"""Compute low-resolution features of images on one device: needed by every job, and sufficient to fit a PCA basis."""

import logging
import math
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import pyarrow as pa
import torch

from pipeline.errors import JobError
from pipeline.features.pca import Moments
from pipeline.images.batches import Batch, Loader
from pipeline.images.decoding.decode import Decoded
from pipeline.images.sample import Part
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.recipe import FeatureRecipe, Stages
from pipeline.run.resources import available_cores, available_memory, shards_at_once, shards_computing

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs, on any machine.

    Attributes:
        recipe: the job's recipe.
        device: "auto" is resolved by the code that opens the workers.
        batch_size: images in a batch; None: the default for the device.
        threads: CPU threads of this worker.
        decode_elsewhere: whether a worker on a GPU that waits for images may use nodes without a GPU.
    """

    recipe: FeatureRecipe
    device: Literal["auto", "cpu", "cuda"]
    batch_size: int | None
    threads: int
    decode_elsewhere: bool = True

    def on(self, device: Literal["cpu", "cuda"], threads: int) -> "WorkerSpec":
        """The same spec, for a worker on ``device`` with ``threads`` CPU threads."""
        return replace(self, device=device, threads=threads)


class Turns:
    """A semaphore that knows how many wait for it: to hold while the device computes.

    Args:
        count: of tasks that can hold it at the same time.
    """

    def __init__(self, count: int) -> None:
        self._turns, self._lock, self._waiting = threading.BoundedSemaphore(count), threading.Lock(), 0

    @property
    def waiting(self) -> int:
        """Number of tasks that wait."""
        return self._waiting

    def acquire(self) -> None:
        """Wait for a turn."""
        with self._lock:
            self._waiting += 1
        try:
            self._turns.acquire()
        finally:
            with self._lock:
                self._waiting -= 1

    def release(self) -> None:
        """End a turn."""
        self._turns.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class FeatureWorker:
    """Loader and backbone on a device.

    Args:
        spec: what to build, and for which device.
        stages: the recipe's stages, if they are built already; they are moved to the device.

    Attributes:
        loader: of batches; whoever runs the worker may replace it before its first task.
        computing: turns to hold while the device computes.
        computing_at_once: number of tasks that can hold it at the same time.
        tasks_at_once: number of tasks to run at the same time, each in its own thread.
        images_done: rows processed since the worker was built; progress is derived from it.

    Raises:
        JobError: a stage differs from the driver's (this machine has other weights), or the device does not exist.
    """

    def __init__(self, spec: WorkerSpec, stages: Stages | None = None) -> None:
        self.spec = spec
        self.device = torch.device(pick_device(spec.device))
        self.batch_size = spec.batch_size or _DEFAULT_BATCH_SIZE[self.device.type]
        self.geometry = spec.recipe.images.geometry
        self.loader: Loader = spec.recipe.images.loader(self.batch_size, spec.threads)
        self.stages = (spec.recipe.build() if stages is None else stages).to(self.device)
        self.backbone = self.stages.backbone
        self.images_done = 0
        self._fitting_rows = self.batch_size  # largest batch known to fit in the device's memory
        kind, memory = self.device.type, available_memory() * spec.threads / max(available_cores(), spec.threads)
        self.computing_at_once = shards_computing(kind, spec.threads, memory=memory, task_nbytes=self._task_nbytes())
        self.computing = Turns(self.computing_at_once)
        self.tasks_at_once = shards_at_once(
            kind, self.computing_at_once, memory=memory, waiting_nbytes=self._waiting_nbytes()
        )

    def moments(self, references: pa.Table) -> Part[Moments]:
        """Moments of the low-resolution features of the referenced images."""
        total = Part(Moments.none(self.backbone.num_chs), 0, None)
        for batch in self.loader.batches(references, StageSeconds()):
            error = next((str(image) for image in batch.decoded if not isinstance(image, Decoded)), None)
            total = total.merged(self._moments_of(batch, error))
            self.images_done += len(batch.decoded)
        return total

    def _moments_of(self, batch: Batch, error: str | None) -> Part[Moments]:
        if not batch.usable_rows.any():
            return Part(Moments.none(self.backbone.num_chs), 0, error)
        with self.computing:
            parts = self.in_parts_that_fit(batch, lambda part: self.backbone(part.pixels.to(self.device)))
        features = torch.cat(parts)
        finite = features.isfinite().all(1)
        valid = finite & batch.valid_cells(self.backbone.grid, self.geometry.output_size).to(self.device)
        images = int(valid.flatten(1).any(1).sum())
        if error is None and not finite.all():
            error = "its features contain NaN or infinity"
        return Part(Moments.of(features, valid), images, error)

    def in_parts_that_fit(self, batch: Batch, compute: Callable[[Batch], Result]) -> list[Result]:
        """Results of ``compute`` for the batch, in halves, quarters, … if they alone fit in the device's memory.

        The size that fits is remembered. Call it only while holding ``computing``.

        Raises:
            torch.OutOfMemoryError: the memory is too small for one image.
        """
        results: list[Result] = []
        start = 0
        while start < len(batch.decoded):
            end = min(start + self._fitting_rows, len(batch.decoded))
            try:
                results.append(compute(batch.rows(start, end)))
            except torch.cuda.OutOfMemoryError:
                if end - start == 1:
                    raise
                self._fitting_rows = (end - start) // 2
            else:
                start = end
                continue
            # Here the error, and with it what the computation had allocated, is gone.
            torch.cuda.empty_cache()
            logger.warning(
                "%d images do not fit in the memory of %s: going on with %d at once", end - start, self.device,
                self._fitting_rows,
            )  # fmt: skip
        return results

    def stop(self) -> None:
        """Stop running tasks: each raises `pipeline.images.batches.WorkStopped` before its next batch."""
        self.loader.stop.set()

    def _waiting_nbytes(self) -> int:
        """Approximate memory in bytes of a task that does not compute: pixels of three batches."""
        return self.batch_size * math.prod(self.geometry.size) * 3 * 3

    def _task_nbytes(self) -> int:
        """Approximate memory in bytes of a task: the same, and the backbone's activations for a batch."""
        return self._waiting_nbytes() + self.batch_size * math.prod(self.geometry.size) * 4 * _ACTIVATIONS_A_PIXEL

    def made_by(self) -> dict[str, str]:
        """Properties of the worker that may differ between the shards of a store, for the ledger."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "device": device,
            "batch_size": str(self._fitting_rows),
            "torch": torch.__version__,
        }


# Large enough to fill the device, small enough for its memory with k = 256 at 224 px; on a CPU, per computing shard.
_DEFAULT_BATCH_SIZE = {"cpu": 4, "cuda": 32}
_ACTIVATIONS_A_PIXEL = 64  # float32 values, of the widest layer and its neighbours


def pick_device(device: str) -> str:
    """Resolve "auto" to "cuda" if a CUDA device is available, else to "cpu"; other values are returned unchanged.

    Raises:
        JobError: "cuda" was requested, but no CUDA device is available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise JobError("--device cuda, but torch finds no CUDA device here: use --device cpu, or check the driver")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device

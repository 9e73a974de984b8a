"""The process of a worker on a Ray cluster.

This module imports little, so that Ray can import it and start an actor quickly and without hanging. Anything that may
be slow or hang (torch, the stages, a file system that does not answer) happens in ``set_up``, which has a timeout.
"""

import asyncio
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

if TYPE_CHECKING:
    from pipeline.run.feature_worker import FeatureWorker
    from pipeline.run.ray.metrics import WorkerMetrics

__all__ = ["WorkerActor", "WorkerProgress"]


class WorkerProgress(NamedTuple):
    """Progress that a worker reports.

    Attributes:
        images: images done in total.
        running: tasks that it is running now.
    """

    images: int
    running: int


class WorkerActor:
    """A worker in an actor: its tasks run in threads, while the actor answers progress requests.

    Building the stages is a separate call, so that the caller gets its exception as it was raised.

    Args:
        ahead: whether to import the stages' libraries at once: the driver is still planning the job.
    """

    def __init__(self, ahead: bool) -> None:
        self._worker: FeatureWorker | None = None
        self._metrics: WorkerMetrics | None = None
        self._threads = ThreadPoolExecutor(1, "task")
        self._running = 0
        if ahead:
            self._threads.submit(_import_stages)

    async def node(self) -> str:
        """ID of the node that this actor is on; answers as soon as the actor is alive."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def set_up(self, what: bytes, files: Mapping[str, bytes], cpus: float, gpus: float) -> int:
        """Build the stages; returns how many tasks the worker can run at once.

        Args:
            what: the spec, whose number of threads is determined here, and the function that builds a worker from it;
                pickled, so that the imports that they need happen in a thread.
            files: checkpoint files in object storage that the driver has fetched, by URI.
            cpus: CPUs that were requested for this actor.
            gpus: share of a GPU that was requested for it.
        """
        loop = asyncio.get_running_loop()
        worker, self._metrics = await loop.run_in_executor(self._threads, _build, what, files, cpus, gpus)
        self._worker, self._threads = worker, ThreadPoolExecutor(worker.tasks_at_once, "task")
        return worker.tasks_at_once

    async def progress(self) -> WorkerProgress:
        """Progress of the worker; answers while tasks run."""
        progress = WorkerProgress(self._worker.images_done if self._worker else 0, self._running)
        if self._metrics is not None:
            self._metrics.progress(*progress)
        return progress

    async def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Run a task: a method of the worker's class, with its arguments."""
        self._running += 1
        try:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._threads, method, self._worker, *arguments)
            if self._metrics is not None:
                self._metrics.finished(result)
            return result
        finally:
            self._running -= 1


def _import_stages() -> None:
    with suppress(Exception):  # `_build` imports them again, and its error is reported
        import timm  # noqa: F401

        from pipeline.run import shard_worker  # noqa: F401


def _build(
    what: bytes, files: Mapping[str, bytes], cpus: float, gpu_share: float
) -> "tuple[FeatureWorker, WorkerMetrics]":
    import torch

    from pipeline.features.checkpoints import at_hand
    from pipeline.run.ray.cluster import living_nodes
    from pipeline.run.ray.decoding.elsewhere import decode_elsewhere
    from pipeline.run.ray.metrics import WorkerMetrics
    from pipeline.run.ray.tables import send_tables_as_streams
    from pipeline.run.resources import available_cores, threads_in_operations, worker_threads

    spec, make = pickle.loads(what)
    send_tables_as_streams()
    os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"  # threads call it, which block no event loop
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    here = ray.get_runtime_context().get_node_id()
    gpus = sum(node.gpus for node in living_nodes() if node.name == here)
    device = spec.device
    assert device != "auto"  # resolved by the driver
    threads = worker_threads(device, available_cores(), gpus=gpus, granted=cpus, gpu_share=gpu_share or 1.0)
    torch.set_num_threads(threads_in_operations(device, threads))  # for the whole process, which the worker owns
    with at_hand(files):
        worker, metrics = make(spec.on(device, threads)), WorkerMetrics()
    if spec.decode_elsewhere and device == "cuda":  # a worker on a CPU uses the other nodes itself, where they are free
        decode_elsewhere(worker, decoded=metrics.decoded_elsewhere)
    return worker, metrics

"""Choose the workers of a job on a Ray cluster."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from pipeline.errors import JobError
from pipeline.features.checkpoints import at_hand, remote_files
from pipeline.run.feature_worker import FeatureWorker, WorkerSpec
from pipeline.run.queue import OUTAGE_S
from pipeline.run.ray.cluster import connected, living_nodes
from pipeline.run.ray.workers import RayWorkers
from pipeline.run.resources import Slot, places_for_workers, places_on_joined
from pipeline.run.shard_worker import make_worker

__all__ = ["connected", "ray_workers"]

logger = logging.getLogger(__name__)


def ray_workers(
    spec: WorkerSpec,
    count: tuple[int, int] | None,
    *,
    gpu_share: float,
    attempts: int,
    stall_timeout_s: float,
    outage_s: float = OUTAGE_S,
    places: Mapping[str, str],
) -> RayWorkers:
    """Workers on the connected cluster: ``count`` of them, or one per GPU, or one per CPU node if there is no GPU.

    Args:
        spec: spec of the workers; the device is resolved here, the number of threads by each worker.
        count: smallest and largest number of workers; None to use the whole cluster, and nodes that join it.
        gpu_share: share of a GPU that each worker takes.
        attempts: as for ``RayWorkers``.
        stall_timeout_s: as for ``RayWorkers``.
        outage_s: as for ``RayWorkers``.
        places: locations that workers read or write, by the option that names them.

    Raises:
        JobError: the cluster lacks the requested devices, and either no count was given or it cannot add nodes.
    """
    nodes, may_grow = living_nodes(), bool(os.environ.get("RAY_ADDRESS"))
    gpus = sum(node.gpus for node in nodes)
    device = spec.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
        if not gpus and may_grow:
            logger.warning("the cluster has no GPU now: running on CPUs. To request GPUs: --device cuda --workers 1:N")
    # A cluster can add nodes on request; Ray in this process has only the resources of this machine.
    if device == "cuda" and not gpus and not (count and may_grow):
        raise JobError(
            "--device cuda, but there is no GPU: use --device cpu, or --workers N on a cluster that adds GPU nodes on "
            "request"
        )
    slots = places_for_workers(device, nodes, count, gpu_share)
    if not slots:
        raise JobError(
            "no node of the cluster has CPUs for workers: if the cluster adds nodes on request, pass --workers N"
        )
    if len(nodes) > 1:
        _warn_of_local_folders(places, len(nodes))

    def joined(slots: Sequence[Slot]) -> Sequence[Slot]:
        if count is not None or not may_grow:
            return ()
        return places_on_joined(device, living_nodes(), slots, gpu_share)

    return RayWorkers(
        spec.on(device, spec.threads),
        slots,
        least=None if count is None else count[0],
        joined=joined,
        attempts=attempts,
        stall_timeout_s=stall_timeout_s,
        outage_s=outage_s,
        # Ray brings them to each node once; the workers of a node would fetch them one by one.
        make=partial(_make_with, ray.put(remote_files(spec.recipe.checkpoints))),
    )


def _make_with(files: Any, spec: WorkerSpec) -> FeatureWorker:
    """Build a worker with checkpoint files from Ray's object store."""
    with at_hand(ray.get(files)):
        return make_worker(spec)


def _warn_of_local_folders(places: Mapping[str, str], nodes: int) -> None:
    for option, place in places.items():
        if "://" not in place and "/" in place:
            logger.warning(
                "the cluster has %d nodes: %s %s must be the same folder on all of them (a network file system)",
                nodes, option, place,
            )  # fmt: skip

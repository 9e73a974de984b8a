"""Which workers a job gets of a Ray cluster."""

import logging
import os
from collections.abc import Mapping

from pipeline.errors import JobError
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.ray.cluster import connected, living_nodes
from pipeline.run.ray.workers import RayWorkers
from pipeline.run.resources import places_for_workers

__all__ = ["connected", "ray_workers"]

logger = logging.getLogger(__name__)


def ray_workers(
    spec: WorkerSpec, count: int | None, *, attempts: int, stall_timeout_s: float, places: Mapping[str, str]
) -> RayWorkers:
    """Workers on the connected cluster: ``count`` of them, or one a GPU, or where there is none, one a CPU node.

    Args:
        spec: its device is settled here, its threads by each worker for itself.
        count: None to fill the cluster as it is now.
        attempts: as ``RayWorkers``.
        stall_timeout_s: as ``RayWorkers``.
        places: that workers read or write, by the option that names them.

    Raises:
        JobError: the cluster lacks the devices asked for, and no count says that it will have them.
    """
    nodes, may_grow = living_nodes(), bool(os.environ.get("RAY_ADDRESS"))
    gpus = sum(node.gpus for node in nodes)
    device = spec.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
        if not gpus and may_grow:
            logger.warning("the cluster has no GPU now: running on CPUs. To request GPUs: --device cuda --workers N")
    # A cluster can add nodes when they are asked for; Ray in this process has what the machine has.
    if device == "cuda" and not gpus and not (count and may_grow):
        raise JobError(
            "--device cuda, but there is no GPU: use --device cpu; or on a cluster that adds GPU nodes when they are "
            "asked for, give --workers N"
        )
    slots = places_for_workers(device, nodes, count)
    if not slots:
        raise JobError(
            "no node of the cluster has CPUs to give out: on one that adds nodes when they are asked for, give "
            "--workers N"
        )
    if len(nodes) > 1:
        _warn_of_local_folders(places, len(nodes))
    return RayWorkers(spec.on(device, spec.threads), slots, attempts=attempts, stall_timeout_s=stall_timeout_s)


def _warn_of_local_folders(places: Mapping[str, str], nodes: int) -> None:
    for option, place in places.items():
        if "://" not in place and "/" in place:
            logger.warning(
                "the cluster has %d nodes: %s %s must be the same folder on all of them (a network file system)",
                nodes, option, place,
            )  # fmt: skip

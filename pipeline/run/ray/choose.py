"""Choose the workers of a job on a Ray cluster."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import JobError
from pipeline.features.checkpoints import remote_files
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.queue import OUTAGE_S
from pipeline.run.ray.cluster import connected, living_nodes
from pipeline.run.ray.workers import RayWorkers
from pipeline.run.resources import Slot, places_for_workers, places_on_joined
from schemas.options import FeatureConfig

__all__ = ["ChosenWorkers", "connected", "ray_workers", "requested_workers"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenWorkers:
    """Workers that can be requested from the cluster before the job is planned.

    Attributes:
        workers: the workers.
        device: of each.
    """

    workers: RayWorkers
    device: Literal["cpu", "cuda"]

    def build(self, spec: WorkerSpec) -> RayWorkers:
        """The workers, which now know their spec; its number of threads is determined by each."""
        # Ray brings the files to each node once; the workers of a node would fetch them one by one.
        self.workers.build(spec.on(self.device, spec.threads), files=remote_files(spec.recipe.checkpoints))
        return self.workers


@contextmanager
def requested_workers(
    config: FeatureConfig, *, attempts: int, stall_timeout_s: float, outage_s: float
) -> Iterator[ChosenWorkers]:
    """Connect to the cluster and request the workers of a job; they end with the context.

    Args:
        config: the job's options.
        attempts: as for `RayWorkers`.
        stall_timeout_s: as for `RayWorkers`.
        outage_s: as for `RayWorkers`.

    Raises:
        JobError: as in `connected` and `ray_workers`.
    """
    options = ("images", "store", "weights", "upsampler_weights")
    places = {f"--{name.replace('_', '-')}": getattr(config, name, None) or "" for name in options}
    with connected():
        chosen = ray_workers(
            config.device,
            config.worker_range,
            gpu_share=config.gpu_share,
            attempts=attempts,
            stall_timeout_s=stall_timeout_s,
            outage_s=outage_s,
            places=places,
        )
        with chosen.workers:
            yield chosen


def ray_workers(
    device: Literal["auto", "cpu", "cuda"],
    count: tuple[int, int] | None,
    *,
    gpu_share: float,
    attempts: int,
    stall_timeout_s: float,
    outage_s: float = OUTAGE_S,
    places: Mapping[str, str],
) -> ChosenWorkers:
    """Workers on the connected cluster: ``count`` of them, or one per GPU, or one per CPU node if there is no GPU.

    Args:
        device: of the workers; "auto" is resolved here.
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

    workers = RayWorkers(
        None,
        slots,
        least=None if count is None else count[0],
        joined=joined,
        attempts=attempts,
        stall_timeout_s=stall_timeout_s,
        outage_s=outage_s,
    )
    return ChosenWorkers(workers, device)


def _warn_of_local_folders(places: Mapping[str, str], nodes: int) -> None:
    for option, place in places.items():
        if "://" not in place and "/" in place:
            logger.warning(
                "the cluster has %d nodes: %s %s must be the same folder on all of them (a network file system)",
                nodes, option, place,
            )  # fmt: skip

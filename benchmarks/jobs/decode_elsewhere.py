"""Claim: a node without a GPU decodes for a worker whose own cores cannot.

    python -m benchmarks.jobs.decode_elsewhere --images PHOTOS

A worker with one core and a stand-in for a GPU, which takes no core and `DEVICE_IMAGES_PER_S`, reads and decodes
photographs for a network of 224 px: by itself, and with a further node of one core. Both nodes are Ray's on this
machine; each has a core to itself, so twice the rate is the most there can be. Nothing is encoded or written.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import rows
from pipeline.images.decoding.decode import Geometry
from pipeline.images.listing.source import list_images
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import Turns, WorkerSpec
from pipeline.run.recipe import FeatureRecipe, ImageRecipe
from pipeline.run.resources import GPU_SHARDS, Slot

TURNS, SHARDS, SHARD_IMAGES, BATCH, DEVICE_IMAGES_PER_S = 4, 48, 64, 32, 1000
_IMAGES = ImageRecipe("folder", None, Geometry((224, 224), "crop", (224, 224)), 100_000_000, 8)
SPEC = WorkerSpec(FeatureRecipe(_IMAGES, "none", (0,), "random", "layer", "token", {}), "cpu", BATCH, 1)


class Worker:
    """Reads and decodes as a worker on a GPU does, with the other node or without; the GPU sleeps."""

    tasks_at_once = GPU_SHARDS

    def __init__(self, spec: WorkerSpec) -> None:
        from pipeline.run.ray.decoding.elsewhere import decode_elsewhere

        self.spec, self.batch_size = spec, BATCH
        self.images_done = self.elsewhere = 0
        self.computing = Turns(1)
        self.loader: Any = spec.recipe.images.loader(BATCH, spec.threads)
        self._own = self.loader
        decode_elsewhere(self, decoded=self._decoded)  # type: ignore[arg-type]

    def shard(self, references: pa.Table, with_node: bool) -> int:
        """Make nothing of a shard; returns its number of images."""
        loader = self.loader if with_node else self._own
        for batch in loader.batches(references, StageSeconds()):
            with self.computing:
                time.sleep(len(batch.decoded) / DEVICE_IMAGES_PER_S)
            self.images_done += len(batch.decoded)
        return references.num_rows

    def _decoded(self, images: int) -> None:
        self.elsewhere += images

    def count_elsewhere(self) -> int:
        """Number of images that the other node has decoded."""
        return self.elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with about 200 photographs")
    row = {**measure(parser.parse_args().images), **rows.measured_on()}
    rows.append("decode_elsewhere", row)
    print(json.dumps(row))


def measure(images: Path) -> dict[str, Any]:
    """Rates of the worker by itself and with the node, in turns."""
    from pipeline.run.ray.workers import RayWorkers

    found = list_images(str(images)).references
    shards = [found.take([i % found.num_rows for i in range(first, first + SHARD_IMAGES)])
              for first in range(0, SHARDS * SHARD_IMAGES, SHARD_IMAGES)]  # fmt: skip
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "with a node": []}
    with two_nodes() as node, RayWorkers(SPEC, [Slot(1, 0, node)], make=Worker) as workers:  # type: ignore[arg-type]
        run(workers, shards[: GPU_SHARDS + 4], with_node=True)  # their processes import everything
        for _ in range(TURNS):
            for name, results in runs.items():
                results.append(run(workers, shards, with_node=name != "alone"))
                print(name, results[-1], file=sys.stderr)
    return {
        "shard_images": SHARD_IMAGES,
        "shards": SHARDS,
        "device_images_per_s": DEVICE_IMAGES_PER_S,
        "turns": TURNS,
        "load_before": round(load, 1),
        # The fastest: whatever else the machine does only slows a run.
        "runs": {name: max(results, key=lambda run: run["images_per_s"]) for name, results in runs.items()},
        "spread": {name: [run["images_per_s"] for run in results] for name, results in runs.items()},
    }


@contextmanager
def two_nodes() -> Iterator[str]:
    """A cluster of two nodes that have a core each; yields the name of the one that is said to have a GPU."""
    import ray
    from ray.cluster_utils import Cluster

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit(f"a benchmark of two nodes with a core each: got {len(cores)} core, expected 2 or more")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        os.sched_setaffinity(0, {cores[0]})  # which processes inherit
        with_gpu = cluster.add_node(num_cpus=1, num_gpus=1)
        os.sched_setaffinity(0, {cores[1]})
        cluster.add_node(num_cpus=1)
        os.sched_setaffinity(0, cores)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="ERROR")
        yield with_gpu.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(workers: Any, shards: list[pa.Table], *, with_node: bool) -> dict[str, Any]:
    """Rate of a worker while there is a shard for it to begin, and the share of all images that the node decoded."""
    ((_, before),) = workers.map(Worker.count_elsewhere, [()])
    begun, seconds, images, done = time.monotonic(), 0.0, 0, 0

    def count(more: int) -> None:
        nonlocal done
        done += more

    tasks = [(shard, with_node) for shard in shards]
    for ended, (_, rows_of) in enumerate(workers.map(Worker.shard, tasks, count), 1):
        assert rows_of == SHARD_IMAGES
        if ended == len(shards) - GPU_SHARDS:
            seconds, images = time.monotonic() - begun, done
    ((_, after),) = workers.map(Worker.count_elsewhere, [()])
    share = (after - before) / (len(shards) * SHARD_IMAGES)
    return {"images": images, "images_per_s": round(images / seconds, 1), "elsewhere": round(share, 3)}


if __name__ == "__main__":
    main()

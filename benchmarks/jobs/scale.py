"""Claim: how the main job scales from 1 to 1,000 GPUs, and what limits it: simulated, from measured times.

    python -m benchmarks.jobs.scale                # simulates, from rows of main_job and scale_measured
    python -m benchmarks.jobs.scale --price 4.5    # also the cost, with this price of a GPU and its cores per hour

`benchmarks.jobs.cluster_model` is the simulation. Its times are measured: those of an image are the H100's row in
``results/main_job.jsonl``; the driver's, and the cost of compact features relative to dense ones, are those of
`benchmarks.jobs.scale_measured`. One thing is fitted: a shard takes longer than its stages (copies from the GPU,
hashes, the interpreter's lock). This rest is chosen so that the simulation of the measured job has its rate. To check
the simulation, one worker on two cores is fitted alike, and the rates of two and of four workers there are predicted.

Object storage (docs.aws.amazon.com/AmazonS3/latest/userguide): at least 3,500 PUT and 5,500 GET requests per second and
prefix, first bytes after 100 to 200 ms, and 100 Gb/s per instance, which 8 GPUs share (optimizing-performance.html).
Assumed: 90 MB/s per request, and the rate of preemptions. Sizes of datasets are approximate: 138 GB for 1.28 million
images of ImageNet-1k, 1.3 TB for the 14.2 million of ImageNet-21k, 10 TB for the 400 million of LAION-400M at 256 px.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks import rows
from benchmarks.jobs.cluster_model import Cluster, Cost, Storage, floor, simulate
from benchmarks.jobs.scale_measured import WORKERS
from pipeline.run.resources import GPU_SHARDS

GPUS, CORES = (1, 8, 64, 256, 1000), (8, 16, 32)
DATASETS = {  # images, bytes of each
    "ImageNet-1k": (1_281_167, 108e3),
    "ImageNet-21k": (14_197_122, 92e3),
    "LAION-400M": (400_000_000, 25e3),
}
STORAGE = Storage(latency_s=0.15, gets_per_s=5500, puts_per_s=3500, request_bytes_per_s=90e6)
BYTES_PER_S = 100e9 / 8 / 8  # of 100 Gb/s, a GPU's share
PREEMPTIONS_PER_HOUR, REPLACED_S = 0.01, 300.0
# Longer jobs are simulated up to the greater of these, and continue at the steady rate.
MOST_IMAGES, WAVES = 1_300_000, 4  # of all shards that are in progress at the same time
LATENCIES_S, SHARDS_AT_ONCE = (0.02, 0.05, 0.1, 0.15, 0.2), (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=STORAGE.latency_s, help="seconds to the first byte")
    parser.add_argument("--preemptions", type=float, default=PREEMPTIONS_PER_HOUR, help="of a node per hour")
    parser.add_argument("--price", type=float, help="of a GPU with its cores per hour, in any currency")
    arguments = parser.parse_args()
    row = simulated(replace(STORAGE, latency_s=arguments.latency), arguments.preemptions, arguments.price)
    row |= rows.measured_on()
    rows.append("scale", row)
    print(json.dumps(row))


def simulated(storage: Storage, preemptions: float, price: float | None) -> dict[str, Any]:
    """All simulations, with what they are made of."""
    measured = [row for row in rows.read("scale") if row["kind"] == "measured"][-1]
    gpu_row = max(
        (row for row in rows.read("main_job") if rows.on_gpu(row) and row["backbone"] == "tf_efficientnet_lite0"),
        key=lambda row: row["images"],
    )
    then = Cluster(1, gpu_row["cores"], shards_at_once=gpu_row.get("shards_at_once", 2))  # rows without it: two
    dense = fitted(cost_of(gpu_row, gpu_row["stage_ms_per_image"]), gpu_row["images"], then, gpu_row["images_per_s"])
    costs = {"dense": dense, "compact": as_compact(dense, measured["runs"])}
    runs = []
    for represent, cost in costs.items():
        for cores in CORES:
            for gpus in GPUS:
                cluster = Cluster(
                    gpus, cores, min(gpus, 8), bytes_per_s=BYTES_PER_S,
                    driver_s=measured["driver_ms_per_shard"] / 1000, preemptions_per_hour=preemptions,
                    replaced_s=REPLACED_S,
                )  # fmt: skip
                for dataset, (images, nbytes) in DATASETS.items():
                    found = run(images, replace(cost, read_bytes=nbytes), storage, cluster, gpu_row["start_s"])
                    found |= {} if price is None else {"price": round(price * gpus * found["hours"], 2)}
                    runs.append({"represent": represent, "cores": cores, "gpus": gpus, "dataset": dataset, **found})
                    print(runs[-1], file=sys.stderr)
    what_if = [
        {
            "latency_s": latency,
            "shards_at_once": at_once,
            **steady(
                replace(dense, read_bytes=DATASETS["ImageNet-1k"][1]),
                replace(storage, latency_s=latency),
                Cluster(1, gpu_row["cores"], shards_at_once=at_once, bytes_per_s=BYTES_PER_S),
            ),
        }
        for latency in LATENCIES_S
        for at_once in SHARDS_AT_ONCE
    ]
    return {
        "kind": "simulated",
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "storage": asdict(storage),
        "bytes_per_s": BYTES_PER_S,
        "preemptions_per_hour": preemptions,
        "replaced_s": REPLACED_S,
        "shards_at_once": GPU_SHARDS,
        "start_s": gpu_row["start_s"],
        "driver_ms_per_shard": measured["driver_ms_per_shard"],
        "measured_gpu": {name: gpu_row[name] for name in ("device", "cores", "images_per_s", "commit")},
        "validation": validation(measured),
        "what_if": what_if,
        "runs": runs,
    }


def cost_of(row: dict[str, Any], stage_ms: dict[str, float], shard_rows: int = 64, batch: int = 32) -> Cost:
    """The cost of an image in a measured job, without the rest."""
    device = stage_ms["backbone"] + stage_ms["upsample"]
    return Cost(
        stage_ms["decode"] / 1000, device / 1000, stage_ms["encode"] / 1000, 0.0, 0.0, row["store_bytes_per_image"],
        shard_rows, batch=batch,
    )  # fmt: skip


def as_compact(dense: Cost, runs: dict[str, dict[str, Any]]) -> Cost:
    """The cost with compact features: encoding and bytes in proportion to those measured on one machine.

    Decoding, the device and the rest are taken as for dense features: an upper bound.
    """
    whole, compact = runs["1 workers"], runs["compact"]
    share = compact["stage_ms_per_image"]["encode"] / whole["stage_ms_per_image"]["encode"]
    nbytes = dense.written_bytes * compact["store_bytes_per_image"] / whole["store_bytes_per_image"]
    return replace(dense, encode_s=dense.encode_s * share, written_bytes=nbytes, shard_rows=256, objects=2)


def fitted(cost: Cost, images: int, cluster: Cluster, images_per_s: float) -> Cost:
    """The cost with the rest for which a job on local files has the measured rate; 0 if it is slower without any."""

    def rate(rest: float) -> float:
        return images / simulate(images, replace(cost, rest_s=rest), Storage(), cluster).seconds

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > images_per_s else (low, middle)
    return replace(cost, rest_s=low)


def run(images: int, cost: Cost, storage: Storage, cluster: Cluster, start_s: float) -> dict[str, Any]:
    """A job: simulated to its end, or up to a number of shards and continued at the steady rate."""
    most = max(MOST_IMAGES, WAVES * cluster.shards_at_once * cost.shard_rows * cluster.workers)
    outcome = simulate(min(images, most), cost, storage, cluster)
    seconds = start_s + outcome.seconds + (images - outcome.images) / outcome.steady_images_per_s
    limit, by = floor(cost, storage, cluster)
    return {
        "images_per_s": round(images / seconds, 1),
        "steady_images_per_s": round(outcome.steady_images_per_s, 1),
        "bottleneck": outcome.bottleneck,
        "busy": outcome.busy,
        "hours": round(seconds / 3600, 3),
        "node_hours": round(seconds / 3600 * len(range(0, cluster.workers, cluster.per_node)), 2),
        "lost_shards": outcome.lost_shards,
        "simulated_images": outcome.images,
        "floor_hours": round(images / limit / 3600, 3),
        "floor_by": by,
    }


def steady(cost: Cost, storage: Storage, cluster: Cluster) -> dict[str, Any]:
    """Steady rate and bottleneck of a job of a thousand shards."""
    outcome = simulate(1000 * cost.shard_rows, cost, storage, cluster)
    return {"images_per_s": round(outcome.steady_images_per_s, 1), "bottleneck": outcome.bottleneck}


def validation(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rates of the jobs on this machine, measured and simulated with the times of the job with one worker."""
    one, cores = measured["runs"]["1 workers"], measured["cores"]
    busy = sum(one["stage_ms_per_image"][stage] for stage in ("decode", "backbone", "upsample", "encode"))
    core_share = one["cpu_ms_per_image"] / busy  # stages also wait for a core
    stage_ms = {stage: ms * core_share for stage, ms in one["stage_ms_per_image"].items()}
    cost = cost_of(one, stage_ms, measured["shard_images"], batch=4)

    def cluster(workers: int) -> Cluster:
        threads = min(cores, max(WORKERS) // workers)
        return Cluster(workers, cores, shards_at_once=threads + 1, on_cores=True, shared_cores=True,
                       driver_s=measured["driver_ms_per_shard"] / 1000)  # fmt: skip

    cost = fitted(cost, one["images"], cluster(1), one["images_per_s"])
    found = []
    for workers in WORKERS:
        row = measured["runs"][f"{workers} workers"]
        rate = row["images"] / simulate(row["images"], cost, Storage(), cluster(workers)).seconds
        found.append({"workers": workers, "measured": row["images_per_s"], "predicted": round(rate, 2)})
    return found


if __name__ == "__main__":
    main()

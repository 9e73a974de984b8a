"""Claim: how the main job scales from 1 to 1,000 GPUs, and what limits it: simulated, from measured times.

    python -m benchmarks.scale --measure --images PHOTOS --weights FILE   # on this machine: 1, 2 and 4 workers
    python -m benchmarks.scale                                            # simulate, from the rows
    python -m benchmarks.scale --price 4.5                                # dollars per GPU and hour, for the cost

`benchmarks.jobs.cluster_model` is the simulation. Its times are measured: those of an image are the H100's row in
``results/main_job.jsonl``; the driver's, and the cost of compact features relative to dense ones, are measured by
``--measure``. One thing is fitted: a shard takes longer than its stages (copies from the GPU, hashes, the interpreter's
lock), and this rest is chosen so that the simulation of the measured job has its rate. With ``--measure``, the same is
done for one worker on this machine, and the simulation then predicts the rates of two and of four, which are measured.

Object storage: at least 3,500 PUT and 5,500 GET requests per second and prefix, first bytes after 100 to 200 ms, and
100 Gb/s per instance, which 8 GPUs share (docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html).
ImageNet-1k is 138 GB for 1.28 million images, ImageNet-21k 1.3 TB for 14.2 million, LAION-400M about 10 TB for 400
million at 256 px (laion.ai/blog/laion-400-open-dataset).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.jobs.cluster_model import Cluster, Cost, Outcome, Storage, floor, simulate

WORKERS, TURNS, COPIES, SHARD_IMAGES, WARM_SHARDS = (1, 2, 4), 3, 2, 8, 16
GPUS, CORES = (1, 8, 64, 256, 1000), (8, 16, 32)
DATASETS = {  # images, bytes of each
    "ImageNet-1k": (1_281_167, 108e3),
    "ImageNet-21k": (14_197_122, 92e3),
    "LAION-400M": (400_000_000, 25e3),
}
STORAGE = Storage(latency_s=0.15, gets_per_s=5500, puts_per_s=3500)
BYTES_PER_S = 100e9 / 8 / 8  # of 100 Gb/s, a GPU's share
PREEMPTIONS_PER_HOUR, REPLACED_S = 0.01, 300.0
# Longer jobs are simulated up to here, and continue at the steady rate.
MOST_SHARDS, SHARDS_OF_A_WORKER = 20_000, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run jobs on this machine instead")
    parser.add_argument("--images", type=Path, help="folder with about 200 photographs")
    parser.add_argument("--weights", type=Path, help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--latency", type=float, default=STORAGE.latency_s, help="seconds to the first byte")
    parser.add_argument("--preemptions", type=float, default=PREEMPTIONS_PER_HOUR, help="of a node per hour")
    parser.add_argument("--price", type=float, help="of a GPU with its cores per hour, in any currency")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one)
        return
    if arguments.measure:
        row = measure(arguments.images, arguments.weights)
    else:
        row = simulated(replace(STORAGE, latency_s=arguments.latency), arguments.preemptions, arguments.price)
    row |= rows.measured_on()
    rows.append("scale", row)
    print(json.dumps(row))


# Measuring on this machine.


def measure(images: Path, weights: Path) -> dict[str, Any]:
    """The job with 1, 2 and 4 workers on this machine, a compact one with 1, and the driver alone."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(COPIES):
            (Path(folder) / "images" / str(copy)).mkdir(parents=True)
            for path in sorted(images.rglob("*.jpg")):
                (Path(folder) / "images" / str(copy) / path.name).symlink_to(path.resolve())
        for turn in range(TURNS):
            for count, represent in [*((count, None) for count in WORKERS), (1, "compact")]:
                options = {
                    "images": f"{folder}/images", "store": f"{folder}/{turn}-{count}-{represent}", "workers": count,
                    "weights": str(weights), "backbone": "tf_efficientnet_lite0", "layer": "-2", "size": "224",
                    "components": 64, "device": "cpu", "shard_images": SHARD_IMAGES, "represent": represent,
                }  # fmt: skip
                name = represent or f"{count} workers"
                runs.setdefault(name, []).append(_in_a_process(options))
                print(name, runs[name][-1], file=sys.stderr)
        driver = _in_a_process({"driver": 400})
    return {
        "kind": "measured",
        "turns": TURNS,
        "shard_images": SHARD_IMAGES,
        "runs": {name: sorted(of, key=lambda run: run["images_per_s"])[len(of) // 2] for name, of in runs.items()},
        "spread": {name: [run["images_per_s"] for run in of] for name, of in runs.items()},
        "driver_ms_per_shard": driver["ms_per_shard"],
    }


def _in_a_process(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--one", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{options} failed with exit code {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(options: dict[str, Any]) -> None:
    """Run one measurement; the last line printed is its result."""
    print(json.dumps(_driver(options["driver"]) if "driver" in options else _job(options)))


def _job(options: dict[str, Any]) -> dict[str, Any]:
    """Rate, CPU seconds and stages of a job, once all its workers are ready and have made some shards."""
    from pipeline.run.prepare import prepare

    from densefeat.storage.objects import Objects
    from pipeline.run.job import make_shards, open_workers
    from pipeline.run.planning.plan import make_plan
    from pipeline.run.ray import cluster
    from schemas.options import UpsampleConfig

    # Ray is told of four CPUs, so that four workers fit on two.
    cluster.available_cores = lambda root=Path("/"): max(WORKERS)
    plan = make_plan(UpsampleConfig(**options))
    objects = Objects(plan.config.store)
    with open_workers(plan.spec, plan.stages, plan.config, attempts=3, stall_timeout_s=1800) as workers:
        encoding = prepare(plan, objects, workers)
        _cpu_seconds(workers)
        warm, timed = list(plan.shards)[:WARM_SHARDS], list(plan.shards)[WARM_SHARDS:]
        make_shards(plan, objects, workers, encoding, warm, [])
        before = _cpu_seconds(workers)
        begun = time.monotonic()
        made, given_up = make_shards(plan, objects, workers, encoding, timed, [])
        seconds = time.monotonic() - begun
        after = _cpu_seconds(workers)
    assert not given_up
    images = sum(record.rows_ok for record in made.values())
    stages: dict[str, float] = {}
    for record in made.values():
        for stage, busy in record.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + busy
    return {
        "workers": options["workers"],
        "images": images,
        "images_per_s": round(images / seconds, 2),
        "cpu_ms_per_image": round(1000 * sum(after[pid] - before[pid] for pid in after) / images, 2),
        "stage_ms_per_image": {stage: round(1000 * busy / images, 2) for stage, busy in stages.items()},
        "store_bytes_per_image": round(sum(record.total_nbytes for record in made.values()) / images),
    }


def _cpu_seconds(workers: Any) -> dict[int, float]:
    """CPU seconds of each worker's process so far; waits until all are ready."""
    found: dict[int, float] = {}
    while len(found) < workers.count:
        found |= dict(result for _, result in workers.map(_process_time, [()] * (4 * workers.count)))
    return found


def _process_time(worker: Any) -> tuple[int, float]:
    import os

    time.sleep(0.3)
    return os.getpid(), time.process_time()


class _Idle:
    """A worker that returns a record of 64 rows at once."""

    tasks_at_once = 2
    images_done = 0

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def record(self, shard: int) -> Any:
        from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table

        outcomes = [RowOutcome(64 * shard + row, "ok", None, 480, 640, (1.0,) * 6, (0, 0, 224, 224), 0, 1)
                    for row in range(64)]  # fmt: skip
        stages = dict.fromkeys(("read", "decode", "backbone", "upsample", "encode", "write"), 0.5)
        made_by = dict.fromkeys(("host", "pid", "device", "batch_size", "torch", "upsampled_by"), "x")
        return LedgerRecord(shard, 64, 0, 1, "0" * 64, "0" * 64, 0, stages, made_by, outcomes_table(outcomes))


def _driver(shards: int) -> dict[str, Any]:
    """CPU milliseconds of the driver's process per shard: tasks, results, progress, blocks of the ledger."""
    from benchmarks.jobs.stand_in import SPEC
    from densefeat.storage.objects import Objects
    from pipeline.reporting.progress import Progress
    from pipeline.run.ray.cluster import connected
    from pipeline.run.ray.workers import RayWorkers
    from pipeline.run.resources import Slot
    from pipeline.store.blocks import BlockWriter

    slots = [Slot(1, 0), Slot(1, 0)]
    with tempfile.TemporaryDirectory() as folder, connected(), RayWorkers(SPEC, slots, make=_Idle) as workers:
        _cpu_seconds(workers)
        blocks = BlockWriter(Objects(folder), shards, [])
        begun, busy = time.monotonic(), time.process_time()
        with Progress(shards, 64 * shards, []) as progress:
            for _, record in workers.map(_Idle.record, [(shard,) for shard in range(shards)], progress.advance):
                blocks.add(record)
                progress.shard_done(record)
        busy, seconds = time.process_time() - busy, time.monotonic() - begun
    return {"ms_per_shard": round(1000 * busy / shards, 3), "shards_per_s": round(shards / seconds, 1)}


# Simulating.


def simulated(storage: Storage, preemptions: float, price: float | None) -> dict[str, Any]:
    """All simulations, with what they are made of."""
    measured = [row for row in rows.read("scale") if row["kind"] == "measured"][-1]
    gpu_row = max(
        (row for row in rows.read("main_job") if rows.on_gpu(row) and row["backbone"] == "tf_efficientnet_lite0"),
        key=lambda row: row["images"],
    )
    dense = fitted(cost_of(gpu_row, gpu_row["stage_ms_per_image"]), gpu_row["images"], Cluster(1, gpu_row["cores"]),
                   gpu_row["images_per_s"])  # fmt: skip
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
    at_once = {
        str(shards): steady(replace(dense, read_bytes=108e3), storage, Cluster(
            1, gpu_row["cores"], shards_at_once=shards, bytes_per_s=BYTES_PER_S))
        for shards in (2, 4, 8, 16)
    }  # fmt: skip
    return {
        "kind": "simulated",
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "storage": asdict(storage),
        "bytes_per_s": BYTES_PER_S,
        "preemptions_per_hour": preemptions,
        "replaced_s": REPLACED_S,
        "start_s": gpu_row["start_s"],
        "driver_ms_per_shard": measured["driver_ms_per_shard"],
        "measured_gpu": {name: gpu_row[name] for name in ("device", "cores", "images_per_s", "commit")},
        "validation": validation(measured),
        "shards_at_once": at_once,
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
    most = cost.shard_rows * max(MOST_SHARDS, SHARDS_OF_A_WORKER * cluster.workers)
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
    outcome: Outcome = simulate(1000 * cost.shard_rows, cost, storage, cluster)
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

"""Claim: what a worker and the driver of a job on Ray take; rates of jobs with 1, 2 and 4 workers on this machine.

    python -m benchmarks.jobs.scale_measured --images PHOTOS --weights FILE

`benchmarks.jobs.scale` simulates larger jobs with this row. The workers share the cores, so that more of them are not
faster: this checks the simulation of cores, not of a cluster. The job is EfficientNet-Lite0's, k = 64, 224 px, with
`SHARD_IMAGES` images per shard; one is compact. Rates are taken once all workers are ready and have made some shards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.jobs.main_job import link_copies

WORKERS, TURNS, COPIES, SHARD_IMAGES, WARM_SHARDS = (1, 2, 4), 3, 2, 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with about 200 photographs")
    parser.add_argument("--weights", type=Path, help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one)
        return
    row = {**measure(arguments.images, arguments.weights), **rows.measured_on()}
    rows.append("scale", row)
    print(json.dumps(row))


def measure(images: Path, weights: Path) -> dict[str, Any]:
    """The job with 1, 2 and 4 workers on this machine, a compact one with 1, and the driver alone."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        link_copies(images, COPIES, Path(folder) / "images")
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
        # The fastest: whatever else the machine does only slows a run.
        "runs": {name: max(of, key=lambda run: run["images_per_s"]) for name, of in runs.items()},
        "spread": {name: [run["images_per_s"] for run in of] for name, of in runs.items()},
        "driver_ms_per_shard": driver["ms_per_shard"],
    }


def _in_a_process(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.jobs.scale_measured", "--one", json.dumps(options)]
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
    from densefeat.storage.objects import Objects
    from pipeline.run.job import open_workers
    from pipeline.run.make_shards import make_shards
    from pipeline.run.planning.plan import make_plan
    from pipeline.run.preparation.prepare import prepare
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

    def record(self, shard: int, references: Any) -> Any:
        from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table

        outcomes = [RowOutcome(64 * shard + row, "ok", None, 480, 640, (1.0,) * 6, (0, 0, 224, 224), 0, 1)
                    for row in range(64)]  # fmt: skip
        stages = dict.fromkeys(("read", "decode", "backbone", "upsample", "encode", "write"), 0.5)
        made_by = dict.fromkeys(("host", "pid", "device", "batch_size", "torch", "upsampled_by"), "x")
        return LedgerRecord(shard, 64, 0, 1, "0" * 64, "0" * 64, 0, stages, made_by, outcomes_table(outcomes))


def _driver(shards: int) -> dict[str, Any]:
    """CPU milliseconds of the driver's process per shard: tasks, results, progress, blocks of the ledger."""
    from benchmarks.jobs.driver import references_of
    from benchmarks.jobs.stand_in import SPEC
    from densefeat.storage.objects import Objects
    from pipeline.reporting.progress import Progress
    from pipeline.run.ray.cluster import connected
    from pipeline.run.ray.workers import RayWorkers
    from pipeline.run.resources import Slot
    from pipeline.store.blocks import BlockWriter

    references = references_of(64)
    tasks = [(shard, references) for shard in range(shards)]
    slots = [Slot(1, 0), Slot(1, 0)]
    with tempfile.TemporaryDirectory() as folder, connected(), RayWorkers(SPEC, slots, make=_Idle) as workers:
        _cpu_seconds(workers)
        blocks = BlockWriter(Objects(folder), shards, [])
        begun, busy = time.monotonic(), time.process_time()
        with Progress(shards, 64 * shards, []) as progress:
            for _, record in workers.map(_Idle.record, tasks, progress.advance):
                blocks.add(record)
                progress.shard_done(record)
        busy, seconds = time.process_time() - busy, time.monotonic() - begun
    return {"ms_per_shard": round(1000 * busy / shards, 3), "shards_per_s": round(shards / seconds, 1)}


if __name__ == "__main__":
    main()

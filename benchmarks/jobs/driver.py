"""Claim: one driver is enough for a million shards: time and memory that it takes for each, without Ray and storage.

    python -m benchmarks.jobs.driver                       # a million shards of 4 images, 100,000 of 64
    python -m benchmarks.jobs.driver --shards 10000 --rows 64

The driver's own code runs as in a job: references of the images, the queue with 1,000 workers of 16 shards each,
arguments of every task as they are sent, results as they are received, blocks of the ledger, then index and manifest.
What workers do is left out: each task is done at once, with the record of a real shard. So are Ray's calls:
`benchmarks.jobs.scale_measured` has them. Times are CPU seconds of the driver's thread. Memory is that of the process:
it includes freed memory that it kept.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa

from benchmarks import rows
from densefeat.layout import FeatureLayout
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes
from pipeline.run.make_shards import make_shards
from pipeline.run.queue import TaskQueue
from pipeline.run.ray.tables import stream_of, table_of
from pipeline.store.layout import finish
from schemas.index import OK, REFERENCES, pending_index
from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table

WORKERS, AT_ONCE = 1000, 16
CASES = ((1_000_000, 4), (100_000, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--rows", type=int, default=64, help="images of a shard")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.shards, arguments.rows)))
        return
    cases = CASES if arguments.shards is None else [(arguments.shards, arguments.rows)]
    for shards, shard_rows in cases:
        command = [sys.executable, "-m", "benchmarks.jobs.driver", "--one", "--shards", str(shards), "--rows"]
        found = subprocess.run([*command, str(shard_rows)], stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(found.stdout.splitlines()[-1]) | rows.measured_on()
        rows.append("driver", row)
        print(json.dumps(row))


def measured(shards: int, shard_rows: int) -> dict[str, Any]:
    """Times and memory of a job of so many shards."""
    empty = memory()
    references = references_of(shards * shard_rows)
    listed = memory()
    features = FeatureLayout(shards * shard_rows, 64, 224, 224, "int8", shard_rows)
    plan: Any = SimpleNamespace(
        shards=range(shards),
        features=features,
        stages=(),  # no metrics of Ray's
        shard_references=lambda shard: references.slice(shard * shard_rows, shard_rows).take(
            pa.array(range(shard_rows))
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        objects, workers = Objects(folder), InstantWorkers(shard_rows)
        begun = time.thread_time()
        made, given_up = make_shards(plan, objects, workers, None, list(plan.shards), [])
        making_s, with_records = time.thread_time() - begun, memory()
        assert len(made) == shards
        assert not given_up
        objects.put("index.parquet", parquet_bytes(pending_index(references)))
        begun = time.monotonic()
        finish(objects, list(made.values()))
        finishing_s = time.monotonic() - begun
        peak = psutil.Process().memory_info().rss if sys.platform != "linux" else peak_memory()
    return {
        "shards": shards,
        "shard_rows": shard_rows,
        "workers": WORKERS,
        "shards_at_once": AT_ONCE,
        "driver_us_per_shard": round(1e6 * (making_s - workers.their_s) / shards, 1),
        "queue_us_per_shard": round(1e6 * workers.queue_s / shards, 1),
        "sent_bytes_per_shard": round(workers.sent / shards),
        "references_bytes_per_image": round((listed - empty) / references.num_rows, 1),
        "records_bytes_per_shard": round((with_records - listed) / shards),
        "finish_s": round(finishing_s, 1),
        "peak_bytes": peak,
    }


def references_of(count: int) -> pa.Table:
    """References as a listing of ImageNet in a bucket has them."""
    keys = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count)]
    uris = [f"s3://bucket/imagenet/train/{key}" for key in keys]
    labels = pa.array((i % 1000 for i in range(count)), pa.int64())
    columns = [pa.array(keys), pa.array(uris), pa.nulls(count, pa.int64()), pa.array(range(count)), labels]
    return pa.table(columns, schema=REFERENCES)


class InstantWorkers:
    """A thousand workers that are done with every task at once.

    Attributes:
        queue_s: CPU seconds spent in the queue.
        their_s: CPU seconds spent on what workers do: making the records that the driver receives.
        sent: bytes of the arguments of all tasks.
    """

    count = WORKERS

    def __init__(self, shard_rows: int) -> None:
        self._shard_rows = shard_rows
        self.queue_s, self.their_s, self.sent = 0.0, 0.0, 0

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def map(
        self,
        method: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_progress: Callable[[int], None] = lambda images: None,
        **_: Any,
    ) -> Iterator[tuple[int, Any]]:
        """As `pipeline.run.ray.workers.RayWorkers.map`, without Ray."""
        begun = time.thread_time()
        queue = TaskQueue[int](len(tasks), attempts=3)
        for worker in range(WORKERS):
            queue.join(worker, f"node {worker // 8}", AT_ONCE, begun)
        self.queue_s += time.thread_time() - begun
        while queue.left:
            begun = time.thread_time()
            handed = queue.hand_out(begun)
            self.queue_s += time.thread_time() - begun
            for _worker, task in handed:
                arguments = [stream_of(one) if isinstance(one, pa.Table) else one for one in tasks[task]]
                self.sent += len(pickle.dumps(arguments, protocol=5))
                begun = time.thread_time()
                result = received(task, self._shard_rows)
                self.their_s += time.thread_time() - begun
                record, outcomes = pickle.loads(result)
                record = replace(record, outcomes=table_of(outcomes))
                begun = time.thread_time()
                queue.done(task, begun)
                self.queue_s += time.thread_time() - begun
                yield task, record
            on_progress(len(handed) * self._shard_rows)


def received(shard: int, shard_rows: int) -> bytes:
    """The record of a shard as Ray brings it: that of usual photographs, by a worker on a GPU."""
    outcomes = [
        RowOutcome(
            shard * shard_rows + i, OK, None, 375, 500, (0.6, 0.0, -38.0, 0.0, 0.6, 0.0), (0, 0, 224, 224),
            795_778 * i, 795_778,
        )
        for i in range(shard_rows)
    ]  # fmt: skip
    stages = ("read", "decode", "backbone", "upsample", "encode", "write", "wait for device")
    made_by = {"host": "ip-10-0-0-1", "pid": "4242", "device": "NVIDIA H100 80GB HBM3", "batch_size": "32",
               "torch": "2.8.0", "upsampled_by": "triton"}  # fmt: skip
    record = LedgerRecord(
        shard, shard_rows, 0, 50_929_792, "0" * 64, "1" * 64, 12, dict.fromkeys(stages, 1.5), made_by,
        outcomes_table(outcomes),
    )  # fmt: skip
    return pickle.dumps((replace(record, outcomes=None), stream_of(record.outcomes)), protocol=5)


def memory() -> int:
    """Bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Most bytes that this process had in memory."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

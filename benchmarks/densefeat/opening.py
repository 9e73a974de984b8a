"""Claim: a store of ImageNet's size is open in less than a second.

    python -m benchmarks.densefeat.opening

Makes the metadata and the index of a finished store of 1,281,167 rows, without shards. Then, each in a process of its
own, five times: what must be read before the first row can be, all of the index, the keys, the row of one key, and all
rows by their keys. CPU seconds, and the memory that it added.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import rows
from benchmarks.jobs.driver import references_of
from densefeat import FeatureStore
from densefeat.layout import INDEX, MANIFEST, FeatureLayout, step_sha256
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes
from pipeline.features.pca import Basis
from pipeline.store.layout import set_up
from schemas.attributes import StoreAttributes
from schemas.configuration import (
    GeometryConfiguration,
    PcaConfiguration,
    SourceConfiguration,
    StorageConfiguration,
    StoreConfiguration,
)
from schemas.index import OK, pending_index, with_outcomes
from schemas.ledger import RowOutcome, outcomes_table

IMAGES, COMPONENTS, CHANNELS, SIZE, SHARD_ROWS, RUNS = 1_281_167, 128, 384, (224, 224), 64, 5
CASES = ("first row", "index", "keys", "row of a key", "rows of all keys")


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(opened(*sys.argv[1:])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_store(folder)
        nbytes = len(Objects(folder).get(INDEX))
        found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(RUNS):
            for case in CASES:
                command = [sys.executable, "-m", "benchmarks.densefeat.opening", folder, case]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                found[case].append(json.loads(output))
    cases = {
        case: {name: statistics.median(run[name] for run in runs) for name in ("cpu_s", "bytes")}
        for case, runs in found.items()
    }
    row = {"rows": IMAGES, "index_bytes": nbytes, "cases": cases, **rows.measured_on()}
    rows.append("opening", row)
    print(json.dumps(row))


def opened(uri: str, case: str) -> dict[str, float]:
    """CPU seconds of this process from opening the store to the result, and the memory that it added."""
    before, begun = psutil.Process().memory_info().rss, time.process_time()
    store = FeatureStore(uri)
    if case == "first row":
        offsets, _, _ = store.chunk_places(np.arange(1))
        assert len(offsets) == 1
    elif case == "index":
        assert store.index.num_rows == IMAGES
    elif case == "keys":
        assert len(store.keys) == IMAGES
    elif case == "row of a key":
        assert store.row_of(f"n{7:08d}/n{7:08d}_1000007.JPEG") == 1_000_007
    else:
        keys = store.lookup["key"].to_pylist()
        assert [store.row_of(key) for key in keys] == list(range(IMAGES))
    return {"cpu_s": time.process_time() - begun, "bytes": psutil.Process().memory_info().rss - before}


def make_store(uri: str) -> None:
    """A store that says it is finished: metadata, index, and a manifest to be there; no shards."""
    objects, references = Objects(uri), references_of(IMAGES)
    orthonormal, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(CHANNELS, COMPONENTS)))
    variance = np.arange(COMPONENTS, 0, -1, dtype=np.float64)
    components = np.ascontiguousarray(orthonormal.T, dtype=np.float32)
    basis = Basis(np.zeros(CHANNELS, np.float32), components, variance, variance / (2 * variance.sum()))
    step = np.full(COMPONENTS, 0.01, np.float32)
    configuration = StoreConfiguration(
        source=SourceConfiguration("s3://bucket/imagenet/train", None, "folder", None, IMAGES, "0" * 64),
        backbone={"name": "vit_small_patch14_dinov2.lvd142m"},
        geometry=GeometryConfiguration(SIZE, "crop", SIZE, 1 << 28, 1),
        pca=PcaConfiguration(COMPONENTS, None, basis.digest),
        upsampler={"name": "jbu"},
        storage=StorageConfiguration("int8", SHARD_ROWS, 1, 0.1),
    )
    attributes = StoreAttributes(configuration, {"densefeat": "benchmark"}, (), 0.5, step_sha256(step))
    features = FeatureLayout(IMAGES, COMPONENTS, *SIZE, "int8", SHARD_ROWS)
    set_up(objects, attributes, features, basis, step, pending_index(references))
    objects.put(INDEX, parquet_bytes(with_outcomes(pending_index(references), outcomes())))
    objects.put(MANIFEST, parquet_bytes(pa.table({"shard": pa.array([], pa.int64())})))


def outcomes() -> pa.Table:
    """Outcomes of photographs of many sizes, with chunks of many lengths."""
    rng = np.random.default_rng(0)
    heights, widths, nbytes = (
        rng.integers(low, high, IMAGES) for low, high in ((300, 600), (300, 600), (400_000, 700_000))
    )
    scales = SIZE[0] / np.minimum(heights, widths)
    offsets = np.concatenate(
        [np.cumsum(part) - part for part in np.split(nbytes, range(SHARD_ROWS, IMAGES, SHARD_ROWS))]
    )
    columns = (heights.tolist(), widths.tolist(), scales.tolist(), offsets.tolist(), nbytes.tolist())
    return outcomes_table(
        [
            RowOutcome(row, OK, None, h, w, (s, 0.0, -(w * s - SIZE[1]) / 2, 0.0, s, -(h * s - SIZE[0]) / 2),
                       (0, 0, *SIZE), offset, length)
            for row, (h, w, s, offset, length) in enumerate(zip(*columns, strict=True))
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()

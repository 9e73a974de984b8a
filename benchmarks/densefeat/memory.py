"""Claim: the memory of an epoch does not grow, however long it is.

    python -m benchmarks.densefeat.memory --images ../shared/data/coco200/images/train

Makes a store of 60 photographs (224 px, k = 64, int8) with the demonstration's weights, in a local folder, and merges
copies of it to one of 1,200 rows. Epochs of ``StreamingFeatures`` with shuffling, float32 on the CPU, one after the
other in one process: its memory is looked at after every batch.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import rows
from benchmarks.densefeat.reader import trial_store
from densefeat import FeatureStore, StreamingFeatures
from jobs.merge_stores import MergeConfig, merge

COPIES, BATCH, EPOCHS, BUFFER_BYTES = 20, 32, 8, 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of at least 60 photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        row = {**measure(_larger(trial_store(options.images, Path(folder)))), **rows.measured_on()}
    rows.append("memory", row)
    print(json.dumps(row))


def _larger(store: FeatureStore) -> FeatureStore:
    """A store of copies of a store's rows."""
    folder = Path(store.uri).parent
    for copy in range(COPIES):
        shutil.copytree(store.uri, folder / f"copy-{copy}")
    copies = tuple(str(folder / f"copy-{copy}") for copy in range(COPIES))
    merge(MergeConfig(stores=copies, output=str(folder / "large"), allow_duplicate_keys=True))
    return FeatureStore(folder / "large")


def measure(store: FeatureStore) -> dict[str, Any]:
    """Most memory of this process during each epoch, and what was read."""
    process, peaks, images = psutil.Process(), [], 0
    dataset = StreamingFeatures(store, BATCH, buffer_bytes=BUFFER_BYTES)
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        peak = 0
        for batch in dataset:
            images += len(batch["row"])
            peak = max(peak, process.memory_info().rss)
        peaks.append(peak)
    k, height, width = store.shape
    return {
        "rows": len(store),
        "k": k,
        "height": height,
        "width": width,
        "batch": BATCH,
        "buffer_bytes": BUFFER_BYTES,
        "images_read": images,
        "float32_bytes": images * k * height * width * 4,
        "peak_bytes": peaks,
    }


if __name__ == "__main__":
    main()

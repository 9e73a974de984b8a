"""Claim: a row takes milliseconds, a box of it hardly less, and an epoch of random pixels a part of one of dense maps.

    python -m benchmarks.densefeat.reader --images ../shared/data/coco200/images/train \
        --masks ../shared/data/coco200/masks/train

Makes a store of 60 photographs (224 px, k = 64, int8) with the demonstration's weights, in a local folder. Times
reading one row, a box of it, points, and several rows, interleaved. Then epochs of 1,000 labelled pixels an image, in
batches, with PixelFeatures and from dense maps, and an epoch of all pixels of dense maps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import rows
from benchmarks.jobs.start import IMAGES, ROOT, main_job
from densefeat import FeatureStore, PixelFeatures, TorchFeatures
from densefeat.align import MaskFolder
from jobs.demo import write_weights

PIXELS, BATCH, READS, EPOCHS = 1000, 4096, 50, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of at least 60 photographs")
    parser.add_argument("--masks", required=True, help="folder of their masks: PNG files with the same names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = trial_store(options.images, Path(folder))
        several = store.rows_with_features[:8]
        reads = _measured(
            {
                "one row": lambda: store.read(3),
                "a box of 64×64": lambda: store.read(3, box=(0, 0, 64, 64)),
                "8 points": lambda: store.sample(3, np.full((8, 2), 50.5)),
                "8 rows, one by one": lambda: [store.read(row) for row in several],
                "8 rows in one call": lambda: store.read(several),
            },
            READS,
        )
        epochs = _measured(
            {
                "PixelFeatures": lambda: _pixels(store, options.masks),
                "dense maps, as many pixels": lambda: _pixels_of_dense_maps(store, options.masks),
                "dense maps, all pixels": lambda: _dense_maps(store, options.masks),
            },
            EPOCHS,
        )
        k, height, width = store.shape
    row = {
        "images": IMAGES,
        "k": k,
        "height": height,
        "width": width,
        "pixels": PIXELS,
        "reads": reads,
        "epochs": epochs,
    }
    rows.append("reader", {**row, **rows.measured_on()})
    print(json.dumps(row))


def trial_store(images: str, folder: Path) -> FeatureStore:
    """A store of 60 photographs, made by the main job with the weights of the demonstration."""
    weights = folder / "weights.safetensors"
    write_weights(weights)
    arguments = [*main_job(images, weights), f"--store={folder}/store"]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    store = FeatureStore(folder / "store")
    assert len(store.rows_with_features) == IMAGES
    return store


def _pixels(store: FeatureStore, masks: str) -> None:
    dataset = PixelFeatures(store, masks, pixels=PIXELS, batch_size=BATCH, threads=1)
    assert sum(len(batch["label"]) for batch in dataset) == IMAGES * PIXELS


def _dense(store: FeatureStore, masks: str) -> Any:
    """Features [H·W, k] and labels [H·W] of each image, as a loader of whole maps gives them."""
    folder = MaskFolder(masks)
    for sample in torch.utils.data.DataLoader(TorchFeatures(store), batch_size=None):
        row = int(sample["row"])
        labels = store.align(folder(store.index["key"][row].as_py()).astype(np.int64), row)
        yield sample["features"].flatten(1).T, torch.from_numpy(labels).flatten()


def _pixels_of_dense_maps(store: FeatureStore, masks: str) -> None:
    """Random pixels of every map, shuffled, in batches."""
    features, labels = [], []
    for pixels, classes in _dense(store, masks):
        chosen = torch.randperm(len(classes))[:PIXELS]
        features.append(pixels[chosen])
        labels.append(classes[chosen])
    order = torch.randperm(IMAGES * PIXELS)
    batches = zip(torch.cat(features)[order].split(BATCH), torch.cat(labels)[order].split(BATCH), strict=True)
    assert sum(len(classes) for _, classes in batches) == IMAGES * PIXELS


def _dense_maps(store: FeatureStore, masks: str) -> None:
    """Every pixel of every map as a row of a matrix, for a classifier."""
    assert (
        sum(len(pixels.contiguous()) for pixels, _ in _dense(store, masks)) == IMAGES * store.shape[1] * store.shape[2]
    )


def _measured(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU milliseconds of interleaved calls in this process, after one that is not counted."""
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(1 + turns):
        for side, function in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            function()
            if turn:
                wall[side].append(1000 * (time.perf_counter() - start))
                cpu[side].append(1000 * (time.process_time() - start_cpu))
    return {side: {"ms": statistics.median(wall[side]), "cpu_ms": statistics.median(cpu[side])} for side in sides}


if __name__ == "__main__":
    main()

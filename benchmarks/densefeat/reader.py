"""Claim: an epoch of random pixels takes a second, where dense maps take many.

    python -m benchmarks.densefeat.reader --images ../shared/data/coco200/images/train

Makes a store of 60 photographs (224 px, k = 64, int8) with random weights, and times reading one row, a box of it,
several rows in one call, and an epoch of 1,000 labelled pixels an image, from dense maps and with PixelFeatures.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import rows
from benchmarks.timing import median_ms
from densefeat import FeatureStore, PixelFeatures, TorchFeatures
from jobs.upsample_imagenet import upsample
from schemas.options import UpsampleConfig

IMAGES, PIXELS, SIZE, K = 60, 1000, 224, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--masks", help="folder of PNG masks by key; default: halves of each image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = UpsampleConfig(
            images=options.images, store=f"{folder}/store", backbone="resnet18", weights="random", layer="2",
            size=str(SIZE), components=K, limit=IMAGES, device="cpu", workers=0,
        )  # fmt: skip
        assert upsample(job) == 0
        store = FeatureStore(job.store)
        masks = options.masks or _written_masks(store, Path(folder) / "masks")
        several = store.rows_with_features[:8]
        sides: dict[str, Callable[[], Any]] = {
            "one row": lambda: store.read(3),
            "a box of 64×64": lambda: store.read(3, box=(0, 0, 64, 64)),
            "8 points": lambda: store.sample(3, np.full((8, 2), 50.5)),
            "8 rows, one by one": lambda: [store.read(row) for row in several],
            "8 rows in one call": lambda: store.read(several),
        }
        ms = median_ms(sides, "cpu")
        seconds = {"PixelFeatures": _seconds(lambda: _drain(PixelFeatures(store, masks, pixels=PIXELS)))}
        seconds["dense maps"] = _seconds(lambda: _dense_epoch(store))
    row = {"images": IMAGES, "k": K, "size": SIZE, "pixels": PIXELS, "ms": ms, "epoch_s": seconds, **rows.measured_on()}
    rows.append("reader", row)
    print(json.dumps(row))


def _written_masks(store: FeatureStore, folder: Path) -> Path:
    for key, height, width in zip(*(store.index[name].to_pylist() for name in ("key", "height", "width")), strict=True):
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2 :] = 1
        path = (folder / key).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return folder


def _dense_epoch(store: FeatureStore) -> None:
    """Whole maps in batches, as a loader gives them, and every pixel's features as rows of a matrix."""
    for batch in torch.utils.data.DataLoader(TorchFeatures(store), batch_size=8):
        batch["features"].permute(0, 2, 3, 1).reshape(-1, K).contiguous()


def _drain(dataset: PixelFeatures) -> None:
    pixels = sum(len(batch["row"]) for batch in dataset)
    assert pixels == len(dataset.rows) * PIXELS


def _seconds(function: Callable[[], None]) -> float:
    function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""Runs of the main job that take a second, the bytes that they store, and images appended to them."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densefeat import FeatureStore, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from jobs.verify_store import VerifyConfig, verify
from pipeline.evaluate.data.originals import stored_geometry
from pipeline.images.decoding.decode import decode
from schemas.options import UpsampleConfig

SIZE = 64
FIRST = 10  # images of a store before others are appended; of fourteen, so that the last shard of four has two


def config(images: Path | str, store: Path | str, **options: Any) -> UpsampleConfig:
    """A job that takes a second: a small network with random weights, in this process."""
    defaults: dict[str, Any] = {
        "backbone": "resnet18",
        "weights": "random",
        "layer": "2",
        "size": str(SIZE),
        "components": 8,
        "shard_images": 4,
        "batch_size": 3,
        "device": "cpu",
        "workers": 0,
    }
    return UpsampleConfig(images=str(images), store=str(store), **{**defaults, **options})


def shard_bytes(store: Path, *companions: str) -> dict[str, bytes]:
    """All shard objects of the features, and of these arrays besides."""
    arrays = ("features", *companions)
    files = [path for array in arrays for path in (store / array / "c").rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def direct_features(store: FeatureStore, row: int, backbone: Any, upsampler: Any) -> np.ndarray:
    """The definition: all channels upsampled, then centred and projected, in one image."""
    geometry = stored_geometry(store)
    pixels = torch.from_numpy(decode(Path(store.index["uri"][row].as_py()).read_bytes(), geometry).pixels)[None]
    with torch.inference_mode():
        high = upsampler(backbone(pixels), pixels, geometry.output_size)[0].double().numpy()
    return np.einsum("kc,chw->khw", store.components.astype(float), high - store.mean[:, None, None])


def some(photographs: Path, folder: Path, names: list[str]) -> Path:
    """A folder with some of the photographs."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / name, folder / name)
    return folder


def names_of(photographs: Path) -> list[str]:
    """All photographs, in an order in which classes and numbers are mixed."""
    return sorted((str(path.relative_to(photographs)) for path in photographs.rglob("*.png")), key=os.path.basename)


def appending(images: Path, store: Path, **options: Any) -> UpsampleConfig:
    """A job that appends images to a store."""
    return config(images, store, append=True, **options)


def chunks(store: Path, rows: int) -> list[bytes]:
    """The encoded chunks of the first rows."""
    opened = FeatureStore(store)
    return [opened.read_chunks([row])[0].features for row in range(rows)]


def check_clean(store: Path, rows: int) -> FeatureStore:
    """That nothing is wrong with a finished store of ``rows`` rows; the store."""
    assert verify(VerifyConfig(store=str(store))) == 0
    assert verify(VerifyConfig(store=str(store), fast=True)) == 0
    opened = FeatureStore(store)
    assert problems(opened) == []
    assert opened.index["status"].to_pylist() == ["ok"] * rows
    assert Objects(store).list(layout.GROWTH) == {}
    return opened

"""Runs of the main job that take a second, and the bytes that they store."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from densefeat import FeatureStore
from pipeline.evaluate.data.originals import stored_geometry
from pipeline.images.decoding.decode import decode
from schemas.options import UpsampleConfig

SIZE = 64


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

"""Batches of compact stores: as features on the CPU, or as stored with the last step on the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from densefeat import FeatureStore, PixelFeatures, TorchFeatures
from densefeat.torch import Dequantize, Reconstruct, StreamingFeatures
from jobs.upsample_imagenet import upsample
from tests.helpers.upsample_jobs import config


@pytest.fixture(scope="module", params=["compact", "half"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Ten pictures, in shards of four."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(10):
        blocks = rng.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(blocks).resize((80, 70), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
    job = config(folder / "images", folder / "store", represent=request.param)
    assert upsample(job) == 0
    return FeatureStore(job.store)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_read(store: FeatureStore, workers: int) -> None:
    for dataset in (StreamingFeatures(store, 4), TorchFeatures(store)):
        size = None if isinstance(dataset, StreamingFeatures) else 4
        seen = []
        for batch in DataLoader(
            dataset, batch_size=size, num_workers=workers, multiprocessing_context="fork" if workers else None
        ):
            assert "guidance" not in batch
            for row, features in zip(batch["row"].tolist(), batch["features"].numpy(), strict=True):
                assert np.allclose(features, store.read(row), atol=1e-5)
                seen.append(row)
        assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("kind", ["streaming", "random"])
def test_the_device_takes_the_last_step(store: FeatureStore, kind: str) -> None:
    dataset = (
        StreamingFeatures(store, 3, dequantize=False) if kind == "streaming" else TorchFeatures(store, dequantize=False)
    )
    loader = DataLoader(dataset, batch_size=None if kind == "streaming" else 3)
    dequantize, reconstruct = Dequantize(store, torch.float32), Reconstruct(store, torch.float32)
    rows = 0
    for batch in loader:
        assert batch["features"].dtype == torch.int8
        assert batch["features"].shape[1:] == store.layout.image_shape
        guidance = batch.get("guidance")
        assert (guidance is not None) is (store.compact is not None and "guidance" in store.compact)
        expected = torch.from_numpy(store.read(batch["row"].tolist()))
        got = dequantize(batch["features"], guidance)
        assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
        channels = reconstruct(batch["features"], guidance)
        wanted = torch.from_numpy(np.stack([store.reconstruct(one) for one in expected.numpy()]))
        assert torch.allclose(channels, wanted, atol=1e-4 * float(wanted.abs().max()))
        rows += len(batch["row"])
    assert rows == 10


def test_crops_are_made_after_it(store: FeatureStore) -> None:
    for batch in StreamingFeatures(store, 4, crop=(10, 12)):
        for row, box, features in zip(batch["row"].tolist(), batch["box"].tolist(), batch["features"], strict=True):
            assert np.allclose(features.numpy(), store.read(row, box=box), atol=1e-5)
    with pytest.raises(ValueError, match="crops of a compact store need dequantize=True"):
        next(iter(StreamingFeatures(store, 4, crop=(10, 12), dequantize=False)))


def test_pixels_are_those_of_its_features(store: FeatureStore) -> None:
    def mask(key: str) -> np.ndarray:
        return np.full((70, 80), int(Path(key).stem), dtype=np.int64)

    rows = set()
    for batch in DataLoader(PixelFeatures(store, mask, pixels=20, batch_size=50), batch_size=None):
        for feature, label, row, (y, x) in zip(
            *(batch[name] for name in ("features", "label", "row", "yx")), strict=True
        ):
            assert np.allclose(feature, store.read(int(row))[:, y, x], atol=1e-5)
            assert label == int(Path(store.keys[int(row)]).stem)
            rows.add(int(row))
    assert rows == set(range(10))

"""The main job with ``--embedding``: one vector per image, along with its features."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import xarray

from densefeat import FeatureStore, MissingFeatures, StoreError, layout
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.evaluate.data.originals import stored_geometry
from pipeline.features.backbone import build_backbone
from pipeline.images.decoding.decode import decode
from schemas.options import UpsampleConfig
from tests.helpers.photographs import photo
from tests.helpers.upsample_jobs import config


@pytest.fixture(scope="module")
def made(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> UpsampleConfig:
    """Of the module's photographs and one that is broken, which is the last."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(photographs, folder / "images")
    (folder / "images" / "z").mkdir()
    (folder / "images" / "z" / "broken.jpg").write_bytes(photo()[:200])
    job = config(folder / "images", folder / "store", embedding=True, max_failed_share=0.5)
    assert upsample(job) == 0
    return job


def test_it_is_what_the_models_classifier_would_take(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    model = build_backbone("resnet18", size=(64, 64), weights="random", layer=2).model
    assert store.embedding(0).shape == (512,)
    for row in (0, 6, 13):
        pixels = decode(Path(store.index["uri"][row].as_py()).read_bytes(), stored_geometry(store)).pixels
        with torch.inference_mode():
            normal = (torch.tensor(pixels)[None] / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / (
                torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            )
            expected = model.forward_features(normal).mean((2, 3))[0].numpy()
        assert np.allclose(store.embedding(row), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_several_rows_in_any_order(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    several = store.embedding([9, 2, 2, -2])
    assert several.shape == (4, 512)
    assert several.dtype == np.float32
    for got, row in zip(several, (9, 2, 2, 13), strict=True):
        assert np.array_equal(got, store.embedding(row))
    assert np.array_equal(store.embedding(store.rows_with_features), store.embedding(slice(0, 14)))
    assert store.embedding([]).shape == (0, 512)


def test_failed_rows_have_none(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    with pytest.raises(MissingFeatures):
        store.embedding("z/broken.jpg")
    with pytest.raises(MissingFeatures):
        store.embedding([0, 14])
    array = xarray.open_zarr(made.store).embedding
    assert array.dims == ("row", "embedding_channel")
    assert np.isnan(array[14]).all()
    assert np.array_equal(array[13].astype(np.float32), store.embedding(13))


def test_features_are_those_without_it(made: UpsampleConfig, tmp_path: Path) -> None:
    plain = replace(made, store=str(tmp_path / "plain"), embedding=False)
    assert upsample(plain) == 0
    store, without = FeatureStore(made.store), FeatureStore(plain.store)
    for row in (0, 7):
        assert np.array_equal(store.read_codes(row), without.read_codes(row))
    with pytest.raises(StoreError, match="has no embeddings: it was made without --embedding"):
        without.embedding(0)


def test_it_is_verified_and_made_again(made: UpsampleConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    path = store / layout.shard_key(1, layout.EMBEDDING)
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(StoreError, match=r"embedding/c/1/0 is damaged: the chunk does not match its crc32c"):
        FeatureStore(str(store)).embedding(5)
    assert FeatureStore(str(store)).embedding(0).shape == (512,)
    assert verify(VerifyConfig(store=str(store), repair=True)) == 1
    assert "its object of the array embedding's bytes changed" in caplog.text
    assert upsample(replace(made, store=str(store), resume=True, embedding=False)) == 0  # as the store is
    assert path.read_bytes() == whole
    assert verify(VerifyConfig(store=str(store))) == 0


def test_with_the_head_it_is_the_models_output(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", embedding=True, space="head", layer=None)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    assert store.embedding(0).shape == (1000,)
    assert store.components.shape == (8, 1000)


def test_a_compact_store_has_it_too(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", embedding=True, represent="compact")
    assert upsample(job) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    store = FeatureStore(job.store)
    assert store.embedding([0, 5]).shape == (2, 512)
    assert store.read(5).shape == (8, 64, 64)


def test_damaged_metadata_is_an_error(made: UpsampleConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    path = store / "embedding" / "zarr.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "shape": [3, 512]}))
    with pytest.raises(StoreError, match=r"embedding/zarr\.json is damaged: got float16 \[3, 512\]"):
        FeatureStore(str(store)).embedding(0)


@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
             "convnext_atto", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"],
)  # fmt: skip
def test_of_every_family(name: str) -> None:
    size = timm.models.get_pretrained_cfg(name).input_size[1:]
    backbone = build_backbone(name, size=size, weights="random")
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, embedding = backbone.with_embedding(images)
    assert torch.allclose(features, backbone(images), atol=1e-5)
    assert embedding.shape == (2, backbone.embedding_channels)
    assert not torch.allclose(embedding[0], embedding[1])


def test_a_model_that_pools_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_backbone("resnet18", size=(64, 64), weights="random", layer=2)
    original = backbone.model.forward_intermediates

    def other(*arguments: object, **options: object) -> object:
        final, maps = original(*arguments, **options)  # type: ignore[operator]
        return final + 1, maps

    monkeypatch.setattr(backbone.model, "forward_intermediates", other)
    with pytest.raises(JobError, match="got --embedding, but this model's pooled features cannot be computed along"):
        _ = backbone.embedding_channels

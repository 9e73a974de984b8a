"""The main job with ``--upsampler multiview`` and no weights: its preparation fits what the solver must know."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densefeat import FeatureStore, layout
from densefeat.errors import StoreError
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.features.pca import Basis
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.store.fitted import stored_fit
from pipeline.store.layout import stored_attributes
from pipeline.upsamplers.build import build_upsampler
from schemas.configuration import FITTED
from schemas.options import UpsampleConfig
from schemas.upsamplers import MultiviewOptions
from tests.helpers.photographs import photo

IMAGES, FAILED = 12, 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of blocks, one of one colour and one broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(IMAGES):
        blocks = rng.integers(0, 256, (6 + i, 8, 3), np.uint8)
        Image.fromarray(blocks).resize((96, 80), Image.Resampling.NEAREST).save(folder / f"{i:02}.png")
    Image.new("RGB", (90, 90), (9, 99, 199)).save(folder / "90grey.png")
    (folder / "91broken.jpg").write_bytes(photo()[:300])
    return folder


def config(images: Path, store: Path, **options: Any) -> UpsampleConfig:
    defaults: dict[str, Any] = {
        "backbone": "resnet18", "weights": "random", "layer": "2", "size": "64x48", "device": "cpu", "workers": 0,
        "upsampler": "multiview", "views": 3, "components": 6, "shard_images": 5, "max_failed_share": 0.5,
    }  # fmt: skip
    return UpsampleConfig(images=str(images), store=str(store), **{**defaults, **options})


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> UpsampleConfig:
    job = config(pictures, tmp_path_factory.mktemp("made") / "store")
    assert upsample(job) == 0
    return job


def configuration(store: str) -> dict[str, Any]:
    attributes: dict[str, Any] = FeatureStore(store).attributes["configuration"]
    return attributes


def test_it_needs_no_other_option_and_the_store_verifies(made: UpsampleConfig) -> None:
    assert verify(VerifyConfig(store=made.store)) == 0
    assert FeatureStore(made.store).index["status"].to_pylist() == ["ok"] * IMAGES + ["constant", "corrupt"]


def test_the_fit_is_part_of_the_store_and_of_its_configuration(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    bias = store.array("upsampler/bias")
    assert bias.shape == (6, 8, 6)
    assert np.abs(bias.mean((1, 2))).max() < 1e-5
    upsampler = configuration(made.store)["upsampler"]
    assert upsampler["views"] == 3
    assert upsampler[FITTED].keys() == {"sigma_px", "regularisation", "iterations", "digest"}
    stored = stored_attributes(made.store, store.attributes).configuration
    fit = stored_fit(store, stored)
    assert fit is not None
    assert fit.identity() == upsampler[FITTED]


def test_stored_features_are_those_of_the_stored_fit(made: UpsampleConfig, pictures: Path) -> None:
    store = FeatureStore(made.store)
    backbone = build_backbone("resnet18", size=(64, 48), weights="random", layer=2)
    fit = stored_fit(store, stored_attributes(made.store, store.attributes).configuration)
    assert fit is not None
    upsampler = build_upsampler("multiview", None, backbone, MultiviewOptions(views=3)).fitted(fit)
    images = torch.tensor(decode((pictures / "03.png").read_bytes(), Geometry((64, 48), "crop", (64, 48))).pixels)[None]
    with torch.inference_mode():
        high = upsampler.with_basis(*Basis.of_store(store).tensors)(backbone(images), images, (64, 48))[0].numpy()
    assert store.step is not None
    off = np.abs(store.read(3) - high) / store.step[:, None, None]
    assert (off < 0.51).mean() > 0.99  # the others are clipped


def test_the_same_job_makes_the_same_store(made: UpsampleConfig, tmp_path: Path) -> None:
    again = replace(made, store=str(tmp_path / "again"))
    assert upsample(again) == 0
    assert FeatureStore(again.store).attributes["configuration_hash"] == configuration_hash(made)
    assert np.array_equal(FeatureStore(again.store).read_codes(5), FeatureStore(made.store).read_codes(5))


def configuration_hash(job: UpsampleConfig) -> str:
    value: str = FeatureStore(job.store).attributes["configuration_hash"]
    return value


def test_a_resume_takes_the_fit_of_the_store(
    made: UpsampleConfig, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = replace(made, store=str(tmp_path / "store"), shards="0:1")
    assert upsample(begun) == 0

    def fitted_again(*arguments: Any) -> None:
        pytest.fail("the upsampler was fitted again")

    monkeypatch.setattr("pipeline.run.preparation.prepare.fit_upsampler", fitted_again)
    rest = replace(begun, shards=None, resume=True, views=None)  # the number of views is the store's
    assert upsample(rest) == 0
    assert np.array_equal(FeatureStore(rest.store).read_codes(10), FeatureStore(made.store).read_codes(10))
    for options, words in [({"views": 4}, "upsampler.views: stored 3, asked 4"), ({"regularisation": 2.0}, "regular")]:
        with pytest.raises(JobError, match=words):
            upsample(replace(rest, **options))


def test_a_given_regularisation_is_kept(pictures: Path, tmp_path: Path) -> None:
    job = config(pictures, tmp_path / "store", regularisation=0.7, limit=8)
    assert upsample(job) == 0
    assert configuration(job.store)["upsampler"][FITTED]["regularisation"] == 0.7
    assert upsample(replace(job, resume=True)) == 0


def test_omitted_kernels_are_those_of_the_store(pictures: Path, tmp_path: Path) -> None:
    begun = config(pictures, tmp_path / "store", jbu_kernels="wide", shards="0:1")
    assert upsample(begun) == 0
    assert [stage["radius"] for stage in configuration(begun.store)["upsampler"]["finish"]["stages"]] == [7, 3]
    rest = replace(begun, shards=None, resume=True)
    with pytest.raises(JobError, match=r"upsampler\.finish"):
        upsample(replace(rest, jbu_kernels="narrow"))
    assert upsample(replace(rest, jbu_kernels=None)) == 0


@pytest.mark.parametrize("images", [1, 7])
def test_with_few_images_there_is_no_bias(pictures: Path, tmp_path: Path, images: int) -> None:
    job = config(pictures, tmp_path / "store", limit=images, components=3)
    assert upsample(job) == 0
    assert not FeatureStore(job.store).array("upsampler/bias").any()
    assert verify(VerifyConfig(store=job.store)) == 0


def test_no_usable_image_is_said(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (90, 90), (9, 99, 199)).save(tmp_path / "images" / "grey.png")
    (tmp_path / "images" / "broken.jpg").write_bytes(photo()[:300])
    job = config(tmp_path / "images", tmp_path / "store", components=1, max_failed_share=1.0)
    with pytest.raises(JobError, match=r"is usable|independent components"):
        upsample(job)


@pytest.mark.parametrize("upsampler", ["multiview", "implicit"])
def test_why_no_image_is_usable(tmp_path: Path, upsampler: str) -> None:
    """Images of one colour, whose features vary with the position."""
    (tmp_path / "images").mkdir()
    for shade in (50, 150):
        Image.new("RGB", (90, 90), (shade, 99, 199)).save(tmp_path / "images" / f"{shade}.png")
    steps = {"fit_steps": 2} if upsampler == "implicit" else {}
    job = config(tmp_path / "images", tmp_path / "store", components=2, upsampler=upsampler, views=4, **steps)
    with pytest.raises(JobError, match=r"none of the 2 sampled images is usable; first error: .* one colour"):
        upsample(job)


def test_a_damaged_bias_is_found(made: UpsampleConfig, tmp_path: Path) -> None:
    job = replace(made, store=str(tmp_path / "store"), shards="0:1")
    assert upsample(job) == 0
    objects = Objects(job.store)
    (chunk,) = [key for key in objects.list("upsampler") if "/c/" in key]
    data = bytearray(objects.get(chunk))
    data[len(data) // 2] ^= 1
    objects.put(chunk, bytes(data))
    assert verify(VerifyConfig(store=job.store)) == 1
    with pytest.raises(StoreError, match="upsampler/bias is damaged"):
        upsample(replace(job, resume=True, shards=None))


def test_a_bias_of_another_store_is_found(made: UpsampleConfig, tmp_path: Path) -> None:
    job = replace(made, store=str(tmp_path / "store"))
    assert upsample(job) == 0
    root = Path(job.store) / layout.ATTRIBUTES
    document = json.loads(root.read_text())
    upsampler = document["attributes"][layout.ATTRIBUTES_KEY]["configuration"]["upsampler"]
    upsampler[FITTED]["digest"] = "0" * 64
    root.write_text(json.dumps(document))
    assert verify(VerifyConfig(store=job.store)) == 1


def test_a_plan_measures_without_fitting(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert upsample(config(pictures, tmp_path / "store", dry_run=True, measure=True)) == 0
    assert "measured" in capsys.readouterr().out + caplog.text
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_workers_on_ray_share_the_fit(made: UpsampleConfig, tmp_path: Path) -> None:
    job = replace(made, store=str(tmp_path / "store"), workers=2)
    assert upsample(job) == 0
    assert configuration_hash(job) == configuration_hash(made)
    assert np.array_equal(FeatureStore(job.store).read_codes(7), FeatureStore(made.store).read_codes(7))

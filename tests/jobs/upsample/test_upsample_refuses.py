"""The main job before any work: what it refuses, and what it leaves as it was."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from densefeat import FeatureStore
from jobs.fit_pca import fit_pca
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from schemas.options import FitPcaConfig
from tests.helpers.upsample_jobs import config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": "/nothing/here"}, "/nothing/here"),
        ({"backbone": "resnet81"}, "resnet18"),
        ({"upsampler": "jbuu"}, "jbu"),
        ({"upsampler": "bilinear", "upsampler_weights": "x.pth"}, "bilinear"),
        ({"weights": "/nothing.safetensors"}, "/nothing.safetensors"),
        ({"upsampler_weights": "/nothing.pth"}, "/nothing.pth"),
        ({"components": 129}, "resnet18 at layer 2 has 128 channels: ask for at most"),
        ({"layer": "9"}, "layer"),
        ({"backbone": "vit_tiny_patch16_224", "layer": "-1", "size": "230"}, "240"),
        ({"pca": "/nothing.npz"}, "/nothing.npz"),
        ({"pca_images": 1, "components": 100}, "PCA found"),
        ({"shards": "7:9"}, "none of the 4 shards"),
        ({"layer": "4", "size": "32"}, "larger --size or an earlier --layer"),
        ({"device": "cuda"}, "CUDA"),
        ({"store": "/proc/store"}, "--store /proc/store"),
    ],
)
def test_what_is_refused_before_work(photographs: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(JobError) as caught:
        upsample(replace(config(photographs, tmp_path / "store"), **options))
    assert words in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_store_and_images_are_kept_apart(photographs: Path, tmp_path: Path) -> None:
    for images, store in ((photographs, photographs / "store"), (photographs / "a", photographs)):
        with pytest.raises(JobError, match="overlap"):
            upsample(config(images, store, overwrite=True))
    assert len(list(photographs.rglob("*.png"))) == 14


def test_an_existing_store_is_safe(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", limit=4)
    assert upsample(job) == 0
    with pytest.raises(JobError, match=r"exists: pass --resume .* --overwrite"):
        upsample(job)
    with pytest.raises(JobError) as caught:
        upsample(replace(job, resume=True, layer="1", dtype="float16"))
    for line in ("backbone.layer: stored 2, asked 1", 'storage.dtype: stored "int8", asked "float16"'):
        assert line in str(caught.value)
    assert upsample(replace(job, overwrite=True, components=4)) == 0
    assert FeatureStore(job.store).shape[0] == 4
    (tmp_path / "store" / "notes.txt").write_text("mine")
    assert upsample(replace(job, overwrite=True)) == 0
    assert (tmp_path / "store" / "notes.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(JobError, match="is not empty"):
        upsample(replace(job, store=str(tmp_path / "thesis"), overwrite=True))
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert upsample(config(photographs, tmp_path / "store", dry_run=True)) == 0
    for words in (
        "14 from",
        "8 components of 128 channels, 64×64, int8",
        "4 of 4 images",
        "at most 459 kB",
        "resnet18",
        "2 classes",
    ):
        assert words in caplog.text
    assert not (tmp_path / "store").exists()


def test_no_space_is_said_before_work(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(JobError, match="no space for"):
        upsample(config(photographs, tmp_path / "store"))
    assert not (tmp_path / "store" / "zarr.json").exists()


@pytest.mark.parametrize("option", ["resume", "append"])
def test_no_space_for_the_rest_of_a_store(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    store = tmp_path / "store"
    upsample(config(photographs, store, limit=8 if option == "append" else None, shards="0:2"))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(
        JobError, match=r"no space for .* needed, 10 kB free; free some, and run the same command again"
    ):
        upsample(config(photographs, store, **{option: True}))
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


@pytest.mark.s3
def test_missing_credentials_and_buckets(photographs: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="s3://no-such-bucket-here"):
        upsample(config(photographs, "s3://no-such-bucket-here/store"))
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(JobError, match="AWS_ACCESS_KEY_ID"):
        upsample(config(photographs, f"{s3_bucket}/store"))


def test_a_dataset_with_nothing_usable_is_refused(photographs: Path, tmp_path: Path) -> None:
    from PIL import Image

    images = tmp_path / "icons"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(images / f"{i}.png")
    with pytest.raises(JobError, match=r"PCA: none of the 3 sampled images is usable.*4x4 pixels"):
        upsample(config(images, tmp_path / "store"))
    basis = tmp_path / "basis.npz"
    job = config(photographs, tmp_path / "store")
    features = {name: getattr(job, name) for name in FitPcaConfig.__dataclass_fields__ if hasattr(job, name)}
    assert fit_pca(FitPcaConfig(**features, output=str(basis))) == 0
    with pytest.raises(JobError, match=r"calibration: none of the 3 sampled images is usable.*4x4 pixels"):
        upsample(config(images, tmp_path / "store", pca=str(basis)))
    assert not (tmp_path / "store").exists()

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densefeat import FeatureStore
from jobs.fit_pca import fit_pca
from jobs.fit_pooling import fit
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.upsamplers.multiview.fit import choose
from pipeline.upsamplers.multiview.pooling import PoolingModel
from pipeline.upsamplers.multiview.spool import sampled_views
from pipeline.views.features import view_features
from schemas.options import FitPcaConfig, FitPoolingConfig, UpsampleConfig
from tests.helpers.photographs import photo
from tests.helpers.stores import SHARED

COCO = SHARED / "data" / "coco200" / "images"
LITE0 = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
SMALL: dict[str, Any] = {"backbone": "resnet18", "weights": "random", "layer": "2", "size": "64x48", "device": "cpu"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of blocks; a grey one; one that is no picture."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(6):
        blocks = rng.integers(0, 256, (6 + i, 8, 3), np.uint8)
        Image.fromarray(blocks).resize((96, 80), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    Image.new("RGB", (90, 90), (9, 99, 199)).save(folder / "6grey.png")
    (folder / "7broken.jpg").write_bytes(photo()[:300])
    return folder


def fit_config(images: Path, output: Path, **options: Any) -> FitPoolingConfig:
    defaults = {"fit_images": 6, "limit": 6, "views": 3, "held_out_views": 2, "components": 6, "solver_stride": 4}
    return FitPoolingConfig(images=str(images), output=str(output), **{**SMALL, **defaults, **options})


@pytest.fixture(scope="module")
def fitted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fitted") / "resnet18.safetensors"
    assert fit(fit_config(pictures, output)) == 0
    return output


def test_what_is_fitted(fitted: Path, pictures: Path) -> None:
    pooling = PoolingModel.read(str(fitted))
    assert pooling.bias.shape == (128, *pooling.origin.grid)
    assert pooling.bias.mean((1, 2)).abs().max() < 1e-4 * pooling.bias.abs().max().clamp(min=1)
    account = pooling.origin.account
    assert account["images"] == str(pictures)
    assert (account["bias_images"], account["judging_images"]) == (0, 6)  # too few for a bias
    errors = account["held_out_error"]
    assert len(errors["by_sigma_px"]) == 6
    curve = [tuple(entry) for entry in errors["by_regularisation_and_iterations"]]
    chosen = choose(curve)
    assert chosen.items() <= vars(pooling.settings).items()
    assert errors["by_alternation"] == sorted(errors["by_alternation"], reverse=True)


def test_fitting_again_gives_the_same(fitted: Path, pictures: Path, tmp_path: Path) -> None:
    assert fit(fit_config(pictures, tmp_path / "again.safetensors")) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == fitted.read_bytes()


def test_the_smoothest_that_is_nearly_as_good() -> None:
    curve = [(0.1, 4, 0.31), (0.1, 8, 0.30), (1.0, 4, 0.34), (1.0, 8, 0.321), (1.0, 12, 0.32), (10.0, 12, 0.4)]
    assert choose(curve) == {"regularisation": 1.0, "iterations": 8}


def test_too_few_images(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "none.safetensors"
    for options, words in [
        ({"fit_images": 9}, "only 6 of the sample are available"),
        ({"fit_images": 9}, "give more images, or --fit-images 6; with fewer than 18 the bias is worse$"),
        ({"fit_images": 9, "limit": 3}, "give more images$"),
        ({"fit_images": 8, "limit": None}, "only 7 of the sample can be used .the first error: "),
    ]:
        with pytest.raises(JobError, match=words):
            fit(fit_config(pictures, output, **options))
    assert not output.exists()


def test_passes_of_the_backbone_use_all_cores_and_trials_one_each(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        pass

    threads = []

    def viewed(*arguments: Any) -> Any:
        threads.append(torch.get_num_threads())
        return view_features(*arguments)

    def tried(*arguments: Any) -> None:
        threads.append(torch.get_num_threads())
        raise ReachedError

    monkeypatch.setattr("pipeline.upsamplers.multiview.spool.view_features", viewed)
    monkeypatch.setattr("pipeline.train.pooling.run_trial", tried)
    monkeypatch.setattr("pipeline.run.resources.available_cores", lambda: 3)
    before = torch.get_num_threads()
    try:
        for of_torch, expected in ((2, 2), (64, 3)):  # torch knows of no cgroup's quota
            torch.set_num_threads(of_torch)
            with pytest.raises(ReachedError):
                fit(fit_config(pictures, tmp_path / "x.safetensors"))
            assert set(threads[:6]) == {expected}
            assert set(threads[6:]) == {1}
            threads.clear()
            assert torch.get_num_threads() == of_torch
    finally:
        torch.set_num_threads(before)


def test_an_output_that_cannot_be_written_to_is_found_out_first(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: Any, **options: Any) -> None:
        pytest.fail("work began")

    monkeypatch.setattr("pipeline.train.pooling._sample_images", work)
    with pytest.raises(JobError, match=r"--output /proc/none/x\.safetensors"):
        fit(fit_config(pictures, Path("/proc/none/x.safetensors")))
    monkeypatch.setattr("pipeline.run.job.open_workers", work)
    with pytest.raises(JobError, match=r"--output /proc/none/x\.npz"):
        fit_pca(FitPcaConfig(images=str(pictures), output="/proc/none/x.npz", **SMALL))


def test_the_backbone_is_built_once_and_what_is_said_is_of_the_judging_images(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert fit(fit_config(pictures, tmp_path / "x.safetensors")) == 0
    assert caplog.text.count("has random weights") == 1
    assert "on held-out views its error is " in caplog.text


def test_a_disk_that_is_too_small() -> None:
    """For as many images as no disk has room for; they share their memory."""
    backbone = build_backbone("resnet18", size=(48, 64), weights="random", layer=2)
    images = torch.zeros(1, 3, 48, 64, dtype=torch.uint8).expand(10**9, -1, -1, -1)
    with (
        pytest.raises(JobError, match=r"take [\d,.]+ GB in .* are free: set TMPDIR"),
        sampled_views(backbone, images, views=3, order="chosen", held_out=2, components=6),
    ):
        pass


def test_a_disk_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at it and the first features, or by a quota."""

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full)
    backbone = build_backbone("resnet18", size=(48, 64), weights="random", layer=2)
    images = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    with (
        pytest.raises(JobError, match=r"are free: set TMPDIR.*Disk quota exceeded"),
        sampled_views(backbone, images, views=3, order="chosen", held_out=2, components=6),
    ):
        pass


def test_options_are_checked(pictures: Path, tmp_path: Path) -> None:
    for options, words in [
        ({"fit_images": 3}, "--fit-images"),
        ({"views": 1}, "--views"),
        ({"workers": 2}, "--workers"),
        ({"output": "x.npz"}, "--output"),
    ]:
        with pytest.raises(ValueError, match=words):
            replace(fit_config(pictures, tmp_path / "x.safetensors"), **options)
    with pytest.raises(JobError, match="--views"):
        fit(fit_config(pictures, tmp_path / "x.safetensors", views=1000))
    with pytest.raises(ValueError, match="--views 9 is for --upsampler multiview"):
        UpsampleConfig(images="a", store="b", views=9)


def job_config(images: Path, store: Path, pooling: Path, **options: Any) -> UpsampleConfig:
    defaults = {"components": 6, "shard_images": 4, "batch_size": 3, "workers": 0, "max_failed_share": 0.5}
    return UpsampleConfig(
        images=str(images), store=str(store), upsampler="multiview", upsampler_weights=str(pooling),
        **{**SMALL, **defaults, **options},
    )  # fmt: skip


def test_a_store_is_made_and_failures_are_rows(fitted: Path, pictures: Path, tmp_path: Path) -> None:
    job = job_config(pictures, tmp_path / "store", fitted)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    assert store.index["status"].to_pylist() == ["ok"] * 6 + ["constant", "corrupt"]
    assert "one colour" in store.index["error"][6].as_py()
    assert store.read(0).shape == (6, 64, 48)
    again = replace(job, store=str(tmp_path / "again"))
    assert upsample(again) == 0
    assert np.array_equal(store.read(5), FeatureStore(again.store).read(5))
    with pytest.raises(JobError, match="regularisation"):
        upsample(replace(job, resume=True, regularisation=7.0))
    with pytest.raises(JobError, match="this job has resnet18 at layer 1"):
        upsample(replace(job, store=str(tmp_path / "other"), layer="1"))


@pytest.mark.skipif(not COCO.exists(), reason=f"needs the photographs and weights in {SHARED}")
def test_photographs_are_fitted_better_than_interpolated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lite0: dict[str, Any] = {
        "backbone": "tf_efficientnet_lite0", "weights": str(LITE0), "layer": "3", "size": "224", "limit": 4,
    }  # fmt: skip
    output = tmp_path / "lite0.safetensors"
    options = {"fit_images": 4, "views": 9, "held_out_views": 6, "components": 32}
    assert fit(fit_config(COCO / "train", output, **{**lite0, **options})) == 0
    assert "its error is 0." in caplog.text
    pooling = PoolingModel.read(str(output))
    settings, errors = pooling.settings, pooling.origin.account["held_out_error"]
    curve = {(r, n): error for r, n, error in errors["by_regularisation_and_iterations"]}
    assert curve[settings.regularisation, settings.iterations] < 0.8 * errors["bilinear"]
    job = job_config(COCO / "val", tmp_path / "store", output, **{**lite0, "components": 16, "limit": 3})
    assert upsample(job) == 0
    features = torch.from_numpy(FeatureStore(job.store).read(0))
    assert features.shape == (16, 224, 224)
    assert features.std() > 0.1

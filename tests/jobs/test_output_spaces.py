"""The main job with features in the space of the model's output: planned, stored, resumed, drawn."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from densefeat import FeatureStore
from jobs.fit_pca import fit_pca
from jobs.show_features import ShowConfig, show
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.run.planning.describe import describe
from pipeline.run.planning.plan import make_plan
from pipeline.upsamplers.build import build_upsampler
from schemas.options import FitPcaConfig, UpsampleConfig
from tests.helpers.upsample_jobs import SIZE, config, direct_features, shard_bytes

HEAD: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "layer": None, "space": "head"}


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        (HEAD, 1000),
        (HEAD | {"facet": "value"}, 1000),
        (HEAD | {"space": "layer", "facet": "value"}, 192),
        ({"layer": None, "space": "head"}, 1000),  # resnet18
    ],
)
def test_a_store_is_that_of_the_definition(
    photographs: Path, tmp_path: Path, options: dict[str, Any], channels: int
) -> None:
    job = config(photographs, tmp_path / "store", upsampler="bilinear", dtype="float16", **options)
    assert upsample(job) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    store = FeatureStore(job.store)
    assert store.components.shape == (8, channels)
    chosen = {name: options[name] for name in ("space", "facet") if name in options}
    backbone = build_backbone(job.backbone, size=(SIZE, SIZE), weights="random", **chosen)
    for row in (0, 13):
        expected = direct_features(store, row, backbone, build_upsampler("bilinear", None, backbone))
        assert np.abs(store.read(row) - expected).max() < 2e-3 * np.abs(expected).max()


def test_workers_build_what_the_driver_built(photographs: Path, tmp_path: Path) -> None:
    plan = make_plan(config(photographs, tmp_path / "store", **HEAD, facet="value"))
    assert plan.stages is not None
    stages = pickle.loads(pickle.dumps(plan.spec.recipe)).build()
    assert stages.backbone.identity() == plan.stages.backbone.identity()
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    assert torch.equal(stages.backbone(pixels), plan.stages.backbone(pixels))
    with pytest.raises(JobError, match=r"backbone mismatch on .*'space': 'head'.* expected .*'facet': 'value'"):
        replace(plan.spec.recipe, facet="token").build()


def test_a_plan_says_which_space(photographs: Path, tmp_path: Path) -> None:
    said = describe(make_plan(config(photographs, tmp_path / "store", **HEAD, facet="value", dry_run=True)))
    assert "8 components of 1000 channels" in said
    assert "vit_tiny_patch16_224 (layer 11, facet value, space head, weights" in said
    default = describe(make_plan(config(photographs, tmp_path / "store", dry_run=True)))
    assert not {"space", "facet"} & set(default.split())


def test_a_store_keeps_its_space(photographs: Path, tmp_path: Path) -> None:
    whole, parts = (config(photographs, tmp_path / name, **HEAD) for name in ("whole", "parts"))
    assert upsample(whole) == 0
    assert upsample(replace(parts, shards=":1")) == 0
    for other, words in (
        ({"space": "layer"}, 'backbone.space: stored "head", asked null'),
        ({"facet": "value"}, 'backbone.facet: stored null, asked "value"'),
    ):
        with pytest.raises(JobError, match=words):
            upsample(replace(parts, resume=True, **other))
    assert upsample(replace(parts, resume=True)) == 0
    assert shard_bytes(Path(parts.store)) == shard_bytes(Path(whole.store))


def test_a_basis_belongs_to_a_space(photographs: Path, tmp_path: Path) -> None:
    basis = str(tmp_path / "basis.npz")
    options = {"images": str(photographs), "backbone": "resnet18", "weights": "random", "size": "64", "components": 8}
    assert fit_pca(FitPcaConfig(**options, space="head", output=basis, workers=0, device="cpu")) == 0
    job = config(photographs, tmp_path / "store", layer=None, pca=basis)
    with pytest.raises(JobError, match=r'fitted to other features: .*space: stored "head", asked null'):
        upsample(replace(job, layer="4"))
    assert upsample(replace(job, space="head")) == 0


def test_a_picture_of_class_scores(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", layer=None, space="head", limit=3)
    assert upsample(job) == 0
    picture = tmp_path / "picture.png"
    assert show(ShowConfig(store=job.store, output=str(picture), weights="random")) == 0
    assert np.asarray(Image.open(picture)).std() > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "vit_small_patch14_dinov2", "size": "56", "space": "head", "layer": None}, "with a head"),
        ({"space": "head"}, "got --space head with layer 2, expected the last layer, 4, alone"),
        ({"facet": "value", "layer": None}, "expected a plain ViT"),
    ],
)
def test_refused_before_work(photographs: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        upsample(config(photographs, tmp_path / "store", **options))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("option", [["--space", "heads"], ["--facet", "key"]])
def test_other_names_are_no_options(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(UpsampleConfig, args=["--images", "x", "--store", "y", *option])
    assert option[0] in "".join(capsys.readouterr())

"""How many components the main job stores, and of which layers: by number, by share of the variance, or by default."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore
from jobs.fit_pca import fit_pca
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.features.pca import Basis
from pipeline.run.job import carry_out
from pipeline.run.planning.describe import describe
from pipeline.run.planning.plan import make_plan
from pipeline.upsamplers.build import build_upsampler
from schemas.options import FitPcaConfig
from tests.helpers.upsample_jobs import SIZE, config, direct_features, shard_bytes


def stored_pca(store: str) -> dict[str, Any]:
    return dict(FeatureStore(store).attributes["configuration"]["pca"])


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_as_many_as_explain_a_share(photographs: Path, tmp_path: Path, share: float) -> None:
    job = config(photographs, tmp_path / "store", components=share)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    ratio = Basis.of_store(store).explained_variance_ratio
    assert ratio.sum() >= share > ratio[:-1].sum()
    assert store.shape == (len(ratio), SIZE, SIZE)
    assert stored_pca(job.store) | {"basis": ""} == {
        "basis": "", "components": len(ratio), "explained_share": share, "fitted_on_images": 14,
    }  # fmt: skip
    assert verify(VerifyConfig(store=job.store)) == 0
    # As if the number had been asked for, but for the shards, whose size is chosen before the number is known.
    same = replace(job, store=str(tmp_path / "same"), components=len(ratio))
    assert upsample(same) == 0
    assert shard_bytes(Path(same.store)) == shard_bytes(Path(job.store))


def test_a_store_made_by_share_is_resumed(photographs: Path, tmp_path: Path) -> None:
    whole, parts = (config(photographs, tmp_path / name, components=0.9) for name in ("whole", "parts"))
    assert upsample(whole) == 0
    assert upsample(replace(parts, shards=":1")) == 0
    k = FeatureStore(parts.store).shape[0]
    resumed = make_plan(replace(parts, resume=True))
    assert resumed.components == k
    assert f"features    {k} components of 128 channels" in describe(resumed)
    for components, shards in ((0.9, "1:2"), (k, "2:3"), (None, None)):
        assert upsample(replace(parts, components=components, shards=shards, resume=True)) == 0
    assert shard_bytes(Path(parts.store)) == shard_bytes(Path(whole.store))
    for components, words in (
        (0.8, "pca.explained_share: stored 0.9, asked 0.8"),
        (k + 1, f"pca.components: stored {k}, asked {k + 1}"),
    ):
        with pytest.raises(JobError, match=words):
            upsample(replace(parts, components=components, resume=True))
    numbered = config(photographs, tmp_path / "numbered")
    assert upsample(numbered) == 0
    with pytest.raises(JobError, match=r"pca.explained_share: stored null, asked 0.9"):
        upsample(replace(numbered, components=0.9, resume=True))


def test_jobs_that_fit_different_numbers_share_a_store(photographs: Path, tmp_path: Path) -> None:
    """Fits on different machines may differ: the later job takes the number that is there."""
    late = make_plan(config(photographs, tmp_path / "store", components=0.9, resume=True))
    first = config(photographs, tmp_path / "store", components=0.9, resume=True, shards=":1")
    assert upsample(first) == 0
    k = FeatureStore(first.store).shape[0]
    assert late.features.components == 128 > k
    assert carry_out(late, 0.0).complete
    assert FeatureStore(first.store).shape[0] == k
    assert verify(VerifyConfig(store=first.store)) == 0


def test_a_share_of_a_given_basis(photographs: Path, tmp_path: Path) -> None:
    basis = tmp_path / "basis.npz"
    features = {"images": str(photographs), "backbone": "resnet18", "weights": "random", "layer": "2", "size": "64"}
    assert fit_pca(FitPcaConfig(**features, output=str(basis), components=0.95, workers=0, device="cpu")) == 0
    fitted = Basis.from_npz(basis.read_bytes())[0]
    assert fitted.explained_variance_ratio.sum() >= 0.95 > fitted.explained_variance_ratio[:-1].sum()
    job = config(photographs, tmp_path / "store", components=0.7, pca=str(basis))
    assert upsample(job) == 0
    ratio = Basis.of_store(FeatureStore(job.store)).explained_variance_ratio
    assert ratio == pytest.approx(fitted.explained_variance_ratio[: len(ratio)], rel=1e-6)  # stored in float32
    assert ratio.sum() >= 0.7 > ratio[:-1].sum()
    assert upsample(replace(job, resume=True)) == 0
    with pytest.raises(JobError, match=r"--components 0.99, but the \d+ components of the basis explain 0.9[5-8]"):
        make_plan(replace(job, store=str(tmp_path / "other"), components=0.99))


@pytest.mark.parametrize("components", [0, -1, 0.0, 1.0, -0.5, 64.0, float("nan")])
def test_what_is_no_number_and_no_share(components: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--components"):
        config(tmp_path, tmp_path / "store", components=components)


def test_omitted_options_are_those_of_the_store_that_is_resumed(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", layer="1,2", components=7)
    assert upsample(replace(job, shards=":2")) == 0
    assert upsample(replace(job, layer=None, components=None, shard_images=None, resume=True)) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    store = FeatureStore(job.store)
    assert (store.shape[0], store.attributes["configuration"]["backbone"]["layer"]) == (7, [1, 2])
    other = replace(job, store=str(tmp_path / "other"), jbu_kernels="wide")
    assert upsample(replace(other, shards=":1")) == 0
    assert upsample(replace(other, jbu_kernels=None, resume=True)) == 0
    with pytest.raises(JobError, match=r"upsampler"):
        upsample(replace(other, jbu_kernels="narrow", resume=True))
    # Another backbone is another store: its defaults are its own.
    with pytest.raises(JobError, match=r'backbone.name: stored "resnet18", asked "resnet34"'):
        upsample(replace(job, backbone="resnet34", layer=None, components=None, resume=True))


def test_several_layers(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", layer="2,-1", components=16, dtype="float16", upsampler="bilinear")
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    assert store.components.shape == (16, 128 + 512)
    stage = build_backbone("resnet18", size=(SIZE, SIZE), weights="random", layer=(2, 4))
    for row in (0, 13):
        expected = direct_features(store, row, stage, build_upsampler("bilinear", None, stage))
        assert np.linalg.norm(store.read(row) - expected) / np.linalg.norm(expected) < 2e-3

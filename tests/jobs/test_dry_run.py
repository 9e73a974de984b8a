"""The plan of the main job, with figures from a few images that it computes."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from densefeat import FeatureStore
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.run.planning.measure import measure
from pipeline.run.planning.plan import make_plan
from tests.helpers.photographs import photo
from tests.helpers.upsample_jobs import config

KIND = {"dry_run": True, "measure": True, "batch_size": 2}


def text(caplog: pytest.LogCaptureFixture, job: Any) -> str:
    caplog.set_level(logging.INFO)
    caplog.clear()
    assert upsample(job) == 0
    return caplog.text


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Enough photographs that those measured are a sample."""
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.jpg").write_bytes(photo(70 + i, 90) if i % 7 else b"not an image")
    return folder


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"components": 0.9}, {"upsampler": "bilinear"}])
def test_measured_bytes_are_those_that_the_store_takes(
    real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    job = config(real, tmp_path / "store", max_failed_share=0.5, **options)
    measured = measure(make_plan(replace(job, dry_run=True)))
    assert not Path(job.store).exists()
    assert (measured.images_to_do, measured.images_stored) == (40, 40)
    assert measured.image_seconds > 0 < measured.preparing_seconds
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    nbytes = sum(path.stat().st_size for path in Path(job.store, "features/c").rglob("*") if path.is_file())
    assert measured.image_nbytes == pytest.approx(nbytes / store.index["status"].to_pylist().count("ok"), rel=0.15)
    assert measured.components == pytest.approx(store.shape[0], abs=2)


def test_a_plan_with_figures(photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = config(photographs, tmp_path / "store")
    said = text(caplog, replace(job, **KIND))
    cost = r"measured    14 images on cpu \(\d+ threads\), 8 components: [\d.]+ kB and [\d.e-]+ s an image"
    assert re.search(cost, said)
    assert re.search(r"bytes       about [\d.]+ kB when the store is finished", said)
    assert re.search(
        r"time        about [\d.]+ s in this process for 14 images \(PCA and .*: [\d.]+ s\); the start", said
    )
    assert "one worker like this process (N take about 1/N) for 14 images" in text(
        caplog, replace(job, **KIND, workers=2)
    )
    assert not Path(job.store).exists()


def test_a_resumed_store_is_measured_on_what_it_lacks(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = config(photographs, tmp_path / "store")
    assert upsample(replace(job, shards=":2")) == 0
    before = {path: path.stat().st_mtime_ns for path in Path(job.store).rglob("*")}
    said = text(caplog, replace(job, resume=True, **KIND))
    assert "in this process for 6 images; the start" in said
    assert "PCA and quantization" not in said  # the store has its basis
    assert {path: path.stat().st_mtime_ns for path in Path(job.store).rglob("*")} == before
    assert upsample(replace(job, resume=True)) == 0
    assert "time        none: the shards of this job are done" in text(caplog, replace(job, resume=True, **KIND))


def test_a_share_takes_more_components_in_more_images(
    real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = config(real, tmp_path / "store", components=0.99, max_failed_share=0.5, **KIND)
    every = text(caplog, job)
    assert "at least" not in every
    monkeypatch.setattr("pipeline.run.planning.measure._SHARE_IMAGES", 4)
    few = text(caplog, job)
    assert re.search(
        r"measured    .*, at least \d+ components: .*\n.*bytes       at least .*\n.*time        at least", few
    )


def test_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(JobError, match="none of the 3 sampled images is usable"):
        upsample(config(tmp_path / "images", tmp_path / "store", **KIND))


def test_measuring_is_for_plans(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--measure computes a few images for a plan: pass --dry-run too"):
        config(tmp_path, tmp_path / "store", measure=True)

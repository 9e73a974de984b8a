"""The page on compact stores."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from densefeat import FeatureStore
from densefeat.page import create_app
from jobs.upsample_imagenet import upsample
from tests.helpers.upsample_jobs import config


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A compact store of four pictures, which are deleted."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        blocks = rng.integers(0, 256, (4, 6, 3), np.uint8)
        Image.fromarray(blocks).resize((96, 64), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{i}.png")
    job = config(tmp_path / "images", tmp_path / "store", represent="compact", size="64x96")
    assert upsample(job) == 0
    shutil.rmtree(tmp_path / "images")
    return job.store


def test_guidance_is_shown_for_photographs_that_are_gone(uri: str) -> None:
    client = TestClient(create_app(uri), base_url="http://127.0.0.1:8000")
    answer = client.get("/api/photograph/2?size=96")
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.size == (96, 64)
        difference = np.abs(np.asarray(image.convert("RGB"), int) - FeatureStore(uri).read_guidance(2))
    assert difference.mean() < 4


def test_heat_and_figures_are_those_of_the_features(uri: str) -> None:
    client = TestClient(create_app(uri), base_url="http://127.0.0.1:8000")
    for name in ("colours", "component", "segments"):
        assert client.get(f"/api/{name}/1").status_code == 200
    store, found = FeatureStore(uri), client.get("/api/figures").json()
    assert found["bytes"] == store.nbytes
    assert found["uncompressed_bytes_per_image"] == 8 * 64 * 96

"""Reconstruction and held-out views, on stores that the main job makes of photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import JobError
from pipeline.evaluate import held_out, reconstruction, run
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.originals import read_photo
from pipeline.evaluate.data.sides import open_sides
from pipeline.evaluate.report.result import Result
from pipeline.features.backbone import build_backbone
from tests.pipeline.evaluate.stores import config

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
SMALL = "backbone=resnet18,weights=random,layer=2,size=64,workers=0,device=cpu,dtype=float16"


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Blocks of colours."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        blocks = np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        Image.fromarray(blocks).save(tmp_path / "photos" / f"{i}.png")
    return str(tmp_path / "photos")


def test_cosines_of_the_backbones_features(tmp_path: Path, photos: str) -> None:
    """64 pixels at stride 8 are 8 × 8 cells; with fit=pad, a third of the rows are padding."""
    text = f"name=a,{SMALL},upsampler=bilinear,components=32,fit=pad"
    with open_sides([text], photos, str(tmp_path / "stores")) as sides:
        comparison = Comparison(sides)
        outcome = reconstruction.evaluate(comparison, config("reconstruction", None, tmp_path / "report"))
        found = Result.of("reconstruction", outcome, comparison).estimates
        store = sides[0].store
    backbone = build_backbone("resnet18", size=(64, 64), weights="random", layer=2)
    expected = []
    for row in range(len(store)):
        with torch.inference_mode():
            channels = backbone(torch.from_numpy(read_photo(store, row))[None])[0].double().numpy()
        rows = [i for i in range(8) if 8 * i + 4 < store.geometry(row).valid_box[2]]
        assert 4 < len(rows) < 7
        flat = channels[:, rows].reshape(len(channels), -1)
        centred = flat - store.mean[:, None]
        again = store.components[:16].T @ (store.components[:16] @ centred) + store.mean[:, None]
        expected.append(np.mean((again * flat).sum(0) / np.linalg.norm(again, axis=0) / np.linalg.norm(flat, axis=0)))
    assert found["16 components"]["a"][0].mean == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["stored"]["a"][0].mean == pytest.approx(found["32 components"]["a"][0].mean, abs=1e-4)
    assert found["8 components"]["a"][0].mean < found["16 components"]["a"][0].mean
    assert found["stored, worst percentile"]["a"][0].mean < found["stored"]["a"][0].mean


def test_an_image_without_a_cell_undoes_nothing(tmp_path: Path, photos: str) -> None:
    """Padded, it is narrower than half a cell."""
    Image.fromarray(np.full((20, 400, 3), 90, np.uint8)).save(tmp_path / "photos" / "z.png")
    text = f"name=a,{SMALL.replace('layer=2', 'layer=4')},upsampler=bilinear,components=4,fit=pad"
    with open_sides([text], photos, None) as sides:
        comparison = Comparison(sides)
        outcome = reconstruction.evaluate(comparison, config("reconstruction", None, tmp_path / "report"))
        found = Result.of("reconstruction", outcome, comparison)
    assert outcome.units[-1] == "z.png"
    assert "stored: 1 of 5 images have nothing to count" in comparison.notes
    for of_sides in found.estimates.values():
        assert 0 < of_sides["a"][0].low <= of_sides["a"][0].mean <= 1


def test_images_are_read_with_the_limits_of_their_store(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3)).astype(np.uint8)).save(
            tmp_path / "photos" / f"{i}.png"
        )
    with open_sides([f"{SMALL},upsampler=bilinear,components=2,min_side=4"], str(tmp_path / "photos"), None) as sides:
        assert read_photo(sides[0].store, 0).shape == (3, 64, 64)


def test_coarser_steps_lose_more(tmp_path: Path, photos: str) -> None:
    texts = [
        f"name={floor},{SMALL.replace('float16', 'int8')},upsampler=bilinear,components=32,error_floor={floor}"
        for floor in (0.01, 1.0)
    ]
    with open_sides(texts, photos, None) as sides:
        comparison = Comparison(sides)
        outcome = reconstruction.evaluate(comparison, config("reconstruction", None, tmp_path / "report"))
        found = Result.of("reconstruction", outcome, comparison).estimates
        assert [panel.caption for panel in outcome.draw(0)] == ["0.png", "0.01", "1.0"]
    assert found["stored"]["1.0"][1].high < -0.005
    assert found["32 components"]["1.0"][1].mean == pytest.approx(0, abs=1e-6)


def test_the_weights_must_be_those_of_the_store(tmp_path: Path, photos: str) -> None:
    with open_sides([f"{SMALL},upsampler=bilinear,components=8"], photos, None) as sides:
        store = sides[0].store.uri
        for task in ("reconstruction", "held_out_views"):
            with pytest.raises(JobError, match="the backbone is needed: pass its weights as --weights"):
                run.evaluate(config(task, None, tmp_path / "report", features=(store,)))


def test_errors_by_hand() -> None:
    """Two views of one channel: 1, 3 and 5, 7, mean 4, variance 9 + 1 + 1 + 9."""
    seen = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).view(2, 1, 1, 2)
    assert held_out.squared_errors(seen + torch.tensor([1.0, -2.0]), seen).tolist() == [10 / 20, 1]
    assert held_out.squared_errors(torch.full_like(seen, 4.0), seen).tolist() == [1, 1]
    for features in (0.0, 3.0):  # of a plain image: nothing to explain
        plain = torch.full_like(seen, features)
        assert held_out.squared_errors(seen, plain).tolist() == [0, 0]
        assert held_out.squared_errors(plain, plain).tolist() == [0, 0]


def test_held_out_views_prefer_multiview(tmp_path: Path, photos: str) -> None:
    texts = [f"name={name},{SMALL},components=16,upsampler={name}" for name in ("bilinear", "multiview")]
    with open_sides(texts, photos, str(tmp_path / "stores")) as sides:
        comparison = Comparison(sides)
        options = config("held_out_views", None, tmp_path / "report", limit=3)
        outcome = held_out.evaluate(comparison, options)
        found = Result.of("held_out_views", outcome, comparison).estimates["error on held-out views"]
        assert [panel.caption for panel in outcome.draw(0)] == ["0.png", "bilinear", "multiview"]
    assert found["multiview"][1].high < 0
    assert 0 < found["multiview"][0].mean < found["bilinear"][0].mean < 1


def test_sides_that_views_cannot_compare(tmp_path: Path, photos: str) -> None:
    texts = [f"name=a,{SMALL},components=8,upsampler=bilinear"]
    texts.append(f"name=b,{SMALL.replace('layer=2', 'layer=1')},components=8,upsampler=bilinear")
    texts.append(f"name=c,{SMALL},components=8,upsampler=bilinear,output_size=32")
    texts.append(f"name=d,{SMALL},components=8,upsampler=bilinear,fit=pad")
    for other, words in (
        (1, r"backbone\.layer: a 2, b 1"),
        (2, r"resolution of the features: a .*64.*, c .*32"),
        (3, 'fit: a "crop", d "pad"'),
    ):
        options = {"features": (texts[0], texts[other]), "images": photos, "stores": str(tmp_path / "stores")}
        with pytest.raises(JobError, match=words):
            run.evaluate(config("held_out_views", None, tmp_path / "report", **options))
    assert not (tmp_path / "stores").exists()

"""Label propagation: its neighbours by brute force, J and F as DAVIS' own code defines them, and moving squares."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.morphology import dilation, disk

from pipeline.errors import JobError
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.video import boundary_measure, evaluate, propagate, region_similarity
from tests.pipeline.evaluate.stores import compared, config, store_of, write_png

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
SIDE, FRAMES = 24, 6


def seg2bmap(seg: np.ndarray) -> np.ndarray:
    """Boundary of a mask, as in davis2017-evaluation (BSD), for equal sizes."""
    e, s, se = np.zeros_like(seg), np.zeros_like(seg), np.zeros_like(seg)
    e[:, :-1] = seg[:, 1:]
    s[:-1, :] = seg[1:, :]
    se[:-1, :-1] = seg[1:, 1:]
    b = seg ^ e | seg ^ s | seg ^ se
    b[-1, :] = seg[-1, :] ^ e[-1, :]
    b[:, -1] = seg[:, -1] ^ s[:, -1]
    b[-1, -1] = False
    return b


def davis_f(foreground: np.ndarray, truth: np.ndarray) -> float:
    """F of two masks with boundaries, as in davis2017-evaluation."""
    pixels = math.ceil(0.008 * np.linalg.norm(foreground.shape))
    own, other = seg2bmap(foreground), seg2bmap(truth)
    own_match = own & (dilation(other.astype(np.uint8), disk(pixels)) > 0)
    other_match = other & (dilation(own.astype(np.uint8), disk(pixels)) > 0)
    precision, recall = own_match.sum() / own.sum(), other_match.sum() / other.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(8))
def test_the_boundary_measure_is_that_of_davis(seed: int) -> None:
    """Blobs that touch the borders of the image, at a size with a tolerance of several pixels."""
    rng = np.random.default_rng(seed)
    blobs = F.interpolate(torch.from_numpy(rng.normal(size=(2, 1, 8, 11))), (300, 420), mode="bicubic")[:, 0] > 0.3
    truth = blobs[0].numpy()
    shift = rng.integers(-6, 7, 2)
    near = np.roll(truth, shift, (0, 1)) ^ (blobs[1].numpy() & (rng.random() < 0.5))
    assert boundary_measure(near, truth) == pytest.approx(davis_f(near, truth), abs=1e-6)
    assert 0 < boundary_measure(near, truth) <= 1
    assert boundary_measure(truth, truth) == 1


def test_measures_by_hand() -> None:
    none, left, upper = np.zeros((40, 60), bool), np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    left[:, :30], upper[:20] = True, True
    assert region_similarity(left, upper) == pytest.approx(600 / 1800)
    assert (region_similarity(none, none), region_similarity(none, left)) == (1, 0)
    assert (boundary_measure(none, none), boundary_measure(none, left), boundary_measure(left, none)) == (1, 0, 0)
    moved = np.zeros((40, 60), bool)
    moved[:, :32] = True  # the tolerance is 1 pixel
    assert boundary_measure(moved, left) == 0


@pytest.mark.parametrize("size", [(5, 7), (9, 33)])
def test_labels_come_from_the_nearest_neighbours_within_the_window(size: tuple[int, int]) -> None:
    radius, dims, labels = 2, 6, 3
    memory = [(F.normalize(torch.randn(dims, *size), dim=0), torch.rand(labels, *size)) for _ in range(3)]
    frame = F.normalize(torch.randn(dims, *size), dim=0)
    found = propagate(frame, memory, radius)
    for y in range(size[0]):
        for x in range(size[1]):
            near = [
                (float(frame[:, y, x] @ features[:, v, u]), values[:, v, u])
                for features, values in memory
                for v in range(size[0])
                for u in range(size[1])
                if abs(v - y) <= radius and abs(u - x) <= radius
            ]
            best = sorted(near, key=lambda one: -one[0])[:5]
            weights = torch.tensor([math.exp(cosine / 0.1) for cosine, _ in best])
            expected = sum(weight * value for weight, (_, value) in zip(weights / weights.sum(), best, strict=True))
            assert torch.allclose(found[:, y, x], expected, atol=1e-5)


def moving(frame: int, colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """A mask with two squares, the first of which moves; features that tell the objects, or that tell nothing."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4 : 4 + 8, 2 + 2 * frame : 10 + 2 * frame] = 200
    mask[14:22, 4:12] = 90
    told = np.stack([mask == 0, mask == 200, mask == 90]) if colour else np.ones((3, SIDE, SIDE))
    return mask, told.astype(np.float32)


# Numbers of frames may have zeros in front of them, or none.
@pytest.mark.parametrize("name", ["{:02d}", "frame{}", "shot 3, {}"])
def test_objects_that_features_tell_are_tracked(tmp_path: Path, name: str) -> None:
    told, blank = {}, {}
    for frame in range(FRAMES):
        number = name.format(8 + frame)
        mask, told[f"clip/{number}.jpg"] = moving(frame, True)
        blank[f"clip/{number}.jpg"] = moving(frame, False)[1]
        if frame < FRAMES - 1:  # the last frame needs none
            write_png(tmp_path / "masks" / "clip" / f"{number}.png", mask)
    comparison = compared(blank=store_of(tmp_path / "a", blank), told=store_of(tmp_path / "b", told))
    outcome = evaluate(comparison, config("video", tmp_path / "masks", tmp_path / "report", video_rows=SIDE))
    assert comparison.notes == []
    result = Result.of("video", outcome, comparison)
    assert outcome.units == ["clip"]
    assert result.estimates["J"]["told"][0].mean == 1
    assert result.estimates["F"]["told"][0].mean == 1
    assert result.estimates["J&F"]["told"][0].mean == 1
    assert outcome.figures[0].counts["told"][0, 0].tolist() == [2, 2, 2]
    # The blank side cannot move the first square; it loses at least what that has left.
    assert result.estimates["J"]["blank"][0].mean < 0.75
    shown = [panel.caption for panel in outcome.draw(0)]
    assert shown[1:] == ["labels", "blank", "told"]


def test_sequences_that_cannot_be_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {}
    sequences = {"short": 2, "empty": 4, "alone": 4, "small": 4, "folder": 4, "later": 4, "good": 4}
    for name, frames in sequences.items():
        for frame in range(frames):
            mask, features[f"{name}/{frame}.jpg"] = moving(frame, True)
            if name != "alone" or frame == 0:
                write_png(tmp_path / "masks" / name / f"{frame}.png", mask * (name != "empty"))
    (tmp_path / "masks" / "good" / "2.png").unlink()
    write_png(tmp_path / "masks" / "small" / "2.png", moving(2, True)[0][:12])
    # Masks that cannot be read.
    folder, loop = tmp_path / "masks" / "folder" / "0.png", tmp_path / "masks" / "later" / "2.png"
    folder.unlink()
    folder.mkdir()
    loop.unlink()
    loop.symlink_to(loop)
    monkeypatch.setattr("pipeline.evaluate.data.comparison._SHOWN", 9)
    comparison = compared(a=store_of(tmp_path / "a", features))
    outcome = evaluate(comparison, config("video", tmp_path / "masks", tmp_path / "report", video_rows=8))
    notes = "\n".join(comparison.notes)
    assert outcome.units == ["good"]
    assert "good: 1 frame without a mask: not evaluated" in notes
    no_object = "empty: the mask of its first frame, empty/0.jpg, has no object"
    small = "small: the mask of small/2.jpg cannot be used: has 12×24 pixels, expected 24×24"
    for reason in (
        "short: has 2 frames",
        no_object,
        small,
        "alone: no frame between the first and the last has a mask",
        "folder: [Errno 21] Is a directory",
        "later: the mask of later/2.jpg cannot be used: [Errno 40] Too many levels of symbolic links",
    ):
        assert reason in notes
    # The page shows a frame that has a mask: the third one of four has none.
    truth = outcome.draw(0)[1]
    assert truth.caption == "labels"
    np.testing.assert_array_equal((truth.pixels != truth.pixels[0, 0]).any(2), moving(1, True)[0] > 0)
    only = compared(a=store_of(tmp_path / "b", {key: one for key, one in features.items() if "short" in key}))
    with pytest.raises(JobError, match="no sequence can be tracked; the first: has 2 frames"):
        evaluate(only, config("video", tmp_path / "masks", tmp_path / "report"))


def test_objects_between_the_pixels_are_said(tmp_path: Path) -> None:
    """The features have a quarter of the resolution; an object of one pixel is at none of their centres."""
    features = {}
    for frame in range(4):
        mask, told = moving(frame, True)
        mask[0, 0] = 7
        features[f"clip/{frame}.jpg"] = told[:, ::4, ::4]
        write_png(tmp_path / "masks" / "clip" / f"{frame}.png", mask)
    quarter = ((SIDE, SIDE), (0.25, 0.0, 0.0, 0.0, 0.25, 0.0), (0, 0, SIDE // 4, SIDE // 4))
    comparison = compared(a=store_of(tmp_path / "a", features, quarter))
    evaluate(comparison, config("video", tmp_path / "masks", tmp_path / "report", video_rows=6))
    assert "clip: 1 object of the first frame left out: outside of the features" in "\n".join(comparison.notes)

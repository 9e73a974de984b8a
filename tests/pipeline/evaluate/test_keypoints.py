"""Keypoint correspondence on shifted images, of which every match is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.evaluate.data.labels import read_keypoints
from pipeline.evaluate.keypoints import evaluate
from pipeline.evaluate.report.result import Result
from tests.pipeline.evaluate.stores import compared, config, store_of

SIDE = 20


def scene(shift: int, seed: int = 0) -> np.ndarray:
    """Features of a scene of pixels that are all different, shifted to the right: [32, SIDE, SIDE]."""
    wide = np.random.default_rng(seed).normal(size=(32, SIDE, 2 * SIDE))
    return wide[:, :, SIDE - shift : 2 * SIDE - shift]


def written(folder: Path, points: object) -> Path:
    (folder / "keypoints.json").write_text(json.dumps(points))
    return folder / "keypoints.json"


def test_shares_by_hand(tmp_path: Path) -> None:
    """b is a, 3 pixels to the right. Of its labels, one is right, one 2 to 3 pixels off, one is missing, one unseen."""
    scenes = {"x/a": scene(0), "x/b": scene(3), "y/c": scene(6), "y/d": scene(0, 1), "y/e": scene(0)}
    store = store_of(tmp_path / "a", scenes)
    labels = written(
        tmp_path,
        {
            "x/a": [[2.5, 4.5], [10.5, 6.5], [3.5, 3.5], [19.5, 2.5]],
            "x/b": [[5.5, 4.5], [13.5, 9.0], None, [22.5, 2.5]],
            "y/c": [[8.5, 4.5]],
            "y/gone": [[1.0, 1.0]],
        },
    )
    comparison = compared(a=store)
    outcome = evaluate(comparison, config("keypoints", labels, tmp_path / "report", alphas=(0.1, 0.2)))
    assert outcome.units == ["x/a", "x/b"]
    counts = {figure.name: figure.counts["a"][0].tolist() for figure in outcome.figures}
    # The boxes of the points on the image are 17 wide, b's 8, and the images 20: 0.1 is less than the error, and 0.2
    # more but for b's box.
    assert counts["PCK@0.2 of the box"] == [[1, 2], [2, 2]]
    assert counts["PCK@0.1 of the box"] == [[1, 2], [1, 2]]
    assert counts["PCK@0.2 of the image"] == [[2, 2], [2, 2]]
    notes = "\n".join(comparison.notes)
    assert "1 keypoint left out: outside of the features" in notes
    assert "2 images left out: no labels (y/d: no keypoints; y/e" in notes
    assert "1 image left out: keypoints without features (y/gone" in notes
    assert "1 image left out: no keypoint in common with another image (y/c: 1 point)" in notes
    # The caption is about the middle one of the shares, here the greater.
    assert [panel.caption for panel in outcome.draw(0)][1:] == ["a, to x/b: 1 of 2 within 0.2 of the box"]


def test_pairs_across_folders(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {"x/a": scene(0), "y/c": scene(6)})
    labels = written(tmp_path, {"x/a": [[2.5, 4.5], [9.5, 6.5]], "y/c": [[8.5, 4.5], [15.5, 6.5]]})
    with pytest.raises(JobError, match="no two of 2 images have keypoints in common"):
        evaluate(compared(a=store), config("keypoints", labels, tmp_path / "report"))
    comparison = compared(a=store)
    outcome = evaluate(comparison, config("keypoints", labels, tmp_path / "report", same_folder=False))
    result = Result.of("keypoints", outcome, comparison)
    assert result.estimates["PCK@0.1 of the box"]["a"][0].mean == 1


def test_why_there_is_no_pair(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {"x/a.jpg": scene(0), "x/b.jpg": scene(3)})

    def refused(points: object, words: str, **options: object) -> None:
        with pytest.raises(JobError, match=words):
            evaluate(compared(a=store), config("keypoints", written(tmp_path, points), tmp_path / "report", **options))

    one = [2.5, 4.5]
    refused({"x/a": [one]}, "keys look like 'x/a', those of the features like 'x/a.jpg'")
    refused({}, "keys look like 'none'")
    refused({"x/a.jpg": [], "x/b.jpg": [one]}, "no two of 1 image have .* left out: no labels")
    refused({"x/a.jpg": [one], "x/b.jpg": [one, one]}, "lists have different lengths: point i corresponds to")
    refused({"x/a.jpg": [[-5, 1]], "x/b.jpg": [one]}, "1 keypoint left out: outside of the features")
    refused({"x/a.jpg": [one], "x/b.jpg": [one]}, "no two of 1 image .*; --limit leaves one", limit=1)


def test_a_box_without_a_size_is_said(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {"x/a": scene(0), "x/b": scene(3)})
    comparison = compared(a=store)
    labels = written(tmp_path, {"x/a": [[2.5, 4.5]], "x/b": [[5.5, 4.5]]})
    outcome = evaluate(comparison, config("keypoints", labels, tmp_path / "report"))
    assert "2 images with keypoints at one place only: their box has no size" in "\n".join(comparison.notes)
    counts = {figure.name: figure.counts["a"][0].tolist() for figure in outcome.figures}
    assert counts["PCK@0.1 of the box"] == [[0, 1], [0, 1]]  # although the point found is the right one
    assert counts["PCK@0.1 of the image"] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("outside", [[-1000, 3], [3, SIDE + 1], [10 * SIDE, -5]])
def test_points_outside_of_the_image_do_not_widen_the_box(tmp_path: Path, outside: list[float]) -> None:
    store = store_of(tmp_path / "a", {"x/a": scene(0), "x/b": scene(3, 1)})
    a, b = [[2.5, 4.5], [8.5, 6.5]], [[5.5, 4.5], [11.5, 6.5]]
    found = []
    for more in ([], [outside]):
        labels = written(tmp_path, {"x/a": a + more, "x/b": b + more})
        comparison = compared(a=store)
        outcome = evaluate(comparison, config("keypoints", labels, tmp_path / "report", alphas=(0.5, 1.0)))
        found.append({figure.name: figure.counts["a"].tolist() for figure in outcome.figures})
    assert "2 keypoints left out" in "\n".join(comparison.notes)
    assert found[0] == found[1]


def test_lists_of_different_lengths_are_said(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {f"{folder}/{i}": scene(i) for folder in "xy" for i in range(3)})
    one = [2.5, 4.5]
    labels = {f"{folder}/{i}": [one] * count for folder in "xy" for i, count in enumerate((2, 2, 3))}
    for same_folder, pairs in ((True, 8), (False, 16)):
        comparison = compared(a=store)
        options = config("keypoints", written(tmp_path, labels), tmp_path / "report", same_folder=same_folder)
        evaluate(comparison, options)
        assert f"{pairs} pairs left out: their lists have different lengths" in "\n".join(comparison.notes)


@pytest.mark.parametrize(
    "document", [[1, 2], {"a": [[1, 2, 3]]}, {"a": "x"}, {"a": [1.0, 2.0]}, {"a": [[1, None]]}, {"a": [["1", "2"]]},
     {"a": [[float("inf"), 1]]}, {"a": [[1, float("nan")]]}, {"a": [[True, 1]]}, {"a": [[10**400, 1]]}],
)  # fmt: skip
def test_what_are_no_keypoints(tmp_path: Path, document: object) -> None:
    with pytest.raises(JobError, match=r"expected a JSON object \{\"KEY\": \[\[x, y\], null"):
        read_keypoints(str(written(tmp_path, document)))
    with pytest.raises(JobError, match=r"--labels .*missing.json"):
        read_keypoints(str(tmp_path / "missing.json"))


def test_a_document_without_end(tmp_path: Path) -> None:
    (tmp_path / "keypoints.json").write_text("[" * 200_000)
    with pytest.raises(JobError, match=r"expected a JSON object"):
        read_keypoints(str(tmp_path / "keypoints.json"))

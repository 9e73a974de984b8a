"""Object discovery: connected parts, boxes, the cut of a graph, and the share of objects found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from pipeline.errors import JobError
from pipeline.evaluate.discovery import box_iou, components, evaluate, foreground
from pipeline.evaluate.report.result import Result
from tests.pipeline.evaluate.stores import compared, config, store_of, write_png

SIDE = 20


@pytest.mark.parametrize("seed", range(5))
def test_connected_parts_are_scipys(seed: int) -> None:
    mask = np.random.default_rng(seed).random((17, 23)) < 0.55
    found, (expected, count) = components(mask), ndimage.label(mask)
    assert len(np.unique(found[mask])) == count > 5
    assert len(set(zip(found[mask].tolist(), expected[mask].tolist(), strict=True))) == count
    assert (found[~mask] == -1).all()


def test_overlap_of_boxes() -> None:
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def scene(box: tuple[int, int, int, int], seed: int = 0) -> np.ndarray:
    """Features of a background in one direction, and of an object in the opposite one, with noise."""
    features = np.random.default_rng(seed).normal(size=(4, SIDE, SIDE)) * 0.1
    features[0] += 1
    y0, x0, y1, x1 = box
    features[0, y0:y1, x0:x1] -= 2
    return features


def tokencut(features: np.ndarray) -> np.ndarray:
    """The object as TokenCut's own code finds it: the generalised eigenproblem, a mean, and the seed's part."""
    flat = features.reshape(len(features), -1)
    unit = flat / np.linalg.norm(flat, axis=0)
    graph = np.where(unit.T @ unit > 0.2, 1.0, 1e-5)
    degrees = np.diag(graph.sum(1))
    vector = linalg.eigh(degrees - graph, degrees, subset_by_index=[1, 2])[1][:, 0]
    parted, seed = vector > vector.mean(), np.argmax(np.abs(vector))
    if not parted[seed]:
        parted = ~parted
    parts, _ = ndimage.label(parted.reshape(features.shape[1:]))
    return np.asarray(parts == parts.reshape(-1)[seed])


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
def test_the_cut_is_tokencuts(noise: float) -> None:
    features = scene((4, 6, 11, 15)) + noise * np.random.default_rng(1).normal(size=(4, SIDE, SIDE))
    found = foreground(torch.from_numpy(features).float())
    assert np.array_equal(found, tokencut(features.astype(np.float32).astype(float)))
    assert found[5:10, 7:14].mean() > 0.8
    assert found.mean() < 0.3


def test_objects_are_found_where_features_show_them(tmp_path: Path) -> None:
    boxes = {f"{i}.jpg": (2 + i, 3, 10 + i, 12) for i in range(4)}
    good, bad = {}, {}
    for i, (key, box) in enumerate(boxes.items()):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[box[0] : box[2], box[1] : box[3]] = 7
        mask[0, 0] = 9  # less than 1% of the image
        mask[:, 18:] = 200  # no object, if only 7 is one
        write_png(tmp_path / "masks" / f"{i}.png", mask)
        good[key], bad[key] = scene(box, i), scene((14, 14, 19, 19), i)
    write_png(tmp_path / "masks" / "4.png", np.zeros((SIDE, SIDE), np.uint8))
    good["4.jpg"] = bad["4.jpg"] = scene((2, 2, 9, 9))
    comparison = compared(bad=store_of(tmp_path / "a", bad), good=store_of(tmp_path / "b", good))
    options = config("discovery", tmp_path / "masks", tmp_path / "report", objects=(7, 9), discovery_rows=SIDE)
    outcome = evaluate(comparison, options)
    found = Result.of("discovery", outcome, comparison).estimates
    assert outcome.units == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert found["CorLoc"]["good"][0].mean == 1
    assert found["overlap"]["good"][0].mean == 1
    assert found["CorLoc"]["bad"][0].mean == 0
    assert "1 image left out: unlabelled (4.jpg" in "\n".join(comparison.notes)
    assert [panel.caption for panel in outcome.draw(0)][1:] == ["labels", "bad", "good"]
    none = config("discovery", tmp_path / "masks", tmp_path / "report", objects=(3,))
    with pytest.raises(JobError, match="none of the 5 images has usable labels; the first, 0"):
        evaluate(compared(a=comparison.sides[0].store.uri), none)

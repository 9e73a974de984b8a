"""Class activation maps, with a classifier whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import JobError
from pipeline.evaluate import run
from pipeline.evaluate.activation_maps import Classifier, evaluate, measures
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.sides import open_sides
from tests.pipeline.evaluate.stores import config, store_of

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
SIDE = 20


class LooksLeft(Classifier):
    """Probability of class 1: the mean brightness of the left half."""

    def __init__(self) -> None:
        pass

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        left = images[:, :, :, : SIDE // 2].float().mean((1, 2, 3)) / 255
        return torch.stack([1 - left, left], 1)


def test_measures_by_hand() -> None:
    """The left half is white, with probability 1. A grey pixel, 127.5 rounded to 128, counts as a half."""
    photo = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    photo[:, :, : SIDE // 2] = 255
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    grey = 128 / 255
    all_of_it = torch.ones(SIDE, SIDE, dtype=torch.bool)
    good, bad = (measures(LooksLeft(), photo, heat, 1, all_of_it) for heat in (left, 1 - left))
    assert good[[0, 1, 4]].tolist() == [0, 0, 1]
    assert bad[[0, 1, 4]].tolist() == [1, 0, 1]
    # Deletion of the left half takes five of ten steps from 1 to grey, or begins after five.
    assert float(good[3]) == pytest.approx(0.5 * (1 + grey) / 2 + 0.5 * grey, abs=1e-6)
    assert float(bad[3]) == pytest.approx(0.5 + 0.5 * (1 + grey) / 2, abs=1e-6)
    assert float(good[2]) > float(bad[2])


def test_padding_is_never_changed() -> None:
    """The left half is padding: all that the classifier sees."""
    photo = torch.full((3, SIDE, SIDE), 200, dtype=torch.uint8)
    valid = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    valid[:, SIDE // 2 :] = True
    for heat in (torch.rand(SIDE, SIDE), 1.0 * valid, 1.0 * ~valid):
        measured = measures(LooksLeft(), photo, heat, 1, valid)
        torch.testing.assert_close(measured.float(), torch.tensor([0, 0, 200 / 255, 200 / 255, 1]))
    assert measures(LooksLeft(), photo, heat, 1, ~valid | valid)[3] < 0.7  # without padding, deletion works
    assert measures(LooksLeft(), photo, heat, 1, valid & ~valid).tolist() == [0] * 5


def test_an_image_that_is_classified_better_without_the_rest() -> None:
    photo = torch.full((3, SIDE, SIDE), 200, dtype=torch.uint8)
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    all_of_it = torch.ones(SIDE, SIDE, dtype=torch.bool)
    drop, increase = measures(LooksLeft(), photo, 1 - left, 0, all_of_it)[:2].tolist()  # class 0: left is dark
    assert increase == 1
    assert drop == 0


def test_maps_of_a_store_of_class_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        blocks = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        Image.fromarray(blocks).save(tmp_path / "photos" / f"{i}.png")
    small = "backbone=resnet18,weights=random,size=64,workers=0,device=cpu,space=head,components=8"
    texts = [f"name={name},{small},upsampler={name}" for name in ("bilinear", "jbu")]
    with open_sides(texts, str(tmp_path / "photos"), None) as sides:
        outcome = evaluate(Comparison(sides), config("activation_maps", None, tmp_path / "report"))
        panels = outcome.draw(0)
    assert [figure.name for figure in outcome.figures] == ["average drop", "average increase", "insertion", "deletion"]
    for figure in outcome.figures:
        assert figure.counts["jbu"].shape == (1, 3, 2)
        assert ((figure.counts["jbu"] >= 0) & (figure.counts["jbu"] <= 1)).all()
    assert [panel.caption for panel in panels[1:]] == ["bilinear", "jbu"]
    assert all(panel.pixels.shape == (64, 64, 3) for panel in panels)


def test_stores_without_class_scores_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {"x": np.ones((2, 4, 4))})
    with pytest.raises(JobError, match=r"--features .*: expected class scores: make the features with --space head"):
        run.evaluate(config("activation_maps", None, tmp_path / "report", features=(store,)))

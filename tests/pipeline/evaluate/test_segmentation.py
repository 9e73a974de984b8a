"""The segmentation task on stores of which the right answer is known."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import split, spread
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.segmentation import evaluate
from tests.pipeline.evaluate.stores import compared, config, store_of, write_png

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
SIDE, CLASSES = 24, 4


def mask(seed: int) -> np.ndarray:
    """Blocks of 6 pixels with the values 10, 20, 30, 40."""
    blocks = np.random.default_rng(seed).integers(1, CLASSES + 1, (SIDE // 6, SIDE // 6)) * 10
    return np.kron(blocks, np.ones((6, 6))).astype(np.uint8)


def one_hot(values: np.ndarray) -> np.ndarray:
    return np.stack([(values == 10 * number) for number in range(1, CLASSES + 1)]).astype(np.float32)


def coarse(values: np.ndarray) -> np.ndarray:
    """One-hot features shifted by two pixels: wrong near borders only."""
    return np.roll(one_hot(values), 2, (1, 2))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, np.ndarray]:
    """Masks by key, written to the folder ``masks``."""
    masks = {f"{part}/{i}.jpg": mask(10 * i + len(part)) for part in ("train", "val") for i in range(4)}
    for key, values in masks.items():
        write_png(tmp_path / "masks" / key.replace(".jpg", ".png"), values)
    return masks


def test_perfect_features_are_perfect_and_shifted_ones_lose_at_borders(
    tmp_path: Path, keys: dict[str, np.ndarray]
) -> None:
    stores = {
        "shifted": store_of(tmp_path / "a", {key: coarse(values) for key, values in keys.items()}),
        "perfect": store_of(tmp_path / "b", {key: one_hot(values) for key, values in keys.items()}),
    }
    comparison = compared(**stores)
    outcome = evaluate(comparison, config("segmentation", tmp_path / "masks", tmp_path / "report"))
    result = Result.of("segmentation", outcome, comparison)
    assert outcome.units == tuple(f"val/{i}.jpg" for i in range(4))
    for name in ("mean IoU", "accuracy", "border accuracy"):
        assert result.estimates[name]["perfect"][0].mean == 1
        assert result.estimates[name]["perfect"][1].low > 0
    shifted = result.estimates["accuracy"]["shifted"][0].mean
    agreeing = np.mean([np.roll(keys[key], 2, (0, 1)) == keys[key] for key in outcome.units])
    assert shifted == pytest.approx(agreeing, abs=0.02)
    assert result.estimates["border accuracy"]["shifted"][0].mean < shifted
    assert outcome.details["classes"] == (10, 20, 30, 40)


def test_the_same_options_give_the_same_figures(tmp_path: Path, keys: dict[str, np.ndarray]) -> None:
    noise = np.random.default_rng(0)
    features = {key: coarse(values) + noise.normal(size=(CLASSES, SIDE, SIDE)) for key, values in keys.items()}
    store = store_of(tmp_path / "a", features)
    options = config("segmentation", tmp_path / "masks", tmp_path / "report")
    first, second = (evaluate(compared(a=store), options) for _ in range(2))
    assert all(
        (one.counts["a"] == other.counts["a"]).all() for one, other in zip(first.figures, second.figures, strict=True)
    )


def test_what_cannot_be_used_is_left_out_and_said(tmp_path: Path, keys: dict[str, np.ndarray]) -> None:
    """A failed row, a missing and a small mask, one without labels, an ignored value, a class of validation only."""
    for part in ("train", "val"):
        (tmp_path / "masks" / part / "1.png").unlink()
    write_png(tmp_path / "masks" / "val" / "2.png", mask(0)[:10])
    write_png(tmp_path / "masks" / "train" / "2.png", np.full((SIDE, SIDE), 255, np.uint8))
    own = keys["val/3.jpg"].copy()
    own[:3], own[3:5] = 99, 255
    write_png(tmp_path / "masks" / "val" / "3.png", own)
    features = {key: one_hot(values) for key, values in keys.items()}
    store = store_of(tmp_path / "a", {**features, "val/0.jpg": None})
    other = store_of(tmp_path / "b", features)
    comparison = compared(a=store, b=other)
    outcome = evaluate(comparison, config("segmentation", tmp_path / "masks", tmp_path / "report"))
    notes = "\n".join(comparison.notes)
    assert outcome.units == ("val/3.jpg",)
    assert int(outcome.figures[0].counts["a"][0, 0, :, 1].sum()) == SIDE * (SIDE - 5)
    assert "1 image left out: no features on some side" in notes
    assert "1 image left out: no labels (val/1.jpg" in notes
    assert "1 image left out: labels that cannot be used (val/2.jpg: has 10×24 pixels, expected 24×24" in notes
    assert "1 image left out: unlabelled (train/2.jpg" in notes
    assert "1 of the validation images' classes are not among those of the probe" in notes
    assert f"({3 * SIDE / (SIDE * (SIDE - 2)):.1%} of the labelled pixels)" in notes


def test_only_the_most_frequent_classes(tmp_path: Path, keys: dict[str, np.ndarray]) -> None:
    train = np.stack([values for key, values in keys.items() if key.startswith("train")])
    values, counts = np.unique(train, return_counts=True)
    store = store_of(tmp_path / "a", {key: one_hot(values) for key, values in keys.items()})
    outcome = evaluate(compared(a=store), config("segmentation", tmp_path / "masks", tmp_path / "report", classes=2))
    assert outcome.details["classes"] == tuple(sorted(values[np.argsort(-counts, kind="stable")[:2]]))


def test_splits() -> None:
    keys = ["train/a", "train/b", "val/a", "extra/a"]
    by_folder = split(keys, None, None, 0)
    assert (by_folder.train, by_folder.val) == (("train/a", "train/b"), ("val/a",))
    assert by_folder.described == "folders train/, val/; 1 image in neither"
    by_pattern = split(keys, "*/a", "*/b", 0)
    assert (by_pattern.train, by_pattern.val) == (("train/a", "val/a", "extra/a"), ("train/b",))
    halves = split([f"{i}.jpg" for i in range(9)], None, None, 0)
    assert (len(halves.train), len(halves.val)) == (4, 5)
    assert not {*halves.train} & {*halves.val}
    assert halves == split([f"{i}.jpg" for i in range(9)], None, None, 0)
    assert halves.train != split([f"{i}.jpg" for i in range(9)], None, None, 1).train
    assert spread(keys, 2) == ("train/a", "val/a")
    # Of val and test, one is evaluated on.
    three = split([*keys, "test/a", "training/a"], None, None, 0)
    assert (three.train, three.val) == (by_folder.train, by_folder.val)
    assert three.described == "folders train/, val/; 3 images in neither"
    assert split(["train/a", "test/a"], None, None, 0).val == ("test/a",)
    with pytest.raises(JobError, match=r"no image is left to train on, of 1 image \(random halves, seed 0\)"):
        split(["a"], None, None, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"ignore": (10, 20, 30, 255)},
            r"the training images have the classes \(40,\), expected two or more; .* by --ignore: 10, 20, 30, 255",
        ),
        ({"train": "no/*", "val": "val/*"}, r"no image is left to train on, of 8 .*keys look like 'train/0.jpg'"),
        ({"train": "*", "val": "val/*"}, r"have 4 images in common, such as 'val/0.jpg'"),
    ],
)
def test_splits_and_classes_that_cannot_be(
    tmp_path: Path, keys: dict[str, np.ndarray], options: dict[str, object], words: str
) -> None:
    store = store_of(tmp_path / "a", {key: one_hot(values) for key, values in keys.items()})
    with pytest.raises(JobError, match=words):
        evaluate(compared(a=store), config("segmentation", tmp_path / "masks", tmp_path / "report", **options))


def test_no_labels_at_all(tmp_path: Path, keys: dict[str, np.ndarray]) -> None:
    store = store_of(tmp_path / "a", {key: one_hot(values) for key, values in keys.items()})
    with pytest.raises(
        JobError, match=r"none of the 4 training images has usable labels; the first, train/0.jpg: .*no mask for"
    ):
        evaluate(compared(a=store), config("segmentation", tmp_path / "elsewhere", tmp_path / "report"))

"""The features that --features names, and the features that the job computes itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from densefeat.errors import StoreError
from pipeline.errors import JobError
from pipeline.evaluate.data.side_options import SideOptions, _typed, parse_side
from pipeline.evaluate.data.sides import PlannedSide, Side, open_sides
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from schemas.options import UpsampleConfig
from tests.helpers.photographs import photo
from tests.pipeline.evaluate.stores import compared, store_of

SMALL = "backbone=resnet18,weights=random,layer=2,size=64,components=4,workers=0,device=cpu"


def test_stores_and_configurations() -> None:
    assert parse_side("s3://bucket/a=1/store") == SideOptions("s3://bucket/a=1/store", "s3://bucket/a=1/store", {})
    assert parse_side("name=mine,store=x=1/y,z") == SideOptions("mine", "x=1/y,z", {})
    options = parse_side("name=a,backbone=x,layer=8,9,components=0.9,views=5,fit=pad,device=cpu")
    assert options == SideOptions(
        "a", None, {"backbone": "x", "layer": "8,9", "components": 0.9, "views": 5, "fit": "pad", "device": "cpu"}
    )
    assert parse_side("components=64").options == {"components": 64}
    assert _typed("x", "flag", "true", bool) is True
    assert parse_side("upsampler=jbu").name == "upsampler=jbu"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upsamler=jbu", r"unknown upsamler; expected name, store, first, .*upsampler"),
        ("upsampler=jbu,images=photos/", r"unknown images"),
        ("fit=stretch", r"fit=stretch: expected crop or pad or squash"),
        ("views=few", r"views=few: expected a number"),
        ("backbone=x,components=all", r"components=all: expected a number"),
        ("components=16,upsampler=jbu,components=4", r"components is there more than once"),
        ("store=x,upsampler=jbu", r"a store has its own options, leave out upsampler"),
    ],
)
def test_what_is_no_side(text: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        parse_side(text)


def test_sides_need_images_and_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="need --images"), open_sides(["upsampler=jbu"], None, None):
        pass
    with pytest.raises(JobError, match="names must differ, got a, a"), open_sides(["a", "a"], None, None):
        pass
    (tmp_path / "a.jpg").write_bytes(photo())
    wrong = f"name=mine,{SMALL},upsampler=lift"
    with (
        pytest.raises(JobError, match=r"--features mine: .*--upsampler-weights"),
        open_sides([wrong], str(tmp_path), None),
    ):
        pass


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (f"name=b,{SMALL.replace('components=4', 'components=0')}", "--features b: --components"),
        (f"name=b,{SMALL.replace('resnet18', 'resnet19')}", "--features b: .*resnet19"),
        (f"name=b,{SMALL},first=9", "--features b: first=9, but the store has 4 components"),
        ("name=b,store=no/store", "no/store"),
    ],
)
def test_all_sides_are_checked_before_features_are_computed(tmp_path: Path, second: str, words: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(photo())
    with (
        pytest.raises((JobError, StoreError), match=words),
        open_sides([f"name=a,{SMALL}", second], str(tmp_path / "photos"), str(tmp_path / "stores")),
    ):
        pass
    assert not (tmp_path / "stores").exists()


def test_sides_are_planned_before_features_are_computed(tmp_path: Path) -> None:
    """A configuration is planned as the main job would make it, and one whose features are there is read."""
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(photo(64, 96))
    store, stores = store_of(tmp_path / "a", {"x": np.ones((2, 4, 4)), "y": None}), tmp_path / "stores"
    texts = [f"name=b,{SMALL}", f"name=a,store={store}"]

    def check(sides: Sequence[PlannedSide]) -> None:
        seen.append({side.name: (side.weights, side.configuration.hash, list(side.keys)) for side in sides})
        finished.append(any(stores.glob("*/manifest.parquet")))

    seen: list[dict[str, tuple[str | None, str, list[str]]]] = []
    finished: list[bool] = []
    for _ in range(2):
        with open_sides(texts, str(tmp_path / "photos"), str(stores), check) as sides:
            assert seen[-1]["a"] == (None, sides[1].store.attributes["configuration_hash"], ["x"])
            assert seen[-1]["b"][::2] == ("random", ["a.jpg", "b.jpg"])
    assert finished == [False, True]
    assert seen[1]["b"][1] == sides[0].store.attributes["configuration_hash"]
    with pytest.raises(JobError, match="not these"), open_sides(texts[1:], None, None, _refuse):
        pass


def _refuse(sides: Sequence[PlannedSide]) -> None:
    raise JobError("not these")


def test_unfinished_rows_are_said(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in "abcd":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(photo(64, 96))
    (tmp_path / "photos" / "d.jpg").write_bytes(b"no image")
    common = {"images": str(tmp_path / "photos"), "store": str(tmp_path / "store"), "shard_images": 1, "workers": "0"}
    small = {"backbone": "resnet18", "weights": "random", "layer": "2", "size": "64", "components": 4, "device": "cpu"}
    config = UpsampleConfig(**common, **small, shards="1:4")
    carry_out(make_plan(config), 0.0)
    comparison = compared(a=str(tmp_path / "store"))
    assert comparison.keys == ("b.jpg", "c.jpg")
    assert comparison.notes[0] == "a: rows without features: 1 not computed yet, 1 unsupported"


def test_computed_features_are_kept_for_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(photo(64, 96))
    texts = [f"name=bilinear,{SMALL},upsampler=bilinear", f"name=jbu,{SMALL},upsampler=jbu"]
    images, kept = str(tmp_path / "photos"), tmp_path / "stores"
    with open_sides(texts, images, None) as sides:
        temporary = [Path(side.store.uri) for side in sides]
        first = sides[1].read("a.jpg")
        assert sides[1].store.attributes["configuration"]["upsampler"]["name"] == "jbu"
        assert sides[0].seconds_per_image is not None
        assert sides[0].seconds_per_image > 0
        assert sides[0].device == "cpu"
    assert not any(path.exists() for path in temporary)
    with open_sides(texts, images, str(kept)) as sides:
        assert (sides[1].read("a.jpg") == first).all()
    written = {path: path.stat().st_mtime_ns for path in kept.glob("*/features/c/**/*") if path.is_file()}
    assert len(written) == 2
    with open_sides(texts[::-1], images, str(kept)) as sides:
        assert (sides[0].read("a.jpg") == first).all()
    assert {path: path.stat().st_mtime_ns for path in kept.glob("*/features/c/**/*") if path.is_file()} == written


def test_images_of_some_sides_only(tmp_path: Path) -> None:
    array = np.ones((2, 4, 4))
    one = store_of(tmp_path / "a", {"x": array, "y": None, "z": array, "w": array})
    other = store_of(tmp_path / "b", {"z": array, "y": array, "x": array, "v": array})
    comparison = compared(a=one, b=other)
    assert comparison.keys == ("x", "z")
    assert comparison.notes == ["a: rows without features: 1 corrupt", "3 images left out: no features on some side"]
    with pytest.raises(JobError, match=r"no image has features on every side; keys look like a: 'x', c: 'q'"):
        _ = compared(a=one, c=store_of(tmp_path / "c", {"q": array})).keys


def test_cosines_are_those_of_the_reconstructed_channels(tmp_path: Path) -> None:
    """Also with a mean that the components do not span: the store's basis is the identity, and a part of it is used."""
    rng = np.random.default_rng(0)
    features, mean = rng.normal(size=(5, 2, 3)), rng.normal(size=5)
    uri = store_of(tmp_path / "a", {"x": features}, mean=mean)
    for first in (None, 3):
        side = Side.of("a", uri, first)
        channels = features.astype(np.float16).astype(float)
        channels[first or 5 :] = 0
        channels = (channels + mean[:, None, None]).reshape(5, -1)
        channels /= np.linalg.norm(channels, axis=0)
        unit = side.unit_channels(side.read("x")).flatten(1)
        assert np.abs((unit.T @ unit).numpy() - channels.T @ channels).max() < 1e-3
    with pytest.raises(JobError, match="first=6, but the store has 5 components"):
        Side.of("a", uri, 6)
    assert parse_side("store=x,first=3") == SideOptions("store=x,first=3", "x", {}, 3)

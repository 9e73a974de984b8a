"""Images that make their worker crash or raise lose nothing but themselves, wherever in a dataset they are."""

import os
from functools import partial
from pathlib import Path

import pytest

from densefeat import FeatureStore, MissingFeatures
from densefeat.storage.objects import Objects
from pipeline.run.make_shards import make_shards
from pipeline.run.planning.plan import make_plan
from pipeline.run.preparation.prepare import prepare
from pipeline.run.shard_worker import make_worker
from pipeline.run.workers import InlineWorkers, Workers
from pipeline.store.layout import finish
from tests.helpers.photographs import write_random_images
from tests.helpers.scripted_workers import KILLS, RAISES, make_poisoned, make_struck
from tests.helpers.upsample_jobs import config

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def write_images(folder: Path, count: int, poison: dict[int, bytes]) -> Path:
    for path in sorted(write_random_images(folder, count).iterdir()):
        path.write_bytes(path.read_bytes() + poison.get(int(path.stem), b""))  # decoders ignore what follows an image
    return folder


def run(images: Path, store: Path, opened: Workers, **options: object) -> dict[int, str]:
    """Make the store; returns the shards given up, and why."""
    plan, objects = make_plan(config(images, store, **options)), Objects(store)
    encoding = prepare(plan, objects, opened)
    made, given_up = make_shards(plan, objects, opened, encoding, list(plan.shards), [])
    if not given_up:
        finish(objects, list(made.values()))
    return given_up


def inline(images: Path, store: Path, **options: object) -> dict[int, str]:
    plan = make_plan(config(images, store, **options))
    with InlineWorkers(
        plan.spec, attempts=2, first_wait_s=0.01, make=partial(make_poisoned, stages=plan.stages)
    ) as workers:
        return run(images, store, workers, **options)


def check_only_these_failed(store: Path, clean: Path, poison: set[int], reason: str) -> None:
    """They failed with the reason, and the other rows are as in a store of a decoder without bugs, up to the basis."""
    poisoned, undisturbed = FeatureStore(str(store)), FeatureStore(str(clean))
    for row in range(len(poisoned.index)):
        if row in poison:
            assert poisoned.index["status"][row].as_py() == "crashed"
            assert reason in poisoned.index["error"][row].as_py()
            with pytest.raises(MissingFeatures, match=reason):
                poisoned.read(row)
        else:
            assert poisoned.index["status"][row].as_py() == "ok"
            assert (poisoned.read_codes(row) == undisturbed.read_codes(row)).all()


@pytest.mark.parametrize("poison", [{0}, {13}, {4, 5, 6, 7}, {2, 9, 11}])
def test_images_on_which_the_decoder_raises(tmp_path: Path, poison: set[int]) -> None:
    clean = write_images(tmp_path / "clean", 14, {})
    assert inline(clean, tmp_path / "undisturbed") == {}
    images = write_images(tmp_path / "images", 14, dict.fromkeys(poison, RAISES))
    basis = str(tmp_path / "undisturbed")  # the same components, and calibration without the poison is the same below
    assert inline(images, tmp_path / "store", pca=basis, dtype="float16") == {}
    assert inline(clean, tmp_path / "clean store", pca=basis, dtype="float16") == {}
    check_only_these_failed(tmp_path / "store", tmp_path / "clean store", poison, "a bug in the decoder")


def test_a_bug_that_every_image_meets_is_not_blamed_on_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", 64, {})
    assert inline(images, tmp_path / "basis") == {}
    spoiled = write_images(tmp_path / "spoiled", 64, dict.fromkeys(range(3, 64), RAISES))
    given_up = inline(spoiled, tmp_path / "store", pca=str(tmp_path / "basis"), dtype="float16", shard_images=32)
    assert sorted(given_up) == [0, 1]
    assert "the images are not the reason" in caplog.text
    assert all("a bug in the decoder" in reason for reason in given_up.values())


def test_a_shard_that_fails_by_no_fault_of_its_images_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, objects = write_images(tmp_path / "images", 14, {5: RAISES}), Objects(tmp_path / "store")
    plan = make_plan(config(images, tmp_path / "store"))
    with InlineWorkers(plan.spec, make=partial(make_worker, stages=plan.stages)) as workers:
        encoding = prepare(plan, objects, workers)
    make = partial(make_struck, tmp_path / "log", 2, stages=plan.stages)
    with InlineWorkers(plan.spec, attempts=2, first_wait_s=0.01, make=make) as workers:
        made, given_up = make_shards(plan, objects, workers, encoding, list(plan.shards), [])
    assert given_up == {}
    assert sum(record.rows_ok for record in made.values()) == 14
    assert "nothing in it fails by itself: trying it again" in caplog.text


@pytest.mark.slow
def test_an_image_that_kills_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run.ray.cluster import connected
    from pipeline.run.ray.workers import RayWorkers
    from pipeline.run.resources import Slot

    clean = write_images(tmp_path / "clean", 12, {})
    assert inline(clean, tmp_path / "basis") == {}
    images = write_images(tmp_path / "images", 12, {6: KILLS})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)  # for tests.helpers
    options = {"pca": str(tmp_path / "basis"), "dtype": "float16"}
    plan = make_plan(config(images, tmp_path / "store", workers=1, **options))
    slots = [Slot(1, 0)] * 2
    with (
        connected(),
        RayWorkers(plan.spec.on("cpu", 1), slots, attempts=2, first_wait_s=0.05, make=make_poisoned) as workers,
    ):
        assert run(images, tmp_path / "store", workers, workers=1, **options) == {}
    assert inline(clean, tmp_path / "clean store", **options) == {}
    check_only_these_failed(tmp_path / "store", tmp_path / "clean store", {6}, "its worker died")

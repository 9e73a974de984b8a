"""The main job with --append: new images become rows at the end, and nothing else changes."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densefeat import FeatureStore, StreamingFeatures, layout
from densefeat.command_line import main
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from pipeline.store.lease import Lease
from schemas.options import UpsampleConfig
from tests.helpers.datasets import tar_info, write_tar
from tests.helpers.killing import before_operation
from tests.helpers.upsample_jobs import config, shard_bytes

FIRST = 10  # of fourteen images, in shards of four: the last one has two


def some(photographs: Path, folder: Path, names: list[str]) -> Path:
    """A folder with some of the photographs."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / name, folder / name)
    return folder


def names_of(photographs: Path) -> list[str]:
    """All photographs, in an order in which classes and numbers are mixed."""
    return sorted((str(path.relative_to(photographs)) for path in photographs.rglob("*.png")), key=os.path.basename)


@pytest.fixture(scope="module")
def made(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store``, and the folder ``images`` of which it was made: copy both."""
    folder = tmp_path_factory.mktemp("made")
    some(photographs, folder / "images", names_of(photographs)[:FIRST])
    assert upsample(config(folder / "images", folder / "store")) == 0
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store; its images are gone."""
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


def appending(images: Path, store: Path, **options: Any) -> UpsampleConfig:
    return config(images, store, append=True, **options)


def chunks(store: Path, rows: int) -> list[bytes]:
    """The encoded chunks of the first rows."""
    opened = FeatureStore(store)
    return [opened.read_chunks([row])[0].features for row in range(rows)]


def check_clean(store: Path, rows: int) -> FeatureStore:
    assert verify(VerifyConfig(store=str(store))) == 0
    assert verify(VerifyConfig(store=str(store), fast=True)) == 0
    opened = FeatureStore(store)
    assert problems(opened) == []
    assert opened.index["status"].to_pylist() == ["ok"] * rows
    assert Objects(store).list(layout.GROWTH) == {}
    return opened


VARIANTS: dict[str, dict[str, Any]] = {
    "a partial shard": {},
    "full shards": {"shard_images": 5},
    "one shard": {"shard_images": 64},
    "float16 and embedding": {"dtype": "float16", "embedding": True},
    "half": {"represent": "half", "embedding": True},
    "compact": {"represent": "compact", "embedding": True},
    "bilinear and compact": {"represent": "compact", "upsampler": "bilinear"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_those_of_a_store_made_at_once(photographs: Path, tmp_path: Path, variant: str) -> None:
    """The folder grew: old rows keep their bytes, and new ones have the features that they would have had."""
    options = VARIANTS[variant]
    first = some(photographs, tmp_path / "first", names_of(photographs)[:FIRST])
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    assert upsample(config(first, grown, **options)) == 0
    before, old = FeatureStore(grown), chunks(grown, FIRST)
    read = before.read(range(FIRST))
    shutil.rmtree(first)
    assert upsample(appending(photographs, grown, **options)) == 0
    store = check_clean(grown, 14)
    assert chunks(grown, FIRST) == old
    assert store.keys[:FIRST] == before.keys
    assert store.keys[FIRST:] == [name for name in sorted(names_of(photographs)) if name not in before.keys]
    assert np.array_equal(store.read(range(FIRST)), read)
    assert np.array_equal(before.read(range(FIRST)), read)  # who opened it before goes on
    assert (len(before), len(store)) == (FIRST, 14)
    assert store.attributes["configuration_hash"] == before.attributes["configuration_hash"]
    assert upsample(config(photographs, whole, pca=str(grown), **options)) == 0
    other = FeatureStore(whole)
    for key in store.keys:
        ours, theirs = store.read(key), other.read(key)
        steps = np.zeros(len(ours)) if store.step is None or other.step is None else (store.step + other.step) / 2
        allowed = steps[:, None, None] + 2e-3 * np.abs(theirs).max()  # the second for what float16 rounds
        if store.compact is None or variant == "half":
            assert (np.abs(ours - theirs) <= allowed).all()
        else:
            assert np.abs(ours - theirs).mean() < steps.mean()
        if store.has_embedding:
            assert np.allclose(store.embedding(key), other.embedding(key), rtol=1e-3, atol=1e-4)
        if store.has_guidance:
            assert np.array_equal(store.read_guidance(key), other.read_guidance(key))


def test_the_old_shards_are_not_touched(photographs: Path, store: Path) -> None:
    before = shard_bytes(store)
    assert upsample(appending(photographs, store)) == 0
    after = shard_bytes(store)
    assert all(after[layout.shard_key(shard)] == before[layout.shard_key(shard)] for shard in (0, 1))
    index = layout.shard_index_nbytes(4)
    assert after[layout.shard_key(2)].startswith(before[layout.shard_key(2)][:-index])
    # Other libraries see the new rows, too.
    import zarr

    assert zarr.open_group(str(store), mode="r")["features"].shape[0] == 14
    assert zarr.open_array(str(store / "features"), mode="r").shape[0] == 14


def test_what_is_there_is_left_out_and_said(
    photographs: Path, made: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert upsample(appending(photographs, store)) == 0
    assert f"{photographs}: 14 images, 4 of them new" in caplog.text
    assert "10 of the 10 images that are not new have a key of the store, but lie elsewhere" in caplog.text
    assert "14 in the store, 4 of them new" in caplog.text
    files = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (store / "features/c").rglob("*")
        if path.is_file()
    }
    documents = [(store / name / "zarr.json").read_bytes() for name in ("", "features")]
    caplog.clear()
    assert upsample(appending(made / "images", store)) == 0  # nothing new: nothing is done
    assert upsample(appending(photographs, store)) == 0
    assert "none by this job" in caplog.text
    assert "none of them new" in caplog.text
    assert files == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert documents == [(store / name / "zarr.json").read_bytes() for name in ("", "features")]
    assert len(FeatureStore(store).attributes["appended"]) == 1


def test_appending_twice(photographs: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, old = names_of(photographs), chunks(store, FIRST)
    second, third = some(photographs, tmp_path / "2", names[10:11]), some(photographs, tmp_path / "3", names[11:])
    assert upsample(appending(second, store)) == 0
    between = chunks(store, 11)
    assert upsample(appending(third, store)) == 0
    check_clean(store, 14)
    assert chunks(store, 11) == between
    assert between[:FIRST] == old
    own = FeatureStore(store).attributes
    assert [(one["images"], one["rows"]) for one in own["appended"]] == [(str(second), 1), (str(third), 3)]
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(store)])
    assert f"appended  images {second}, rows 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(store), "--strict"])
    # --resume takes any of the sources, and no other.
    first = own["configuration"]["source"]["images"]
    for images in (first, second, third):
        assert upsample(config(images, store, resume=True)) == 0
    with pytest.raises(JobError, match=r"source\.images"):
        upsample(config(photographs, store, resume=True))
    # A lost index is rebuilt from all of them.
    index = (store / layout.INDEX).read_bytes()
    (store / layout.INDEX).write_bytes(b"lost")
    assert verify(VerifyConfig(store=str(store), repair=True)) == 1
    assert (store / layout.INDEX).read_bytes() == index
    check_clean(store, 14)
    (store / layout.INDEX).write_bytes(b"lost")
    shutil.rmtree(second)
    with pytest.raises(JobError, match=r"cannot be rebuilt: its images .* cannot be listed"):
        verify(VerifyConfig(store=str(store), repair=True))


def test_an_unfinished_store_is_finished_first(
    photographs: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = config(made / "images", tmp_path / "store", pca=str(made / "store"))
    assert upsample(replace(job, shards="1:")) == 0
    assert upsample(replace(job, images=str(photographs), append=True)) == 0
    assert "of the store, which is finished first; then 4 new ones" in caplog.text
    check_clean(tmp_path / "store", 14)


def test_labels_get_the_numbers_of_the_store(photographs: Path, tmp_path: Path, store: Path) -> None:
    """A source with other classes: "b" is 1 in the store, and 0 there."""
    names = names_of(photographs)
    more = some(photographs, tmp_path / "more", [name for name in names[10:] if name.startswith("b")])
    shutil.copytree(photographs / "a", more / "c")
    shutil.copytree(photographs / "a", more / "Z")
    before = FeatureStore(store).index["label"].to_pylist()
    assert upsample(appending(more, store)) == 0
    opened = FeatureStore(store)
    assert opened.class_names == ("a", "b", "Z", "c")
    assert opened.index["label"].to_pylist()[:FIRST] == before
    for key, label in zip(opened.keys, opened.index["label"].to_pylist(), strict=True):
        assert opened.class_names[label] == key[0]


def test_labels_that_cannot_be_told(
    photographs: Path, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [(photographs / name).read_bytes() for name in names_of(photographs)]

    def tar(name: str, labels: list[str]) -> Path:
        members = []
        for i, label in enumerate(labels):
            members += [(tar_info(f"{name}{i}.png"), images[i]), (tar_info(f"{name}{i}.cls"), label.encode())]
        return write_tar(tmp_path / f"{name}.tar", members)

    numbers, words = tar("numbers", ["7", "8", "7", "9"]), tar("words", ["cat", "dog"])
    assert upsample(config(numbers, tmp_path / "numbered", components=2)) == 0
    assert upsample(appending(words, tmp_path / "numbered", components=2)) == 0
    assert "the labels of 2 new images are left out: they have names of classes" in caplog.text
    opened = FeatureStore(tmp_path / "numbered")
    assert (opened.class_names, opened.index["label"].to_pylist()) == ((), [7, 8, 7, 9, None, None])
    assert upsample(config(words, tmp_path / "named", components=2)) == 0
    assert upsample(appending(numbers, tmp_path / "named", components=2)) == 0
    assert "the labels of 4 new images are left out: they are numbers" in caplog.text
    opened = FeatureStore(tmp_path / "named")
    assert (opened.class_names, opened.index["label"].to_pylist()) == (("cat", "dog"), [0, 1, *[None] * 4])
    check_clean(tmp_path / "named", 6)
    with pytest.raises(JobError, match=r"--append: the images .* of the kind tar, those of .* of the kind folder"):
        upsample(appending(words, store))


def test_a_store_without_labels_takes_names(photographs: Path, tmp_path: Path) -> None:
    flat = some(photographs / "a", tmp_path / "flat", [path.name for path in (photographs / "a").iterdir()])
    assert upsample(config(flat, tmp_path / "store", components=2)) == 0
    assert upsample(appending(photographs, tmp_path / "store", components=2)) == 0
    opened = check_clean(tmp_path / "store", 21)
    assert opened.class_names == ("a", "b")
    assert opened.index["label"].to_pylist() == [None] * 7 + [0] * 7 + [1] * 7


def test_what_is_refused(photographs: Path, tmp_path: Path, store: Path) -> None:
    before = {key: (store / key).read_bytes() for key in Objects(store).list()}
    for options, words in [
        ({"components": 4}, "--append: the store .* was made with a different configuration"),
        ({"layer": "1"}, "layer"), ({"error_floor": 0.3}, "error_floor"), ({"shard_images": 5}, "shard_images"),
        ({"pca_images": 3}, "fitted_on_images"), ({"upsampler": "bilinear"}, "upsampler"),
    ]:  # fmt: skip
        with pytest.raises(JobError, match=words):
            upsample(appending(photographs, store, **options))
    with pytest.raises(JobError, match=r"there is no store at .*nowhere"):
        upsample(appending(photographs, tmp_path / "nowhere"))
    with pytest.raises(JobError, match=r"exists: pass --resume .* --append"):
        upsample(config(photographs, store))
    for other in ({"resume": True}, {"overwrite": True}, {"shards": "0:1"}):
        with pytest.raises(ValueError, match="--append"):
            appending(photographs, store, **other)
    assert {key: (store / key).read_bytes() for key in Objects(store).list()} == before


def test_two_at_once(photographs: Path, tmp_path: Path, store: Path) -> None:
    """The lease refuses the second one; and a plan from before the first one's end is not carried out."""
    names = names_of(photographs)
    other = some(photographs, tmp_path / "other", names[10:12])
    plans = [make_plan(appending(images, store)) for images in (photographs, other)]
    late = make_plan(config(FeatureStore(store).attributes["configuration"]["source"]["images"], store, resume=True))
    with Lease(Objects(store), None, beat_s=0.2), pytest.raises(JobError, match="another job is at work"):
        carry_out(plans[0], 0.0)
    assert len(FeatureStore(store)) == FIRST
    assert carry_out(plans[0], 0.0).complete
    for plan in (plans[1], late):
        before = Objects(store).list()
        with pytest.raises(JobError, match="another job appended images in the meantime: run the same command again"):
            carry_out(plan, 0.0)
        assert Objects(store).list() == before
    check_clean(store, 14)


def test_a_state_of_before_is_refused_and_fits_with_the_old_rows(photographs: Path, store: Path) -> None:
    def batches(dataset: StreamingFeatures) -> list[list[int]]:
        return [batch["row"].tolist() for batch in DataLoader(dataset, batch_size=None)]

    dataset = StreamingFeatures(store, batch_size=3, seed=1)
    expected, state = batches(dataset), dataset.state_dict(batches=2)
    old = dataset.rows.tolist()
    assert upsample(appending(photographs, store)) == 0
    grown = StreamingFeatures(store, batch_size=3, seed=1)
    grown.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows 10, now 14.*If images were appended to the store, pass rows="):
        batches(grown)
    grown = StreamingFeatures(store, batch_size=3, seed=1, rows=old)
    grown.load_state_dict(json.loads(json.dumps(state)))
    assert batches(grown) == expected[2:]
    dataset.load_state_dict(state)  # in a process that goes on
    assert batches(dataset) == expected[2:]


@pytest.mark.s3
def test_on_s3(photographs: Path, store: Path, s3_bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).put(str(store), f"{s3_bucket}/store", recursive=True)
    remote = f"{s3_bucket}/store"
    before = FeatureStore(remote)
    read = before.read(range(FIRST))
    assert upsample(replace(appending(photographs, store), store=remote)) == 0
    assert upsample(appending(photographs, store)) == 0
    assert verify(VerifyConfig(store=remote)) == 0
    assert np.array_equal(FeatureStore(remote).read(range(14)), FeatureStore(store).read(range(14)))
    assert np.array_equal(before.read(range(FIRST)), read)
    assert not any(layout.GROWTH in key for key in Objects(remote).list())


def killed_before(number: int, job: UpsampleConfig) -> None:
    """Run a job in this process, which is killed before an operation of that number."""
    torch.set_num_threads(1)
    before_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert upsample(job) == 0


@pytest.mark.slow
@pytest.mark.parametrize("again", ["append", "resume"])
def test_killed_anywhere_the_same_command_completes_it(
    photographs: Path, tmp_path: Path, made: Path, again: str
) -> None:
    """A compact store with embeddings: all kinds of objects."""
    options: dict[str, Any] = {"represent": "compact", "embedding": True, "components": 2}
    images = some(photographs, tmp_path / "images", names_of(photographs)[:FIRST])
    assert upsample(config(images, tmp_path / "first", **options)) == 0
    old = chunks(tmp_path / "first", FIRST)
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["jobs.upsample_imagenet", "pipeline.run.job", "timm"])
    number, reached_the_end = 0, False
    while not reached_the_end:
        store = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "first", store)
        job = appending(photographs, store, **options)
        child = fresh.Process(target=killed_before, args=(number, job))
        child.start()
        child.join(200)
        assert child.exitcode in (0, -signal.SIGKILL)
        reached_the_end = child.exitcode == 0
        opened = FeatureStore(store)
        assert [opened.read_chunks([row])[0].features for row in range(FIRST)] == old
        begun = len(opened) > FIRST or Objects(store).list(layout.GROWTH)
        if again == "resume" and begun:
            job = replace(job, append=False, resume=True)
        assert upsample(job) == 0
        check_clean(store, 14)
        assert chunks(store, FIRST) == old
        shutil.rmtree(store)
        number += 1
    assert number > 20

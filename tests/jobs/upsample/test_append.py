"""The main job with --append: new images become rows at the end, and nothing else changes."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore, layout
from densefeat.command_line import main
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.store.converting.convert import DenseStorage, convert
from tests.helpers.datasets import tar_info, write_tar
from tests.helpers.upsample_jobs import FIRST, appending, check_clean, chunks, config, names_of, shard_bytes, some

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


def test_a_store_that_grew_is_converted(photographs: Path, tmp_path: Path, store: Path) -> None:
    assert upsample(appending(photographs, store)) == 0
    source, target = FeatureStore(store), tmp_path / "converted"
    convert(source, Objects(target), DenseStorage("float16", 0.1, 5), resume=False, threads=2)
    converted = check_clean(target, 14)
    assert converted.attributes["appended"] == source.attributes["appended"]
    assert np.allclose(converted.read(range(14)), source.read(range(14)), rtol=1e-3)

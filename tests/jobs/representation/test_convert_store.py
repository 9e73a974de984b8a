"""A dense store made of another one: the same features, rows and reasons."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from densefeat import FeatureStore, MissingFeatures, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from jobs.convert_store import ConvertConfig, convert
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from schemas.options import UpsampleConfig
from tests.helpers.photographs import photo
from tests.helpers.upsample_jobs import config, shard_bytes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["compact", "half", "dense"])
def made(request: pytest.FixtureRequest, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> UpsampleConfig:
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for path in sorted(photographs.rglob("*.png"))[:9]:
        (folder / "images" / path.name).symlink_to(path)
    (folder / "images" / "04broken.jpg").write_bytes(photo()[:200])
    job = config(
        folder / "images", folder / "store", represent=request.param, embedding=True, max_failed_share=0.5,
        error_floor=0.01,
    )  # fmt: skip
    assert upsample(job) == 0
    return job


def conversion(made: UpsampleConfig, output: Path, **options: Any) -> ConvertConfig:
    steps = {} if options.get("dtype") == "float16" else {"error_floor": 0.01}
    return ConvertConfig(store=made.store, output=str(output), shard_images=3, **steps, **options)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_features_rows_and_reasons_are_kept(made: UpsampleConfig, tmp_path: Path, dtype: str) -> None:
    assert convert(conversion(made, tmp_path / "dense", dtype=dtype)) == 0
    assert verify(VerifyConfig(store=str(tmp_path / "dense"))) == 0
    old, new = FeatureStore(made.store), FeatureStore(str(tmp_path / "dense"))
    assert problems(new) == []
    assert new.compact is None
    assert (new.shape, new.layout.image_shape, new.layout.dtype) == (old.shape, old.shape, dtype)
    kept = [name for name in old.index.column_names if not name.startswith("chunk_")]
    assert new.index.select(kept).equals(old.index.select(kept))
    for row in old.rows_with_features.tolist():
        a, b = new.read(row), old.read(row)
        allowed = 1e-3 * np.abs(b) + 1e-4 if new.step is None else 0.51 * new.step[:, None, None]
        assert (np.abs(a - b) <= allowed).mean() > 0.999  # the others are clipped
        assert np.array_equal(new.embedding(row), old.embedding(row))
    with pytest.raises(MissingFeatures, match="corrupt"):
        new.read("04broken.jpg")
    assert np.array_equal(new.components, old.components)
    values = zarr.open_group(str(tmp_path / "dense"), mode="r")["features"][0]
    assert values.shape == old.shape
    storage = new.attributes["configuration"]["storage"]
    assert storage["converted_from"] == f"{made.represent} int8"
    assert "represent" not in storage


@pytest.mark.parametrize(
    "made", ["compact", *(pytest.param(name, marks=pytest.mark.slow) for name in ("half", "dense"))], indirect=True
)
def test_a_killed_conversion_goes_on(made: UpsampleConfig, tmp_path: Path) -> None:
    """Killed before one of its writes after the other, and continued, it makes the same bytes as at once."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert convert(conversion(made, whole)) == 0
    program = (
        "import itertools, os, signal; from densefeat.storage.objects import Objects\n"
        "from jobs.convert_store import ConvertConfig, convert\n"
        "counted, create = itertools.count(), Objects.create\n"
        "def create_or_die(self, key, data):\n"
        f"    if next(counted) == {{number}}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    create(self, key, data)\n"
        "Objects.create = create_or_die\n"
        f"convert(ConvertConfig(store={made.store!r}, output={str(killed)!r}, error_floor=0.01, shard_images=3, "
        "resume=True))"
    )
    for number in (1, 6, 12):
        command = [sys.executable, "-c", program.format(number=number)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == -signal.SIGKILL
    assert convert(conversion(made, killed, resume=True)) == 0
    assert shard_bytes(killed, "embedding") == shard_bytes(whole, "embedding")


def test_no_space_is_said_before_a_shard_is_written(
    made: UpsampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first from a sample of rows; for the rest of a begun store, from the shards that are done."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for output in (whole, begun):
        assert convert(conversion(made, output)) == 0
    nbytes = sum(sum(Objects(str(whole)).list(f"{array}/c").values()) for array in ("features", "embedding"))
    for path in (begun / layout.MANIFEST, begun / layout.shard_key(1)):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file()}
    usage = shutil.disk_usage(tmp_path)
    refused = pytest.raises(JobError, match=r"no space for .* needed, .* free; free some, and .* with --resume")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(0.8 * nbytes)))
    with refused:
        convert(conversion(made, tmp_path / "new"))
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with refused:
        convert(conversion(made, begun, resume=True))
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.2 * nbytes)))
    assert convert(conversion(made, tmp_path / "new", resume=True)) == 0
    assert convert(conversion(made, begun, resume=True)) == 0


def test_other_stores_are_not_touched(made: UpsampleConfig, tmp_path: Path) -> None:
    assert convert(conversion(made, tmp_path / "dense")) == 0
    with pytest.raises(JobError, match=r"there is a store at .* choose another --output, or continue it with --resume"):
        convert(conversion(made, tmp_path / "dense"))
    with pytest.raises(JobError, match=r'is another one: storage.dtype: stored "int8", asked "float16"'):
        convert(conversion(made, tmp_path / "dense", dtype="float16", resume=True))
    with pytest.raises(JobError, match="converted_from"):
        upsample(UpsampleConfig(**{**vars(made), "store": str(tmp_path / "dense"), "resume": True}))


def test_a_store_within_a_store_is_refused(made: UpsampleConfig, tmp_path: Path) -> None:
    for output in (Path(made.store) / "dense", Path(made.store), Path(made.store).parent):
        with pytest.raises(JobError, match="are the same place, or one is in the other"):
            convert(conversion(made, output))
    with pytest.raises(ValueError, match="--shard-images must be at most 1048576"):
        ConvertConfig(store=made.store, output=str(tmp_path / "dense"), shard_images=10**9)
    for options, words in (
        ({"error_floor": 1.5}, "at most 1"),
        ({"error_floor": 0.1, "dtype": "float16"}, "for --dtype"),
    ):
        with pytest.raises(ValueError, match=f"--error-floor .*{words}"):
            ConvertConfig(store=made.store, output=str(tmp_path / "dense"), **options)


def test_an_unfinished_store_is_refused(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", represent="compact", shards="0:1")
    upsample(job)
    with pytest.raises(JobError, match="is not finished: finish it first, with --resume"):
        convert(conversion(job, tmp_path / "dense"))
    assert not (tmp_path / "dense").exists()

"""The main job in parts: resumed, after failures and damage, by two jobs, on an object store."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore
from densefeat.errors import StorageUnavailable
from jobs.fit_pca import fit_pca
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.run.shard_worker import ShardWorker
from schemas.options import FitPcaConfig
from tests.helpers.upsample_jobs import config, shard_bytes


def test_resuming_completes_with_the_same_bytes(photographs: Path, tmp_path: Path) -> None:
    whole, parts = config(photographs, tmp_path / "whole"), config(photographs, tmp_path / "parts", resume=True)
    assert upsample(whole) == 0
    assert upsample(replace(parts, shards="1:3")) == 0
    unfinished = FeatureStore(parts.store)
    assert unfinished.index["status"].to_pylist().count("pending") == 6
    # An object that was changed, and one without its record.
    shard = Path(parts.store, "features/c/1/0/0/0")
    shard.write_bytes(shard.read_bytes()[:-3])
    Path(parts.store, "_ledger/000002.parquet").unlink()
    assert upsample(parts) == 0
    assert shard_bytes(Path(parts.store)) == shard_bytes(Path(whole.store))
    assert FeatureStore(parts.store).index.equals(FeatureStore(whole.store).index)
    # Nothing left to do: nothing is done.
    before = {path: path.stat().st_mtime_ns for path in Path(parts.store, "features/c").rglob("*")}
    assert upsample(parts) == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path(parts.store, "features/c").rglob("*")}


def test_a_resume_keeps_the_shards_it_finds(photographs: Path, tmp_path: Path) -> None:
    whole, parts = config(photographs, tmp_path / "whole"), config(photographs, tmp_path / "parts")
    assert upsample(whole) == 0
    assert upsample(replace(parts, shards="1:3")) == 0
    assert upsample(replace(parts, shard_images=None, resume=True)) == 0
    assert shard_bytes(Path(parts.store)) == shard_bytes(Path(whole.store))
    with pytest.raises(JobError, match="shard_images"):
        upsample(replace(parts, shard_images=5, resume=True))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StorageUnavailable("s3://photos did not answer: 503"), "s3://photos did not answer: 503"),
        (ValueError("a fault"), "ValueError: a fault"),
    ],
)
def test_a_shard_that_fails_is_given_up_by_this_run_and_made_by_the_next(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    job = config(photographs, tmp_path / "store", attempts=1)
    make_shard = ShardWorker.make_shard

    def failing(worker: ShardWorker, store: Any, shard: int, *arguments: Any) -> Any:
        if shard == 2:
            raise error
        return make_shard(worker, store, shard, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWorker, "make_shard", failing)
        assert upsample(job) == 1
    assert f"given up    shard 2: tried 1 times; the last time: {reason}" in caplog.text
    assert "not done    1 shards: run the same command with --resume to compute them" in caplog.text
    assert upsample(replace(job, resume=True)) == 0
    assert set(FeatureStore(job.store).index["status"].to_pylist()) == {"ok"}


def test_damage_is_found_and_mended(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "store", resume=True)
    assert upsample(job) == 0
    undamaged = shard_bytes(Path(job.store))
    shard = Path(job.store, "features/c/2/0/0/0")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert verify(VerifyConfig(store=job.store)) == 1
    assert verify(VerifyConfig(store=job.store, repair=True)) == 1
    assert upsample(job) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    assert shard_bytes(Path(job.store)) == undamaged


def test_two_jobs_share_a_store(photographs: Path, tmp_path: Path) -> None:
    """Started at the same moment: one sets the store up, the other joins it."""
    jobs = [config(photographs, tmp_path / "store", resume=True, shards=shards) for shards in (":2", "2:")]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(upsample, jobs)) == [0, 0]
    assert FeatureStore(str(tmp_path / "store")).index["status"].to_pylist() == ["ok"] * 14
    assert verify(VerifyConfig(store=str(tmp_path / "store"))) == 0


@pytest.mark.s3
def test_from_s3_to_s3(photographs: Path, tmp_path: Path, s3_bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).put(str(photographs), f"{s3_bucket}/images", recursive=True)
    job = config(f"{s3_bucket}/images", f"{s3_bucket}/store", resume=True)
    local = config(photographs, tmp_path / "store")
    assert upsample(replace(job, shards=":2")) == 0
    assert upsample(job) == 0
    assert upsample(local) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    remote = FeatureStore(job.store)
    assert np.array_equal(remote.read("b/05.png"), FeatureStore(local.store).read("b/05.png"))
    assert remote.keys == FeatureStore(local.store).keys
    with pytest.raises(JobError, match="exists"):
        upsample(replace(job, resume=False))
    features = {name: getattr(job, name) for name in FitPcaConfig.__dataclass_fields__ if hasattr(job, name)}
    basis = f"{s3_bucket}/bases/basis.npz"
    assert fit_pca(FitPcaConfig(**features, output=basis)) == 0
    assert upsample(replace(local, pca=basis, overwrite=True)) == 0
    assert np.array_equal(FeatureStore(local.store).components, remote.components)

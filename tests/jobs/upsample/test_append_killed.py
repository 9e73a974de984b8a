"""The main job with --append while others work on the store or read it, and killed anywhere."""

import json
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
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from pipeline.store.lease import Lease
from schemas.options import UpsampleConfig
from tests.helpers.killing import before_operation
from tests.helpers.upsample_jobs import FIRST, appending, check_clean, chunks, config, names_of, some


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

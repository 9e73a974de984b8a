"""The tasks that a driver sends, and batches that do not fit in a device's memory."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typing_extensions import override

from densefeat import FeatureStore
from densefeat.storage.objects import Objects
from pipeline.errors import ImageError
from pipeline.images.batches import Batch
from pipeline.run.feature_worker import Result
from pipeline.run.make_shards import _ShardTasks, make_shards
from pipeline.run.planning.plan import make_plan
from pipeline.run.preparation.prepare import prepare
from pipeline.run.shard_worker import ShardWorker
from pipeline.run.workers import InlineWorkers
from pipeline.store.layout import finish
from schemas.index import REFERENCES
from tests.helpers.photographs import write_random_images
from tests.helpers.upsample_jobs import config


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_random_images(tmp_path / "images", 11)


def test_a_task_has_the_references_of_its_shard_and_no_others(images: Path, tmp_path: Path) -> None:
    """Arrow pickles a whole table with a slice of it: 124 MB with every shard of ImageNet."""
    plan = make_plan(config(images, tmp_path / "store"))
    rows = 100_000
    columns = [[f"key {i}" for i in range(rows)], [f"uri {i}" for i in range(rows)], *([range(rows)] * 3)]
    many = pa.table([pa.array(column) for column in columns], schema=REFERENCES)
    plan = replace(plan, references=many, features=replace(plan.features, rows=rows))
    tasks = _ShardTasks(plan, Objects(str(tmp_path)), None, range(plan.features.shards), {7: {1: "crashed"}})  # type: ignore[arg-type]
    assert len(tasks) == plan.features.shards == 25_000
    _, shard, references, _, crashed = tasks[7]
    assert (shard, references["key"].to_pylist(), crashed) == (7, [f"key {i}" for i in range(28, 32)], {1: "crashed"})
    assert len(pickle.dumps(tasks[7])) < 20_000


class SmallMemory(ShardWorker):
    """A device whose memory is full with more than two images, as the real one says it."""

    @override
    def in_parts_that_fit(self, batch: Batch, compute: Callable[[Batch], Result]) -> list[Result]:
        def limited(part: Batch) -> Result:
            if len(part.decoded) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return compute(part)

        return super().in_parts_that_fit(batch, limited)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, embedding: bool
) -> None:
    (images / "03b.png").write_bytes(b"broken")
    one = made_by(ShardWorker, images, tmp_path / "at once", embedding)
    other = made_by(SmallMemory, images, tmp_path / "halved", embedding)
    assert caplog.text.count("8 images do not fit in the memory of cpu: going on with 4 at once") == 1
    assert caplog.text.count("4 images do not fit in the memory of cpu: going on with 2 at once") == 1
    statuses = one.index["status"].to_pylist()
    assert other.index["status"].to_pylist() == statuses
    assert statuses.count("ok") == len(statuses) - 1
    for row, status in enumerate(statuses):
        if status == "ok":
            np.testing.assert_allclose(other.read(row), one.read(row), rtol=1e-2, atol=1e-3 * abs(one.read(row)).max())
            if embedding:
                np.testing.assert_allclose(other.embedding(row), one.embedding(row), rtol=1e-2, atol=1e-3)


def test_one_image_that_does_not_fit_is_an_error(images: Path, tmp_path: Path) -> None:
    plan = make_plan(config(images, tmp_path / "store"))
    worker = ShardWorker(plan.spec.on("cpu", 1), plan.stages)

    def full(part: Batch) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        worker.in_parts_that_fit(Batch(torch.zeros(5, 3, 8, 8), [ImageError("corrupt", "")] * 5), full)


def made_by(kind: type[ShardWorker], images: Path, store: Path, embedding: bool) -> FeatureStore:
    plan = make_plan(config(images, store, batch_size=8, shard_images=16, dtype="float16", embedding=embedding))
    with InlineWorkers(plan.spec, make=partial(kind, stages=plan.stages)) as workers:
        objects = Objects(str(store))
        encoding = prepare(plan, objects, workers)
        made, given_up = make_shards(plan, objects, workers, encoding, list(plan.shards), [])
    assert given_up == {}
    finish(objects, list(made.values()))
    return FeatureStore(str(store))

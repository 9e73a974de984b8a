"""Samples: spread whatever the dataset's period, going on until enough is usable, merged to the same bits."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError, JobError
from pipeline.features.pca import Moments
from pipeline.images.batches import Batch
from pipeline.images.decoding.decode import Decoded
from pipeline.images.sample import FixedTree, Part, next_wave, sample_rows, usable_images
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.preparation.gather import gather
from pipeline.run.workers import TaskFailed
from pipeline.store.calibration import Calibration
from tests.helpers.stores import references


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(0, 400))
def test_rows_follow_one_another_in_a_fixed_order(rows: int, count: int, first: int) -> None:
    everything = sample_rows(rows, rows)
    assert everything == list(range(rows))
    before, chosen = sample_rows(rows, first), sample_rows(rows, count, first)
    assert chosen == sorted(chosen)
    assert len(chosen) == max(0, min(count, rows - first))
    assert not {*before} & {*chosen}
    assert {*before, *chosen} == {*sample_rows(rows, first + count)}


@pytest.mark.parametrize("period", [*range(2, 13), 16, 32, 64, 125, 1000])
@pytest.mark.parametrize("images", [32, 2000])
def test_no_period_of_a_dataset_hides_its_images(period: int, images: int) -> None:
    """One row in ``period`` is usable: the sample meets about as many of them as chance would."""
    rows = max(images * 10, 64 * period)
    for phase in {0, 1, period - 1}:
        usable = sum(row % period == phase for row in sample_rows(rows, images))
        expected = images / period
        assert abs(usable - expected) <= 5 * np.sqrt(expected) + 1


def test_a_sample_is_spread_over_the_dataset() -> None:
    counts, _ = np.histogram(sample_rows(100_000, 2000), bins=10, range=(0, 100_000))
    assert counts.min() > 150
    assert counts.max() < 250


@given(st.integers(1, 300), st.integers(0, 40), st.lists(st.booleans(), min_size=300, max_size=300))
def test_waves_go_on_until_enough_is_usable(rows: int, wanted: int, usable: list[bool]) -> None:
    tried: list[int] = []
    while wave := next_wave(rows, wanted, len(tried), sum(usable[row] for row in tried)):
        tried += wave
    assert len(tried) == len({*tried})
    found = sum(usable[row] for row in tried)
    goal = min(wanted, rows) or rows
    assert found >= goal or len(tried) == min(rows, 16 * goal)


@dataclass(frozen=True)
class Order:
    """Sums that remember how they were merged."""

    text: str

    def merged(self, other: "Order") -> "Order":
        return Order(f"({self.text}{other.text})")


@given(st.integers(1, 70), st.randoms(use_true_random=False))
def test_parts_are_merged_in_one_tree_whatever_their_order(parts: int, chance: random.Random) -> None:
    def merged(order: Sequence[int]) -> Part[Order]:
        tree = FixedTree[Order](parts)
        for position in order:
            tree.add(position, Part(Order(f"{position},"), 1, None))
        return tree.root

    in_order = merged(range(parts))
    assert merged(chance.sample(range(parts), parts)) == in_order
    assert in_order.images == parts
    assert in_order.sums.text.replace("(", "").replace(")", "") == "".join(f"{i}," for i in range(parts))


def test_a_part_that_is_late_leaves_few_waiting() -> None:
    tree = FixedTree[Order](40_000)
    for position in range(1, 40_000):
        tree.add(position, Part(Order(""), 1, None))
    assert tree.waiting <= 16
    tree.add(0, Part(Order(""), 1, None))
    assert tree.root.images == 40_000


@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_moments_and_calibrations_come_to_the_same_bits(parts: int, chance: random.Random) -> None:
    rng = np.random.default_rng(chance.randrange(2**32))
    features = [torch.from_numpy(rng.normal(size=(1, 3, 2, 2))) for _ in range(parts)]
    everything = torch.ones(1, 2, 2, dtype=torch.bool)

    def merged(order: Sequence[int], part: Callable[[int], Any]) -> Any:
        tree = FixedTree[Any](parts)
        for position in order:
            tree.add(position, Part(part(position), 1, None))
        return tree.root.sums

    shuffled = chance.sample(range(parts), parts)
    one, other = (merged(o, lambda i: Moments.of(features[i], everything)) for o in (range(parts), shuffled))
    assert np.array_equal(one.scatter, other.scatter)
    vectors = torch.cat(features).movedim(1, -1).reshape(-1, 3)
    assert np.allclose(one.mean, vectors.mean(0))
    assert np.allclose(one.scatter, ((vectors - vectors.mean(0)).T @ (vectors - vectors.mean(0))))
    one, other = (merged(o, lambda i: Calibration(np.full(2, 0.1 * i), i / 3)) for o in (range(parts), shuffled))
    assert np.array_equal(one.mean_square, other.mean_square)
    assert one.nbytes == other.nbytes


class CountingWorkers:
    """Runs ``method`` on tasks in an order of its own; an image is usable if its row says so."""

    count = 1

    def __init__(self, usable: Callable[[int], bool], failing: bool = False) -> None:
        self.usable, self.failing, self.tried = usable, failing, 0

    def share(self, value: Any) -> Any:
        return value

    def map(
        self,
        method: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        on_progress: Callable[[int], None] = lambda images: None,
    ) -> Iterator[tuple[int, Any]]:
        assert method is FeatureWorker.moments
        for task in reversed(range(len(tasks))):
            rows = [int(key[-7:-4]) for key in tasks[task][0]["key"].to_pylist()]
            self.tried += len(rows)
            on_progress(len(rows))
            usable = [row for row in rows if self.usable(row)]
            bad = next((f"row {row} is corrupt" for row in rows if not self.usable(row)), None)
            result: Any = Part(Order(""), len(usable), bad)
            yield task, TaskFailed(3, "the disk is gone") if self.failing else result


def test_gathering_goes_on_until_enough_images_are_usable() -> None:
    workers = CountingWorkers(lambda row: row % 4 == 3)
    part = gather(workers, FeatureWorker.moments, references(400), 40, images_in_task=7, what="PCA")
    assert part.images >= 40
    assert workers.tried < 250
    everything = CountingWorkers(lambda row: row % 4 == 3)
    assert gather(everything, FeatureWorker.moments, references(400), 0, images_in_task=7, what="PCA").images == 100


def test_a_sample_with_nothing_usable_is_an_error() -> None:
    workers = CountingWorkers(lambda row: False)
    with pytest.raises(JobError, match=r"calibration: none of the 512 sampled images is usable.*row 2 is corrupt"):
        gather(workers, FeatureWorker.moments, references(900), 32, images_in_task=4, what="calibration")
    with pytest.raises(JobError, match="failed 3 times: the disk is gone"):
        gather(
            CountingWorkers(bool, failing=True), FeatureWorker.moments, references(9), 2, images_in_task=4, what="PCA"
        )


def test_usable_images_are_taken_from_where_they_are() -> None:
    def batches(sample: pa.Table) -> Iterator[Batch]:
        rows = [int(key[-7:-4]) for key in sample["key"].to_pylist()]
        pixels = torch.tensor(rows, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
        good = Decoded(np.empty((3, 2, 2), np.uint8), 2, 2, (1, 0, 0, 0, 1, 0), (0, 0, 2, 2))
        yield Batch(pixels, [good if row % 2 else ImageError("corrupt", "cut off") for row in rows])

    images, error = usable_images(references(200), 24, batches)
    assert images.shape == (24, 3, 2, 2)
    assert all(int(image[0, 0, 0]) % 2 for image in images)
    assert error == "cut off"
    nothing, _ = usable_images(references(1), 24, batches)
    assert len(nothing) == 0

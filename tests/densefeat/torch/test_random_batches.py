"""Batches of random images, each in one tensor."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densefeat import TorchFeatures
from tests.helpers.stores import FAILED_ROWS, ROWS, KnownStore

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]
FORKED = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def check(known: KnownStore, batch: dict[str, Any]) -> None:
    assert batch["features"].is_contiguous()
    assert np.array_equal(batch["features"].numpy(), known.codes[batch["row"].numpy()])
    assert batch["key"] == [f"class/{row:03d}.jpg" for row in batch["row"].tolist()]
    assert batch["label"].tolist() == [row % 3 for row in batch["row"].tolist()]


@FORKED
@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_batches(known: KnownStore, workers: int) -> None:
    dataset = TorchFeatures(known.uri, dequantize=False, threads=3)
    batches = list(DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers))
    assert sorted(row for batch in batches for row in batch["row"].tolist()) == GOOD_ROWS
    for batch in batches:
        check(known, batch)


def test_a_batch_is_one_tensor_unless_samples_were_changed(known: KnownStore) -> None:
    items = [5, 0, 5, 8]
    dataset = TorchFeatures(known.uri, dequantize=False)
    loader = DataLoader(dataset, batch_size=4)
    samples = dataset.__getitems__(items)
    batch = loader.collate_fn(samples)
    check(known, batch)
    assert batch["features"].data_ptr() == samples[0]["features"].data_ptr()
    # Samples in another order, or others in their place, are stacked.
    for others in ([samples[1], samples[0]], [samples[0], samples[2]], [samples[0], dataset[1]]):
        check(known, loader.collate_fn(others))
    cropped = TorchFeatures(
        known.uri, lambda sample: {**sample, "features": sample["features"][:, 1:, :4] * 1}, threads=1
    )
    (batch,) = DataLoader(cropped, batch_size=9)
    step = 1 if known.step is None else known.step[:, None, None]
    assert np.array_equal(batch["features"].numpy(), (known.codes[GOOD_ROWS] * step).astype(np.float32)[..., 1:, :4])


def test_one_item_is_an_item_of_a_batch(known: KnownStore) -> None:
    dataset = TorchFeatures(known.uri)
    for i in (0, -1, torch.tensor(3), np.int64(4)):
        one, (same,) = dataset[i], dataset.__getitems__([i])
        assert one["row"] == same["row"] == GOOD_ROWS[int(i)]
        assert torch.equal(one["features"], same["features"])
    with pytest.raises(IndexError):
        dataset[len(GOOD_ROWS)]
    with pytest.raises(ValueError, match="threads must be at least 1"):
        TorchFeatures(known.uri, threads=0)

"""StreamingFeatures resumed in mid-epoch."""

import json
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from densefeat import StreamingFeatures
from tests.densefeat.torch.epochs import FORKED, rows_of
from tests.helpers.stores import KnownStore


@FORKED
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_with_a_stateful_loader(known8: KnownStore, workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(epoch: int) -> tuple[StreamingFeatures, Any]:
        dataset = StreamingFeatures(known8.uri, 2, request_bytes=300)
        dataset.set_epoch(epoch)
        return dataset, StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    whole = [rows_of(loader(epoch)[1]) for epoch in range(2)]
    for taken in range(len(whole[1]) + 1):
        _, first = loader(1)
        iterator = iter(first)
        assert rows_of(next(iterator) for _ in range(taken)) == whole[1][:taken]
        state = first.state_dict()
        del iterator
        dataset, second = loader(0 if taken % 2 else 1)  # the state tells the epoch
        second.load_state_dict(state)
        assert rows_of(second) == whole[1][taken:]
        dataset.set_epoch(0)
        assert rows_of(second) == whole[0]
    # At the end of an epoch: the next one is whole.
    _, first = loader(0)
    list(first)
    dataset, second = loader(1)
    second.load_state_dict(first.state_dict())
    assert rows_of(second) == whole[1]


@FORKED
def test_resuming_without_torchdata(known8: KnownStore) -> None:
    def dataset() -> StreamingFeatures:
        return StreamingFeatures(known8.uri, 2, request_bytes=300)

    first = dataset()
    first.set_epoch(3)
    whole = rows_of(first)
    for taken in range(len(whole) + 1):
        iterator = iter(first)
        for _ in range(taken):
            next(iterator)
        resumed = dataset()
        resumed.load_state_dict(first.state_dict())
        assert resumed.state_dict() == first.state_dict()
        assert rows_of(resumed) == whole[taken:]
        resumed.set_epoch(3)
        assert rows_of(resumed) == whole
    resumed.set_epoch(4)
    assert resumed.state_dict()["position"] == {"batches": 0}  # not the end of the epoch before
    # With workers, the loop says how far it is.
    whole = rows_of(DataLoader(first, batch_size=None, num_workers=2))
    for taken in range(len(whole) + 1):
        resumed = dataset()
        resumed.load_state_dict(first.state_dict(batches=taken, workers=2))
        assert rows_of(DataLoader(resumed, batch_size=None, num_workers=2)) == whole[taken:]
    with pytest.raises(ValueError, match="at most 5"):
        first.state_dict(batches=6, workers=2)


@FORKED
def test_a_state_is_used_once(known8: KnownStore) -> None:
    """By each worker, although the process of the loader keeps it; and it tells the epoch until another is set."""
    first = StreamingFeatures(known8.uri, 2, request_bytes=300)
    first.set_epoch(3)
    for workers in (0, 1, 2):
        resumed = StreamingFeatures(known8.uri, 2, request_bytes=300)
        loader = DataLoader(resumed, batch_size=None, num_workers=workers)
        of_epoch_0 = rows_of(loader)
        for _ in range(2):
            resumed.load_state_dict(first.state_dict(batches=1, workers=workers))
            assert len(rows_of(loader)) == len(first) - 1
            assert resumed.state_dict(batches=2, workers=workers) == first.state_dict(batches=2, workers=workers)
            assert rows_of(loader) == rows_of(loader) == of_epoch_0
        resumed.set_epoch(4)
        assert resumed.state_dict(batches=2, workers=workers)["epoch"] == 4


def test_states_are_json(known8: KnownStore) -> None:
    dataset = StreamingFeatures(known8.uri, np.int64(2), seed=np.int64(1), buffer_bytes=np.int64(5), crop=(4, 4))
    state = json.loads(json.dumps(dataset.state_dict(batches=np.int64(1))))
    dataset.load_state_dict(state)
    assert len(list(dataset)) == len(dataset) - 1
    for wrong in ("x", -1):
        with pytest.raises((TypeError, ValueError), match="epoch must be"):
            dataset.load_state_dict({**state, "epoch": wrong})


def test_a_state_of_something_else(known8: KnownStore) -> None:
    state = StreamingFeatures(known8.uri, 2).state_dict()
    for options, message in (
        ({"seed": 1}, "seed 0, now 1"),
        ({"batch_size": 3}, "batch_size 2, now 3"),
        ({"crop": (4, 4)}, r"crop None, now \[4, 4\]"),
        ({"box": (0, 0, 2, 2)}, r"box None, now \[0, 0, 2, 2\]"),
        ({"rows": [1, 3]}, "rows 9, now 2; rows_crc32"),
        ({"rank": 1, "world_size": 2}, "rank 0, now 1; world_size 1, now 2"),
    ):
        dataset = StreamingFeatures(known8.uri, **{"batch_size": 2, **options})
        dataset.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            next(iter(dataset))
    with pytest.raises(ValueError, match="not a state of StreamingFeatures"):
        StreamingFeatures(known8.uri).load_state_dict({"model": 1})

"""Shuffled epochs of images: each row once, over ranks and workers, and again after a resume."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from densefeat import FeatureStore, MissingFeatures, StoreError, StreamingFeatures, layout
from densefeat.torch.plan import Reader
from tests.densefeat.torch.epochs import FORKED, GOOD_ROWS, flat, rows_of
from tests.helpers.stores import FAILED_ROWS, H, KnownStore, W, make_store, set_up_store, write_known_shard


def floats(known: KnownStore, row: int) -> np.ndarray:
    codes = known.codes[row].astype(np.float32)
    return codes if known.step is None else codes * known.step[:, None, None]


def test_batches_have_the_features_of_their_rows(known: KnownStore) -> None:
    batches = list(StreamingFeatures(known.uri, 4))
    assert [len(batch["row"]) for batch in batches] == [4, 4, 1]
    assert sorted(flat(batches)) == GOOD_ROWS
    for batch in batches:
        assert batch["features"].dtype == torch.float32
        assert batch["label"].dtype == batch["row"].dtype == torch.int64
        for place, row in enumerate(batch["row"].tolist()):
            assert np.array_equal(batch["features"][place].numpy(), floats(known, row))
            assert batch["key"][place] == f"class/{row:03d}.jpg"
            assert batch["label"][place] == row % 3


def test_codes_and_transforms(known: KnownStore) -> None:
    dataset = StreamingFeatures(
        known.uri, 3, dequantize=False, transform=lambda batch: (batch["features"], batch["row"])
    )
    for codes, rows in dataset:
        assert codes.dtype == (torch.int8 if known.step is not None else torch.float16)
        assert np.array_equal(codes.numpy(), known.codes[rows.numpy()])


@pytest.mark.parametrize("dequantize", [True, False])
def test_crops(known: KnownStore, dequantize: bool) -> None:
    def crops(epoch: int, **options: Any) -> dict[int, tuple[int, ...]]:
        dataset = StreamingFeatures(known.uri, 4, dequantize=dequantize, **options)
        dataset.set_epoch(epoch)
        boxes = {}
        for batch in dataset:
            for features, row, box in zip(batch["features"], batch["row"].tolist(), batch["box"].tolist(), strict=True):
                y0, x0, y1, x1 = boxes[row] = tuple(box)
                whole = floats(known, row) if dequantize else known.codes[row]
                assert np.array_equal(features.numpy(), whole[:, y0:y1, x0:x1])
        return boxes

    drawn = [crops(epoch, crop=(5, 3)) for epoch in (0, 1)]
    assert {(y1 - y0, x1 - x0) for y0, x0, y1, x1 in drawn[0].values()} == {(5, 3)}
    assert len(set(drawn[0].values())) > 4
    assert drawn[0] != drawn[1]
    assert drawn[0] == crops(0, crop=(5, 3), threads=1, buffer_bytes=0)
    assert set(crops(0, box=(1, 2, H, 7)).values()) == {(1, 2, H, 7)}
    assert set(crops(0, crop=(H, W)).values()) == {(0, 0, H, W)}


def test_the_order_is_that_of_seed_and_epoch(known8: KnownStore) -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[list[int]]:
        dataset = StreamingFeatures(known8.uri, 2, seed=seed, request_bytes=300, **options)
        dataset.set_epoch(epoch)
        return rows_of(dataset)

    assert order(0, 0, threads=1) == order(0, 0, threads=7) == order(0, 0, dequantize=False)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 0, shuffle=False) == [[0, 1], [3, 4], [5, 6], [7, 9], [10]]
    assert sorted(row for batch in order(0, 0, rows=["class/009.jpg", 1, 4]) for row in batch) == [1, 4, 9]


def test_each_shard_is_read_once(known8: KnownStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(known8.uri)
    requests = []
    monkeypatch.setattr(
        store, "read_chunks", lambda *call: requests.append(call[0]) or FeatureStore.read_chunks(store, *call)
    )
    list(StreamingFeatures(store, 2))
    assert sorted(map(sorted, requests)) == [[0, 1, 3], [4, 5, 6, 7], [9, 10]]
    requests.clear()
    list(StreamingFeatures(store, 2, request_bytes=1))
    assert sorted(map(sorted, requests)) == [[row] for row in GOOD_ROWS]


@FORKED
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader(known8: KnownStore, start_method: str) -> None:
    dataset = StreamingFeatures(known8.uri, 2, request_bytes=300)
    list(dataset)  # the parent has used the store, and threads
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=start_method, persistent_workers=True
    )
    batches = list(loader)
    assert [len(batch["row"]) for batch in batches] == [2, 2, 2, 2, 1]
    assert len(batches) == len(loader) == len(dataset)
    assert sorted(flat(batches)) == GOOD_ROWS
    for batch in batches:
        assert np.array_equal(
            batch["features"].numpy(), np.stack([floats(known8, row) for row in batch["row"].tolist()])
        )
    dataset.set_epoch(1)  # seen by workers that are kept
    again = rows_of(loader)
    assert sorted(row for batch in again for row in batch) == GOOD_ROWS
    assert again != rows_of(batches)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.integers(1, 3), workers=st.integers(1, 3), batch_size=st.integers(2, 5),
    taken=st.integers(0, 9), rows=st.sets(st.sampled_from(GOOD_ROWS), min_size=3), buffer=st.sampled_from([0, 10**9]),
)  # fmt: skip
def test_ranks_and_workers_and_a_resume_of_any(
    known8: KnownStore, world_size: int, workers: int, batch_size: int, taken: int, rows: set[int], buffer: int
) -> None:
    store = FeatureStore(known8.uri)
    read: list[int] = []
    for rank in range(world_size):
        dataset = StreamingFeatures(
            store,
            batch_size,
            rows=sorted(rows),
            buffer_bytes=buffer,
            request_bytes=400,
            rank=rank,
            world_size=world_size,
        )
        of_workers = []
        for worker in range(workers):
            given_out = list(dataset._batches(0, Reader(rank, world_size, worker, workers), dataset._START))
            of_workers.append([batch["row"].tolist() for _, batch in given_out])
            if taken <= len(given_out):
                position = given_out[taken - 1][0] if taken else dataset._START
                rest = dataset._batches(0, Reader(rank, world_size, worker, workers), position)
                assert rows_of(batch for _, batch in rest) == of_workers[-1][taken:]
        assert sum(map(len, of_workers)) == len(dataset)
        read += [row for of_worker in of_workers for batch in of_worker for row in batch]
    assert sorted(read) == sorted(rows)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "densefeat"]


def test_no_thread_outlives_its_iterator(known8: KnownStore) -> None:
    dataset = StreamingFeatures(known8.uri, 1, request_bytes=300)
    iterator = iter(dataset)
    next(iterator)
    assert reading_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not reading_threads()
    for _ in dataset:
        break
    assert not reading_threads()
    list(dataset)
    assert not reading_threads()


def damage(known: KnownStore, shard: int, change: Callable[[Path], Any]) -> None:
    change(Path(known.uri) / layout.shard_key(shard))


@FORKED
@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-700]), r"row (6|7) .* is damaged: .* bytes are recorded"),
        (lambda path: path.unlink(), r"features/c/1/0/0/0 of row \d is missing"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), r"row 4 .* does not match its crc32c"),
    ],
    ids=["truncated", "missing", "changed"],
)
def test_a_damaged_shard_is_an_error(tmp_path: Path, workers: int, change: Any, message: str) -> None:
    known = make_store(str(tmp_path / "store"))
    damage(known, 1, change)
    with pytest.raises(StoreError, match=message):
        list(DataLoader(StreamingFeatures(known.uri, 2), batch_size=None, num_workers=workers))
    assert not reading_threads()


def test_an_unfinished_store(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    with pytest.raises(ValueError, match="no rows to read"):
        StreamingFeatures(known.uri)
    write_known_shard(known, 1)
    dataset = StreamingFeatures(known.uri, 2)
    assert sorted(flat(dataset)) == [4, 5, 6, 7]
    write_known_shard(known, 0)
    assert sorted(flat(dataset)) == [4, 5, 6, 7]  # as when it was opened
    two = StreamingFeatures(known.uri, 2, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"is unfinished: ranks .* find different rows"):
        next(iter(two))
    state = dataset.state_dict()
    more = StreamingFeatures(known.uri, 2)
    more.load_state_dict(state)
    with pytest.raises(ValueError, match="rows 4, now 7"):
        next(iter(more))
    assert len(rows_of(StreamingFeatures(known.uri, 2, rows=[0, 1, 4, 5], rank=0, world_size=2))) == 1


def test_what_is_refused(known8: KnownStore) -> None:
    with pytest.raises(MissingFeatures) as caught:
        StreamingFeatures(known8.uri, rows=[1, *FAILED_ROWS])
    assert caught.value.rows == FAILED_ROWS
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be"),
        ({"seed": -1}, "seed must be"),
        ({"buffer_bytes": -1}, "buffer_bytes must be"),
        ({"request_bytes": 0}, "request_bytes must be"),
        ({"rows": [1, 3, 1]}, "some are there twice"),
        ({"rows": []}, "no rows to read"),
        ({"uneven": "keep"}, "uneven must be"),
        ({"crop": (H + 1, 2)}, "crop must be"),
        ({"crop": (2,)}, "crop must be"),
        ({"crop": (2, 2), "box": (0, 0, 2, 2)}, "crop or box, not both"),
        ({"box": (0, 0, 0, 2)}, "box"),
        ({"rank": 1}, "both rank and world_size"),
        ({"rank": 2, "world_size": 2}, "rank must be"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingFeatures(known8.uri, **options)
    with pytest.raises(ValueError, match="epoch must be"):
        StreamingFeatures(known8.uri).set_epoch(-1)

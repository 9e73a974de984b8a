"""The order of an epoch, without a store."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densefeat.torch.plan import Plan, Reader, Runs, Uneven, batches_of_rank, piece_of_batches, piece_of_rows, plan

SHARD_ROWS, ROW_BYTES = 7, 100


@st.composite
def epochs(draw: st.DrawFn) -> tuple[Runs, int, int, int]:
    """Rows of a store of which some failed, numbers of ranks and workers, and a batch size."""
    rows = np.array(sorted(draw(st.sets(st.integers(0, 60), min_size=1))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    nbytes = rng.integers(1, ROW_BYTES, 61)
    offsets = np.concatenate([np.cumsum(part) - part for part in np.split(nbytes, range(SHARD_ROWS, 61, SHARD_ROWS))])
    request_bytes = draw(st.sampled_from([1, 150, 10**6]))
    runs = Runs.of(rows, rows // SHARD_ROWS, offsets[rows], nbytes[rows], request_bytes)
    return runs, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))


def readers(world_size: int, workers: int) -> list[list[Reader]]:
    return [[Reader(rank, world_size, worker, workers) for worker in range(workers)] for rank in range(world_size)]


def planned(runs: Runs, reader: Reader, batch_size: int, uneven: Uneven, buffer: int = 300) -> tuple[Plan, np.ndarray]:
    start, sizes = piece_of_batches(len(runs.rows), reader, batch_size, uneven)
    return plan(runs, reader, (start, int(sizes.sum())), (5, 1), buffer), sizes


def possible(rows: int, world_size: int, batch_size: int, uneven: Uneven) -> bool:
    """Whether the ranks can deal the rows out: all agree, or some would wait for others."""
    refused = 0
    for rank in range(world_size):
        try:
            batches_of_rank(rows, rank, world_size, batch_size, uneven)
        except ValueError:
            refused += 1
    assert refused in (0, world_size)
    return refused == 0


@settings(max_examples=300, deadline=None)
@given(epochs(), st.sampled_from(["balance", "pad", "drop"]))
def test_every_row_is_read_once_by_one_reader(epoch: tuple[Runs, int, int, int], uneven: Uneven) -> None:
    runs, world_size, workers, batch_size = epoch
    rows = len(runs.rows)
    if not possible(rows, world_size, batch_size, uneven):
        # Refused only where it cannot be done.
        assert {
            "balance": rows < world_size or (batch_size == 1 and rows % world_size),
            "drop": rows < world_size * batch_size,
            "pad": False,
        }[uneven]
        return
    plans = [[planned(runs, reader, batch_size, uneven) for reader in rank] for rank in readers(world_size, workers)]
    read = np.concatenate([plan.rows for plan, _ in itertools.chain(*plans)])
    counts = np.bincount(read, minlength=61)
    assert counts.sum() == counts[runs.rows].sum()
    if uneven == "balance":
        assert (counts[runs.rows] == 1).all()
    elif uneven == "pad":
        assert (counts[runs.rows] >= 1).all()
        assert len(read) - rows < world_size
    else:
        assert (counts <= 1).all()
        assert rows - len(read) < world_size * batch_size
    batches = [sum(len(sizes) for _, sizes in rank) for rank in plans]
    assert len(set(batches)) == 1
    for rank in plans:
        sizes = [sizes[turn] for turn in range(batches[0]) for _, sizes in rank if turn < len(sizes)]
        assert len(sizes) == batches[0]
        assert 1 <= min(sizes) <= max(sizes) <= batch_size
        assert set(sizes[:-2]) <= {batch_size}
        if uneven == "drop":
            assert set(sizes) == {batch_size}


@settings(max_examples=200, deadline=None)
@given(epochs(), st.sampled_from([0, 50, 300, 10**6]))
def test_requests_and_memory_are_bounded(epoch: tuple[Runs, int, int, int], buffer: int) -> None:
    runs, world_size, workers, _ = epoch
    size = dict(zip(runs.rows.tolist(), runs.nbytes.tolist(), strict=True))
    largest = max(int(runs.nbytes[a:b].sum()) for a, b in itertools.pairwise(runs.starts))
    requests = 0
    for reader in itertools.chain(*readers(world_size, workers)):
        rows = plan(runs, reader, piece_of_rows(len(runs.rows), reader), (5, 1), buffer)
        requests += len(set(rows.request.tolist()))
        read: set[int] = set()
        out: set[int] = set()
        for row, request in zip(rows.rows.tolist(), rows.request.tolist(), strict=True):
            read |= {int(other) for other in rows.rows[rows.request <= request]}
            out.add(row)
            assert sum(size[row] for row in read - out) <= buffer + largest
        for request in set(rows.request.tolist()):
            of_request = np.sort(rows.rows[rows.request == request])
            assert len({row // SHARD_ROWS for row in of_request.tolist()}) == 1
            places = np.searchsorted(runs.rows, of_request)
            assert (np.diff(places) == 1).all()
    assert requests <= len(runs.starts) - 1 + world_size * workers - 1


@settings(max_examples=50, deadline=None)
@given(epochs())
def test_without_shuffling_rows_are_in_the_order_of_the_store(epoch: tuple[Runs, int, int, int]) -> None:
    runs, world_size, workers, _ = epoch
    pieces = [
        plan(runs, reader, piece_of_rows(len(runs.rows), reader), None, 300).rows
        for reader in itertools.chain(*readers(world_size, workers))
    ]
    assert np.array_equal(np.concatenate(pieces), runs.rows)


def test_runs_end_where_a_request_would_read_much_for_nothing() -> None:
    offsets = np.array([0, 10, 20, 30 + (1 << 20), 41 + (2 << 20)])
    runs = Runs.of(np.arange(5), np.zeros(5, int), offsets, np.full(5, 10), 10**9)
    assert runs.starts.tolist() == [0, 4, 5]


def test_an_epoch_is_mixed_and_epochs_differ() -> None:
    rows = np.arange(4096)
    runs = Runs.of(rows, rows // 64, rows % 64 * 100, np.full(4096, 100), 800)
    orders = [plan(runs, Reader(), (0, 4096), (0, epoch), 100 * 512).rows for epoch in (0, 1)]
    assert (orders[0] == orders[1]).mean() < 0.01
    # A batch of 32 has images of many of the runs of 8, as a quarter of the rows are shuffled at a time.
    runs_of_batches = [len(set((batch // 8).tolist())) for batch in orders[0].reshape(-1, 32)]
    assert np.median(runs_of_batches) > 20
    assert np.array_equal(plan(runs, Reader(), (0, 4096), (0, 1), 100 * 512).rows, orders[1])


@pytest.mark.parametrize(
    ("rows", "world_size", "batch_size", "uneven", "message"),
    [
        (3, 4, 8, "balance", "3 rows on 4 ranks .* larger batch_size"),
        (5, 2, 1, "balance", "5 rows on 2 ranks in batches of 1"),
        (15, 2, 8, "drop", "15 rows are not one batch of 8 for each of 2 ranks"),
    ],
)
def test_what_cannot_be_dealt_out(rows: int, world_size: int, batch_size: int, uneven: Uneven, message: str) -> None:
    for rank in range(world_size):
        with pytest.raises(ValueError, match=message):
            batches_of_rank(rows, rank, world_size, batch_size, uneven)

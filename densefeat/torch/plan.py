"""The order of an epoch: which rows a worker of a rank reads, with which requests, and in which order they come out.

It is decided before anything is read, from the index, the seed and the epoch alone. The rows of a store are cut into
runs that one request reads. An epoch is a permutation of the runs; every rank gets an equal piece of it, and every
worker of a rank a piece of that, so that a run is cut only where a piece ends. Within its piece, a worker shuffles
rows over a window of bytes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Plan", "Reader", "Runs", "Uneven", "batches_of_rank", "piece_of_batches", "piece_of_rows", "plan"]

Integers = npt.NDArray[np.int64]
Uneven = Literal["balance", "drop", "pad"]

_GAP_BYTES = 1 << 20  # reading over a gap of this size costs less than another request


@dataclass(frozen=True)
class Reader:
    """One of the processes that share an epoch.

    Attributes:
        rank: 0 … world_size − 1.
        world_size: number of ranks, the training processes.
        worker: 0 … workers − 1.
        workers: number of workers of this rank's loader; 1 if it has none.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Runs:
    """Rows in the order of their bytes, in runs of one shard that one request reads.

    Attributes:
        rows: [n] rows of the store.
        nbytes: [n] size of each row's chunk.
        starts: [runs + 1] places in ``rows``: run r has ``rows[starts[r]:starts[r + 1]]``.
    """

    rows: Integers
    nbytes: Integers
    starts: Integers

    @classmethod
    def of(cls, rows: Integers, shards: Integers, offsets: Integers, nbytes: Integers, request_bytes: int) -> "Runs":
        """Cut rows [n], at these places in their shard objects, into runs of about ``request_bytes``."""
        order = np.lexsort((offsets, shards))
        rows, shards, offsets, nbytes = rows[order], shards[order], offsets[order], nbytes[order]
        gaps = offsets[1:] - (offsets + nbytes)[:-1]
        cut = (np.diff(shards) != 0) | (np.diff(offsets // request_bytes) != 0) | (gaps > _GAP_BYTES)
        return cls(rows, nbytes, np.concatenate([[0], np.flatnonzero(cut) + 1, [len(rows)]]))

    def sequence(self, rng: np.random.Generator | None) -> tuple[Integers, Integers]:
        """Places in ``rows`` in the order of an epoch, runs shuffled by ``rng``; and the run of each."""
        runs = np.arange(len(self.starts) - 1)
        if rng is not None:
            runs = rng.permutation(runs)
        lengths = np.diff(self.starts)[runs]
        first = np.cumsum(lengths) - lengths
        return np.repeat(self.starts[runs] - first, lengths) + np.arange(len(self.rows)), np.repeat(runs, lengths)


@dataclass(frozen=True)
class Plan:
    """What one reader reads, and the order in which its rows come out.

    Attributes:
        rows: [n] rows of the store, in this order.
        request: [n] number of the request that reads each.
    """

    rows: Integers
    request: Integers

    def after(self, done: int) -> "Plan":
        """The plan without its first ``done`` rows."""
        return Plan(self.rows[done:], self.request[done:])


def batches_of_rank(rows: int, rank: int, world_size: int, batch_size: int, uneven: Uneven) -> tuple[int, Integers]:
    """The place in the epoch at which a rank's piece begins, and the sizes of its batches [batches].

    Every rank has the same number of batches. Places count modulo ``rows``, where ranks are padded.

    Raises:
        ValueError: that is impossible for so few rows.
    """
    fewest, most = rows // world_size, -(-rows // world_size)
    batches = rows // (world_size * batch_size) if uneven == "drop" else -(-most // batch_size)
    if batches == 0:
        raise ValueError(
            f"{rows:,} rows are not one batch of {batch_size:,} for each of {world_size} ranks: use a smaller "
            'batch_size, or uneven="balance"'
        )
    sizes = np.full(batches, batch_size, dtype=np.int64)
    if uneven == "drop":
        return rank * batches * batch_size, sizes
    if uneven == "pad":
        start, count = rank * most, most
    else:
        start = rank * rows // world_size
        count = (rank + 1) * rows // world_size - start
        if fewest == (batches - 1) * batch_size and (batches == 1 or batch_size == 1):  # refused by all ranks
            raise ValueError(
                f"{rows:,} rows on {world_size} ranks in batches of {batch_size:,} cannot be the same number of "
                'batches on every rank: use a larger batch_size, or uneven="pad" or "drop"'
            )
    sizes[-1] = count - (batches - 1) * batch_size
    if sizes[-1] == 0:  # other ranks have one row more, in a batch of its own
        sizes[-2:] = batch_size - batch_size // 2, batch_size // 2
    return start, sizes


def piece_of_batches(rows: int, reader: Reader, batch_size: int, uneven: Uneven) -> tuple[int, Integers]:
    """The place at which a worker's piece begins, and the sizes of its batches [batches].

    A loader takes batches from its workers in turn: batch i of the rank is of worker i modulo the number of workers.
    """
    start, sizes = batches_of_rank(rows, reader.rank, reader.world_size, batch_size, uneven)
    before = sum(int(sizes[worker :: reader.workers].sum()) for worker in range(reader.worker))
    return start + before, sizes[reader.worker :: reader.workers]


def piece_of_rows(rows: int, reader: Reader) -> tuple[int, int]:
    """The place at which a worker's piece begins, and its length, if all workers share rows evenly."""

    def cut(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
        return start + part * (stop - start) // parts, start + (part + 1) * (stop - start) // parts

    start, stop = cut(*cut(0, rows, reader.rank, reader.world_size), reader.worker, reader.workers)
    return start, stop - start


def plan(runs: Runs, reader: Reader, piece: tuple[int, int], seed: tuple[int, int] | None, buffer_bytes: int) -> Plan:
    """What a reader reads.

    Args:
        runs: the rows of the epoch.
        reader: who reads.
        piece: the place at which its piece of the epoch begins, and the number of rows.
        seed: (seed, epoch); None: in the order of the store.
        buffer_bytes: a row comes out at most this many bytes later than it is read. At most so many bytes of read
            rows wait.
    """
    start, length = piece
    places = (start + np.arange(length)) % len(runs.rows)
    sequence, run_of = runs.sequence(None if seed is None else np.random.default_rng(seed))
    read, run = sequence[places], run_of[places]
    ends = (np.diff(run) != 0) | (np.diff(read) != 1)
    request = np.concatenate([np.zeros(min(1, length), np.int64), np.cumsum(ends)])
    if seed is None:
        return Plan(runs.rows[read], request)
    parts = (reader.rank, reader.world_size, reader.worker, reader.workers)
    nbytes = runs.nbytes[read]
    delays = np.random.default_rng([*seed, *parts]).uniform(0, buffer_bytes, length)
    order = np.argsort(np.cumsum(nbytes) - nbytes + delays, kind="stable")
    return Plan(runs.rows[read[order]], request[order])

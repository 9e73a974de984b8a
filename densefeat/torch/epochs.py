"""Epochs over rows of a store, shared by ranks and workers: which one this process is, and where it stands."""

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from densefeat.arguments import whole_number
from densefeat.store import FeatureStore
from densefeat.torch.plan import Reader, Runs

__all__ = ["Epochs", "check_least"]

_MOST_WORKERS = 4096  # of a loader that can resume

Batch = dict[str, Any]
State = dict[str, Any]


class Epochs(IterableDataset[Batch]):
    """Iterable dataset of batches of a store's rows. Base of ``StreamingFeatures`` and ``PixelFeatures``.

    Subclasses implement ``_batches``; ``_START`` is the position at the start of an epoch.

    Args:
        store: a ``FeatureStore``, or its location.
        rows: rows or keys, each once; None: all rows with features.
        seed: at least 0.
        request_bytes: about how much one request reads.
        rank: of this training process, 0 … world_size − 1.
        world_size: number of training processes. None, as ``rank``: from ``torch.distributed`` if it is initialized
            when iteration begins, else from the environment variables RANK and WORLD_SIZE, which torchrun sets, else
            one process.
    """

    _START: ClassVar[dict[str, int]]

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        rows: Iterable[int | str] | None,
        seed: int,
        request_bytes: int,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        check_least({"seed": (seed, 0), "request_bytes": (request_bytes, 1)})
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.seed, self.request_bytes = int(seed), int(request_bytes)  # numpy's are no JSON
        self.rows = self.store.rows_with_features if rows is None else self.store.checked_rows(rows)
        if len(self.rows) == 0:
            raise ValueError(f"{self.store.uri}: there are no rows to read: none has features, or rows is empty")
        if len(np.unique(self.rows)) < len(self.rows):
            raise ValueError("rows must be different rows: some are there twice")
        # Not the rows of another process, which may open an unfinished store later and find more.
        self._may_differ = rows is None and "pending" in self.store.lookup["status"].unique().to_pylist()
        self._ranks = _checked_ranks(rank, world_size)
        # In shared memory: workers that a loader keeps between epochs see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._loaded: State | None = None
        # By worker, in shared memory: which have begun where ``_loaded`` says. The process of the loader keeps it, and
        # gives it to the workers of every later iteration, too.
        self._resumed_by = torch.zeros(_MOST_WORKERS, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._at: State | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_at": None}
        if _is_distributed():  # which a spawned worker cannot ask
            state["_ranks"] = self.ranks
        state.pop("_runs", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._epoch, self._resumed_by):  # those of a copy are not yet
            shared.share_memory_()

    @property
    def ranks(self) -> tuple[int, int]:
        """(rank, world_size) in use."""
        if self._ranks is not None:
            return self._ranks
        if _is_distributed():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return _checked_ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) or (0, 1)
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Choose another order; call it before each epoch, as for ``DistributedSampler``.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        check_least({"epoch": (epoch, 0)})
        self._epoch.fill_(epoch)
        if self._loaded is not None and self._loaded["epoch"] != epoch:
            self._loaded = None
        if self._at is not None and self._at["epoch"] != epoch:
            self._at = None

    def state_dict(self) -> State:
        """Where the iteration that this process began last is: numbers and strings, which JSON can hold.

        torchdata's ``StatefulDataLoader`` calls it in its workers. Without it, call it between two batches of a loop
        over the dataset itself, or over a ``DataLoader`` without workers.
        """
        if self._loaded is not None:
            return self._loaded
        return self._state(int(self._epoch), self._reader(), self._START) if self._at is None else self._at

    def load_state_dict(self, state: State) -> None:
        """Begin the next iteration where a state was taken, in the epoch of that state.

        Raises:
            ValueError: when the iteration begins: the state is of other rows, options, ranks or workers.
        """
        if not {"epoch", "position", "worker"} <= state.keys():
            raise ValueError(f"not a state of {type(self).__name__}: got {sorted(state)}")
        check_least({"epoch": (state["epoch"], 0)})
        self._loaded, self._at = dict(state), None
        worker = get_worker_info()
        self._resumed_by[slice(None) if worker is None else worker.id] = False

    def __iter__(self) -> Iterator[Batch]:
        reader = self._reader()
        epoch, position = int(self._epoch), self._START
        if self._loaded is not None:
            if not self._resumed_by[reader.worker]:
                self._check_same(self._loaded, reader)
                self._resumed_by[reader.worker] = True
                epoch = self._loaded["epoch"]
                reader, position = self._resumed(self._loaded, reader)
            self._loaded = None
        self._at = self._state(epoch, reader, position)
        return self._following(epoch, reader, position)

    def _following(self, epoch: int, reader: Reader, position: dict[str, int]) -> Iterator[Batch]:
        for reached, batch in self._batches(epoch, reader, position):
            self._at = self._state(epoch, reader, reached)
            yield batch

    def _batches(self, epoch: int, reader: Reader, position: dict[str, int]) -> Iterator[tuple[dict[str, int], Batch]]:
        """Batches from ``position`` on, each with the position after it."""
        raise NotImplementedError

    def _resumed(self, state: State, reader: Reader) -> tuple[Reader, dict[str, int]]:
        """Whose part of the epoch this process reads, and from which position."""
        return replace(reader, worker=state["worker"]), state["position"]

    @cached_property
    def _runs(self) -> Runs:
        return Runs.of(self.rows, *self.store.chunk_places(self.rows), self.request_bytes)

    def _options(self) -> dict[str, Any]:
        """All that decides the order, for `_check_same`."""
        return {"seed": self.seed, "request_bytes": self.request_bytes}

    def _state(self, epoch: int, reader: Reader, position: dict[str, int]) -> State:
        return {"epoch": epoch, "position": position, "worker": reader.worker, **self._identity(reader)}

    def _identity(self, reader: Reader) -> dict[str, Any]:
        return {
            "rank": reader.rank,
            "world_size": reader.world_size,
            "workers": reader.workers,
            "rows": len(self.rows),
            "rows_crc32": zlib.crc32(np.stack([self._runs.rows, self._runs.nbytes]).tobytes()),
            **self._options(),
        }

    def _check_same(self, state: State, reader: Reader) -> None:
        own = self._identity(reader)
        other = [
            f"{name} {state.get(name)!r}, now {value!r}" for name, value in own.items() if state.get(name) != value
        ]
        if other:
            grown = len(self.rows) > state.get("rows", len(self.rows))
            raise ValueError(
                f"the state does not fit: {'; '.join(other)}. Resume with the same rows, options, ranks and "
                "workers, or begin the epoch anew"
                + (". If images were appended to the store, pass rows= with the rows of before" if grown else "")
            )

    def _reader(self) -> Reader:
        rank, world_size = self.ranks
        if world_size > 1 and self._may_differ:
            raise ValueError(
                f"{self.store.uri} is unfinished: ranks that open it at different times find different rows. Pass the "
                "same rows to all ranks"
            )
        worker = get_worker_info()
        return Reader(rank, world_size) if worker is None else Reader(rank, world_size, worker.id, worker.num_workers)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_least(values: Mapping[str, tuple[Any, int]]) -> None:
    """Check arguments by name: (value, least).

    Raises:
        TypeError: one is not an integer.
        ValueError: one is less.
    """
    for name, (value, least) in values.items():
        if whole_number(value, name) < least:
            raise ValueError(f"{name} must be at least {least}: got {value}")


def _checked_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise ValueError(f"pass both rank and world_size, or neither: got rank={rank}, world_size={world_size}")
    if not 0 <= whole_number(rank, "rank") < whole_number(world_size, "world_size"):
        raise ValueError(f"rank must be 0 … world_size − 1: got rank={rank}, world_size={world_size}")
    return int(rank), int(world_size)

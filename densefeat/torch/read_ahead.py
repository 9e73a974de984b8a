"""Read the rows of a plan with large requests, ahead of their use, in threads."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np

from densefeat.rows.chunks import Chunk, StoredChunks
from densefeat.storage.parallel import Threads
from densefeat.torch.plan import Plan

__all__ = ["ReadAhead"]

Result = TypeVar("Result")


class ReadAhead:
    """Rows of a plan, in its order: ``submit`` what to do with the chunk of the next row, in a thread.

    Requests are made in the plan's order, up to ``threads`` more than the submitted rows need. Chunks wait encoded. No
    thread is left after the ``with`` block (see `Threads`).

    Args:
        store: the store.
        plan: what to read.
        threads: number of requests, and of rows in use, at a time.
    """

    def __init__(self, store: StoredChunks, plan: Plan, threads: int) -> None:
        self._store, self._rows, self._ahead = store, plan.rows.tolist(), threads
        _, request = np.unique(plan.request, return_inverse=True)
        order = np.argsort(request, kind="stable")
        self._places = np.split(order, np.flatnonzero(np.diff(request[order])) + 1) if len(order) else []
        self._request = request.tolist()
        self._needed = np.maximum.accumulate(request).tolist()
        self._requested: list[Future[None]] = []
        self._chunks: dict[int, Chunk] = {}
        self._next = 0
        self._using, self._reading = Threads(threads), Threads(threads)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.__exit__()  # first: threads of the other pool wait for it
        self._using.__exit__()

    def submit(self, use: Callable[[int, Chunk], Result]) -> Future[Result]:
        """Call ``use`` with the next row and its chunk.

        The result raises StoreError if the row is damaged, and errors of the storage.
        """
        place, self._next = self._next, self._next + 1
        for request in range(len(self._requested), min(self._needed[place] + 1 + self._ahead, len(self._places))):
            self._requested.append(self._reading.submit(partial(self._read, request)))
        row, read = self._rows[place], self._requested[self._request[place]]

        def wait_and_use() -> Result:
            read.result()
            return use(row, self._chunks.pop(place))

        return self._using.submit(wait_and_use)

    def _read(self, request: int) -> None:
        places = self._places[request].tolist()
        chunks = self._store.read_chunks([self._rows[place] for place in places], self._reading.stopping)
        self._chunks.update(zip(places, chunks, strict=True))

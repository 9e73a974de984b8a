"""A sample of the store on a coarse grid, in memory: which images have something like a query."""

import logging
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from densefeat.errors import DensefeatError
from densefeat.page.features import Features, Floats, Seen

__all__ = ["Match", "Sample"]

logger = logging.getLogger(__name__)

_GRID = 28
_MAX_IMAGES = 256
_MAX_BYTES = 128 << 20


@dataclass(frozen=True)
class Match:
    """A row of the sample.

    Attributes:
        row: its number.
        cosine: of its best place with the query, −1 … 1.
        x: of that place, 0 … 1 of the width.
        y: 0 … 1 of the height.
    """

    row: int
    cosine: float
    x: float
    y: float


class Sample:
    """Rows spread over the store, and all that were looked at, as directions on a grid of at most 28×28.

    Read by a thread of its own from `start` on. The oldest make room for those looked at.

    Args:
        features: reads the rows.
        max_images: at most so many; fewer if they need more than 128 MiB.
        before: of the same store when fewer rows were done; what it has read is taken over.
    """

    def __init__(self, features: Features, max_images: int = _MAX_IMAGES, before: "Sample | None" = None) -> None:
        k, height, width = features.store.shape
        self.grid = (min(_GRID, height), min(_GRID, width))
        cells = self.grid[0] * self.grid[1]
        self._features = features
        self.target = min(max_images, max(1, _MAX_BYTES // (4 * cells * k)), len(features.ok_rows))
        self._directions = np.zeros((self.target, cells, k), np.float32)
        self._rows = np.full(self.target, -1, np.int64)
        self._next = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.complete = threading.Event()
        if before is not None:
            with before._lock:
                taken = np.flatnonzero(before._rows >= 0)[: self.target]
                self._directions[: len(taken)], self._rows[: len(taken)] = (
                    before._directions[taken],
                    before._rows[taken],
                )
            self._next = len(taken) % max(self.target, 1)

    def __len__(self) -> int:
        return int((self._rows >= 0).sum())

    def start(self) -> None:
        """Begin to read, once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._fill, name="densefeat-page-sample", daemon=True)
                self._thread.start()

    def add(self, row: int, seen: Seen) -> None:
        """Add a row that has been read."""
        if self.target == 0 or row in self._rows:
            return
        directions = seen.normalised(self.grid)
        with self._lock:
            if row not in self._rows:
                self._directions[self._next], self._rows[self._next] = directions, row
                self._next = (self._next + 1) % self.target

    def like_region(self, query: Floats, most: int = 24, without: int = -1) -> list[Match]:
        """The rows with the most similar places to ``query`` ([k] of length 1), best first."""
        with self._lock:  # directions and rows of one moment
            cosines, rows = self._directions @ query, self._rows.copy()
        best = cosines.argmax(axis=1)
        values = cosines[np.arange(len(best)), best]
        columns, lines = (best % self.grid[1] + 0.5) / self.grid[1], (best // self.grid[1] + 0.5) / self.grid[0]
        return [
            Match(int(rows[one]), float(values[one]), float(columns[one]), float(lines[one]))
            for one in _ranked(values, rows, most, without)
        ]

    def like_image(self, seen: Seen, most: int = 12, without: int = -1) -> list[Match]:
        """The rows whose mean direction is most similar to that of an image, best first."""
        with self._lock:  # directions and rows of one moment
            means, rows = self._directions.mean(axis=1), self._rows.copy()
        lengths = np.linalg.norm(means, axis=1)
        query = seen.at((0, 0, *seen.shape))
        values = means @ query / np.where(lengths > 0, lengths, 1)
        return [Match(int(rows[one]), float(values[one]), 0.5, 0.5) for one in _ranked(values, rows, most, without)]

    def _fill(self) -> None:
        failed = 0
        for row in self._features.spread(self.target):
            if len(self) >= self.target:
                break
            try:
                self.add(row, self._features.seen(row))
            except (DensefeatError, OSError) as error:
                failed += 1
                logger.warning("row %d is left out of the sample: %s", row, error)
        if failed:
            logger.warning("%d rows of the sample could not be read", failed)
        self.complete.set()


def _ranked(values: Floats, rows: npt.NDArray[np.int64], most: int, without: int) -> list[int]:
    """The places of the greatest values, best first; not those that have no row yet (−1), nor that of ``without``."""
    order = np.argsort(-values, kind="stable")
    return [int(one) for one in order if rows[one] not in (-1, without)][:most]

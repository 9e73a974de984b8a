"""Progress for a person: a live bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from schemas.ledger import LedgerRecord

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0


class Progress:
    """Shards and images done and to do, rates, failures, time left.

    Args:
        shards: to do in all.
        images: to do in all.
        records: of the shards that an earlier run finished.
    """

    def __init__(self, shards: int, images: int, records: list[LedgerRecord]) -> None:
        self._shards, self._images = shards, images
        self._shards_done = len(records)
        self._images_before = sum(record.rows_ok + record.rows_failed for record in records)
        self._images_done = self._images_committed = self._images_before
        self._failed = sum(record.rows_failed for record in records)
        self._nbytes = 0
        self._started = self._said = time.monotonic()
        self._bar = (
            tqdm(total=images, initial=self._images_done, unit="image", dynamic_ncols=True, smoothing=0.1)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            logger.info("%s", self.line())

    def advance(self, images: int) -> None:
        """``images`` more were computed."""
        # A shard that is tried again counts its images again: never show more than there are.
        images = min(images, self._images - self._images_done)
        self._images_done += images
        if self._bar is not None:
            self._bar.update(images)
        elif time.monotonic() - self._said > _LINE_EVERY_S:
            self._said = time.monotonic()
            logger.info("%s", self.line())

    def shard_done(self, record: LedgerRecord) -> None:
        """A shard was committed."""
        self._shards_done += 1
        self._images_committed += record.rows_ok + record.rows_failed
        # Images are counted now and then, shards as they end: do not fall behind what is written.
        self.advance(max(0, self._images_committed - self._images_done))
        self._failed += record.rows_failed
        self._nbytes += record.nbytes
        if self._bar is not None:
            self._bar.set_postfix_str(self._rest())

    def line(self) -> str:
        """Where the job stands, in a line."""
        elapsed = time.monotonic() - self._started
        rate = (self._images_done - self._images_before) / max(elapsed, 1e-9)
        left = (self._images - self._images_done) / rate if rate else float("inf")
        return (
            f"{self._images_done:,}/{self._images:,} images, {rate:.1f} images/s, {self._rest()}, "
            f"{_duration(left)} left"
        )

    def _rest(self) -> str:
        written = self._nbytes / 1e6 / max(time.monotonic() - self._started, 1e-9)
        return f"{self._shards_done}/{self._shards} shards, {written:.1f} MB/s written, {self._failed} failed"


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""Progress display: a live bar on a terminal for the main job, and periodic log lines for other counted work."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from schemas.ledger import LedgerRecord

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0


class ProgressLine:
    """Logs the progress of a piece of work, at most every five seconds.

    Args:
        what: name of the work.
        total: number of steps; None if it is not known.
        unit: name of the steps, in the plural.
    """

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._log = 0, _Every(_LINE_EVERY_S)

    def advance(self, steps: int = 1) -> None:
        """Record that ``steps`` more steps are done."""
        self._done += steps
        if steps and self._log.is_due():
            of = "" if self._total is None else f"/{self._total}"
            logger.info("%s: %d%s %s", self._what, self._done, of, self._unit)


class Progress:
    """Shards and images done and remaining, rates, failures, time left.

    Args:
        shards: total number of shards.
        images: total number of images.
        records: of the shards that an earlier run finished.
    """

    def __init__(self, shards: int, images: int, records: list[LedgerRecord]) -> None:
        self._shards, self._images = shards, images
        self._shards_done = len(records)
        self._images_before = sum(record.rows_ok + record.rows_failed for record in records)
        self._images_done = self._images_committed = self._images_before
        self._failed = sum(record.rows_failed for record in records)
        self._nbytes = 0
        self._started, self._log = time.monotonic(), _Every(_LINE_EVERY_S)
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
        """Record that ``images`` more images were computed."""
        # A retried shard counts its images again: never show more than the total.
        images = min(images, self._images - self._images_done)
        self._images_done += images
        if self._bar is not None:
            self._bar.update(images)
        elif self._log.is_due():
            logger.info("%s", self.line())

    def shard_done(self, record: LedgerRecord) -> None:
        """Record that a shard was committed."""
        self._shards_done += 1
        self._images_committed += record.rows_ok + record.rows_failed
        # Images are counted periodically, shards when they end: catch up with the committed images.
        self.advance(max(0, self._images_committed - self._images_done))
        self._failed += record.rows_failed
        self._nbytes += record.total_nbytes
        if self._bar is not None:
            self._bar.set_postfix_str(self._rest())

    def line(self) -> str:
        """Progress of the job as one line."""
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


class _Every:
    """Timer: due once ``seconds`` have passed since it was last due, or since its creation."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last <= self._seconds:
            return False
        self._last = now
        return True


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

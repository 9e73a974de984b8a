"""A line in the log now and then, for work that is counted."""

import logging
import time

logger = logging.getLogger(__name__)

_EVERY_S = 5.0


class ProgressLine:
    """Says how far a piece of work is, at most every five seconds.

    Args:
        what: is being done.
        total: steps.
        unit: what a step is, in the plural.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._said = 0, time.monotonic()

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        if time.monotonic() - self._said > _EVERY_S:
            self._said = time.monotonic()
            logger.info("%s: %d/%d %s", self._what, self._done, self._total, self._unit)

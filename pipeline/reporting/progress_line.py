"""A line in the log now and then, for work that is counted."""

import logging
import time

logger = logging.getLogger(__name__)

_EVERY_S = 5.0


class ProgressLine:
    """Logs how far a piece of work is, at most every five seconds.

    Args:
        what: the work.
        total: steps.
        unit: of the steps, in the plural.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._last_logged = 0, time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self._done += steps
        if steps and time.monotonic() - self._last_logged > _EVERY_S:
            self._last_logged = time.monotonic()
            logger.info("%s: %d/%d %s", self._what, self._done, self._total, self._unit)

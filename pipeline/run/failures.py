"""Log task failures, wherever the tasks ran, and tell whether a task itself may be the cause."""

import logging

from densefeat.errors import DensefeatError, StorageUnavailable
from densefeat.storage.retries import is_transient

__all__ = ["FailureLog", "OutageLog", "beyond_single_images", "is_suspect"]

logger = logging.getLogger(__name__)

_MOST_FAILED, _SHARE_FAILED = 8, 0.1


class FailureLog:
    """Logs every failure in one line, and the first unexpected error of each type with its traceback."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def told(self, error: BaseException, what: str, traceback: str | None = None) -> str:
        """Log an error; returns it in one line.

        Args:
            error: the error.
            what: what failed, e.g. "a task failed"; the message begins with it.
            traceback: the error's traceback, if it was raised in another process.
        """
        reason, kind = one_line(error), type(error).__name__
        if isinstance(error, DensefeatError) or is_transient(error) or kind in self._known:
            logger.warning("%s: %s", what, reason)
        elif traceback is not None:
            logger.warning("%s: %s\n%s", what, reason, traceback)
        else:
            logger.warning("%s: %s", what, reason, exc_info=error)
        self._known.add(kind)
        return reason


class OutageLog:
    """Logs when a queue pauses because the storage answers nobody, and when it goes on."""

    def __init__(self, outage_s: float) -> None:
        self._outage_s = outage_s
        self._since: float | None = None

    def watch(self, outage: tuple[float, float] | None) -> None:
        """Log a change; ``outage`` is `pipeline.run.queue.TaskQueue.outage`."""
        if outage is not None and self._since is None:
            logger.warning(
                "the storage does not answer: the job pauses, and tries one shard from time to time for %.0f minutes "
                "(--outage-patience-s); it can be stopped and continued with --resume",
                self._outage_s / 60,
            )
        elif outage is None and self._since is not None:
            logger.warning("the storage answers again: the job goes on")
        self._since = None if outage is None else outage[0]


def beyond_single_images(failed: int, of: int) -> bool:
    """Whether too many tasks fail for single images to be the cause: more than 8, and than a tenth."""
    return failed > max(_MOST_FAILED, _SHARE_FAILED * of)


def is_suspect(error: BaseException) -> bool:
    """Whether the task itself may have caused the error, for example by using too much memory.

    Storage that does not answer is not the task's fault.
    """
    return not (isinstance(error, StorageUnavailable) or is_transient(error))


def one_line(error: BaseException) -> str:
    """Format an error on one line: its type and text, or the text alone if it was written for users."""
    text = " ".join(str(error).split())
    if isinstance(error, DensefeatError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

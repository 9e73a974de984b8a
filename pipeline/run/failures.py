"""Log task failures, wherever the tasks ran, and tell whether a task itself may be the cause."""

import logging

from densefeat.errors import DensefeatError, StorageUnavailable
from densefeat.storage.retries import is_transient

__all__ = ["FailureLog", "is_suspect"]

logger = logging.getLogger(__name__)


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

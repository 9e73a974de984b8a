"""What is said of tasks that fail, and whose fault it may be; wherever they ran."""

import logging

from densefeat.errors import DensefeatError, StorageUnavailable
from densefeat.storage.retries import is_transient

__all__ = ["FailureLog", "is_suspect"]

logger = logging.getLogger(__name__)


class FailureLog:
    """Says every failure in a line; of errors that nobody foresaw, the first of each type with its traceback."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def told(self, error: BaseException, what: str, traceback: str | None = None) -> str:
        """Log an error; returns it in one line.

        Args:
            error: that was raised.
            what: came of it.
            traceback: of where it was raised, if that was in another process.
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
    """Whether the task may be what is wrong, by its memory, say; that a storage is silent is not its doing."""
    return not (isinstance(error, StorageUnavailable) or is_transient(error))


def one_line(error: BaseException) -> str:
    """An error for a person: its type, unless its text was written for a person, and its text on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, DensefeatError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""Errors that reading a store can raise."""

from collections.abc import Sequence


class DensefeatError(Exception):
    """Base of every error meant for users: the message says what was got, what was expected and what to do."""


class PlaceError(DensefeatError, ValueError):
    """A text is not a valid path or URI, or its protocol is unknown."""


class StoreError(DensefeatError):
    """The store cannot be opened or read: not a store, not finished, damaged, or of an unknown format version."""


class StorageUnavailable(DensefeatError):  # noqa: N818 - says what happened
    """A storage did not answer within the retry period (`densefeat.storage.retries`).

    The state of the requested object is unknown, so the whole task should fail and be retried later.
    """


class WrongClock(DensefeatError):  # noqa: N818 - says what is wrong
    """A storage refuses all requests of this machine, because its clock is wrong; the message says by how much.

    The state of the requested object is unknown.
    """


class MissingPackage(DensefeatError, ImportError):  # noqa: N818 - says what is missing
    """A package of one of densefeat's extras is not installed; the message has the command to install it."""


class MissingFeatures(DensefeatError, LookupError):  # noqa: N818 - says what is missing, like KeyError
    """A row has no features: its image failed when the store was written, it is retired, or its shard is not done yet.

    Attributes:
        row: the requested row, or the first of several requested rows that have no features.
        status: the recorded status of ``row``, e.g. ``"corrupt"``, ``"retired"`` or ``"pending"``.
        rows: all requested rows that have no features, in the order requested.
    """

    def __init__(self, row: int, status: str, message: str, rows: Sequence[int] | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.status = status
        self.rows = (row,) if rows is None else tuple(rows)

    def __reduce__(self) -> tuple[type["MissingFeatures"], tuple[int, str, str, tuple[int, ...]]]:
        """Pickle with all arguments, because errors are passed between DataLoader workers."""
        return (type(self), (self.row, self.status, str(self), self.rows))


def missing_package(purpose: str, package: str, extra: str) -> MissingPackage:
    """The error for a package that is not installed, with the command to install the extra that has it."""
    return MissingPackage(f"{purpose} requires {package}, which is not installed: pip install 'densefeat[{extra}]'")

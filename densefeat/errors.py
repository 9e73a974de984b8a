"""Errors that reading a store can raise."""


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


class MissingFeatures(DensefeatError, LookupError):  # noqa: N818 - says what is missing, like KeyError
    """The row has no features: its image failed when the store was written, or its shard is not done yet.

    Attributes:
        row: the requested row.
        status: the row's recorded status, e.g. ``"corrupt"`` or ``"pending"``.
    """

    def __init__(self, row: int, status: str, message: str) -> None:
        super().__init__(message)
        self.row = row
        self.status = status

    def __reduce__(self) -> tuple[type["MissingFeatures"], tuple[int, str, str]]:
        """Pickle with all arguments, because errors are passed between DataLoader workers."""
        return (type(self), (self.row, self.status, str(self)))

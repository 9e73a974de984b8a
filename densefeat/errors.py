"""Errors that reading a store can raise."""


class DensefeatError(Exception):
    """Base of every error meant for a person: its text says what was got, what was expected and what to do."""


class PlaceError(DensefeatError, ValueError):
    """A text that should name a path or a URI does not, or names one of an unknown kind."""


class StoreError(DensefeatError):
    """The store cannot be opened or read: not a store, not finished, damaged, or of an unknown format version."""


class StorageUnavailable(DensefeatError):  # noqa: N818 - says what happened
    """A storage did not answer, for as long as it was asked again (`densefeat.storage.retries`).

    Nothing is known of the object that was asked for: whoever meets this fails as a whole and is tried again later.
    """


class MissingFeatures(DensefeatError, LookupError):  # noqa: N818 - says what is missing, like KeyError
    """The row has no features: its image failed when the store was made, or its shard is not there yet.

    Attributes:
        row: the row asked for.
        status: the row's recorded status, e.g. ``"corrupt"`` or ``"pending"``.
    """

    def __init__(self, row: int, status: str, message: str) -> None:
        super().__init__(message)
        self.row = row
        self.status = status

    def __reduce__(self) -> tuple[type["MissingFeatures"], tuple[int, str, str]]:
        """Pickle whole: errors cross DataLoader workers."""
        return (type(self), (self.row, self.status, str(self)))

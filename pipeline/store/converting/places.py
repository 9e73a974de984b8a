"""Where a store that is made of others is written."""

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.layout import existing_store, foreign_keys, remains
from schemas.attributes import StoreAttributes

__all__ = ["store_at"]

_SHOWN = 3


def store_at(target: Objects, *, resume: bool) -> StoreAttributes | None:
    """Attributes of the store that is to be continued; None if there is no store.

    Raises:
        JobError: there is a store, which is not to be continued; or there are other objects.
        StoreError: the store is damaged.
    """
    stored = existing_store(target)
    if stored is not None and not resume:
        raise JobError(f"there is a store at {target.uri}: choose another --output, or continue it with --resume")
    if stored is None and (others := [*foreign_keys(target), *remains(target)]):
        few = ", ".join(others[:_SHOWN]) + (" …" if others[_SHOWN:] else "")
        raise JobError(f"--output {target.uri} is not empty ({few}): choose an empty location")
    return stored

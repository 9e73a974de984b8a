"""Where a store that is made of others is written, and whether the store that is there is made of them."""

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.layout import existing_store, foreign_keys, remains
from schemas.attributes import StoreAttributes
from schemas.configuration import differences

__all__ = ["source_differences", "store_at"]

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


def source_differences(stored: StoreAttributes, asked: StoreAttributes) -> list[str]:
    """What says that a store is not made of the same rows, one line each.

    The configuration alone does not: that of a store to which rows were appended is that of its first source.
    """
    different = differences(stored.configuration.to_dict(), asked.configuration.to_dict())
    if (stored.appended, stored.class_names) != (asked.appended, asked.class_names):
        different.append("it is made of other images, or in another order")
    return different

"""A store that is made of others: where it is written, whether the one that is there is made of them, and its end."""

from collections.abc import Callable

from densefeat.layout import FeatureLayout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.reporting.progress import Progress
from pipeline.store.blocks import BlockWriter
from pipeline.store.layout import existing_store, finish, foreign_keys, remains
from pipeline.store.reports import keep_card
from schemas.attributes import StoreAttributes
from schemas.configuration import differences
from schemas.ledger import LedgerRecord

__all__ = ["FREE_SOME", "finish_with", "source_differences", "store_at"]

FREE_SOME = "free some, and run the same command with --resume"  # if a local disk has no space for the store
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


def finish_with(
    target: Objects, features: FeatureLayout, done: dict[int, LedgerRecord], make: Callable[[int], LedgerRecord]
) -> None:
    """Write the shards that are missing, one after the other, and finish the store.

    Args:
        target: the store.
        features: its layout.
        done: records of the shards that are done; the others are added.
        make: writes a shard.
    """
    blocks = BlockWriter(target, features.shards, done.values())
    with Progress(features.shards, features.rows, list(done.values())) as progress:
        for shard in range(features.shards):
            if shard not in done:
                done[shard] = record = make(shard)
                blocks.add(record)
                progress.advance(len(features.rows_of(shard)))
                progress.shard_done(record)
    finish(target, list(done.values()))
    keep_card(target)

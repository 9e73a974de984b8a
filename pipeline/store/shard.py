"""Committing shards, so that record and object agree whoever writes, and wherever a writer is killed.

A shard is done when its ledger record is there. In this order:

1. The record is put under a name of its own that has the object's SHA-256 in it: the *intent*.
2. The object is *created*: the storage refuses a second one (S3: If-None-Match; a local file: a hard link).
3. The ledger record is created in the same way: the commit. Then the intent is deleted.

No job ever replaces or deletes an object that is there, so that it is step 2 that decides which bytes a shard has.
Whoever is refused there (by what a crash left between 2 and 3, or by another job that is between them) reads the object
and commits *it*, with the intent that its writer left. Two jobs of one configuration whose bits differ, because they
run on other hardware, share a store: the first object counts. An object without an intent of this configuration is not
of this store, and an error. A resume deletes no record; a committed object that was lost or cut off is put again if the
same bytes come out, and else is for ``jobs/verify_store.py --repair``, the only one to delete (`withdraw`).

All of it needs only that creation is exclusive and that reads see what was written.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.storage.objects import Objects
from densefeat.store import read_attributes
from pipeline.errors import JobError
from pipeline.reporting.seconds import StageSeconds
from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table

__all__ = ["committed", "finished_shards", "in_parallel", "read_record", "withdraw", "write_shard"]

logger = logging.getLogger(__name__)

_LEDGER_KEY = re.compile(re.escape(layout.LEDGER) + r"/(\d{6,})\.parquet")
_PARALLEL_REQUESTS = 32
_REPAIR = "run jobs/verify_store.py --repair, then this job with --resume"

Item = TypeVar("Item")
Result = TypeVar("Result")


def write_shard(
    objects: Objects,
    shard: int,
    shard_rows: int,
    chunks: Sequence[bytes | None],
    outcomes: Sequence[RowOutcome],
    seconds: StageSeconds,
    facts: dict[str, Any],
) -> LedgerRecord:
    """Write a shard's object, whole, then its ledger record: the commit.

    Args:
        objects: the store.
        shard: its number.
        shard_rows: rows of a full shard (the last one may have fewer).
        chunks: encoded features of its rows, None where a row failed.
        outcomes: of its rows; the place of each chunk is filled in here.
        seconds: that the shard took so far; writing is added.
        facts: the other fields of the record: configuration_hash, clipped, made_by.

    Returns:
        The record that counts: another job's, if that was first.

    Raises:
        JobError: the store is another one by now, or what is there of the shard is not of this configuration.
        OSError: the storage's reason.
    """
    data, places = layout.pack_shard(chunks, shard_rows)
    for outcome, place in zip(outcomes, places, strict=True):
        outcome.chunk_offset, outcome.chunk_nbytes = place or (None, None)
    ok = sum(outcome.ok for outcome in outcomes)
    record = LedgerRecord(
        shard=shard,
        rows_ok=ok,
        rows_failed=len(outcomes) - ok,
        nbytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=seconds.total(),
        outcomes=outcomes_table(outcomes),
        **facts,
    )
    _check_same_store(objects, record.configuration_hash)
    if (recorded := _recorded(objects, shard, record.configuration_hash)) is not None:
        return _with_recorded(objects, recorded, record, data)
    with seconds.stage("write"):
        objects.put(layout.intent_key(shard, record.sha256), record.to_bytes())
        try:
            objects.create(layout.shard_key(shard), data)
            ours = True
        except FileExistsError:
            ours = False
    counts = replace(record, seconds=seconds.total()) if ours else _record_of_object(objects, record)
    counts = _commit(objects, counts)
    for sha256 in {record.sha256, counts.sha256}:
        objects.delete(layout.intent_key(shard, sha256))
    if counts.sha256 != record.sha256:
        _say_adopted(counts)
    return counts


def committed(objects: Objects, shard: int, configuration_hash: str) -> LedgerRecord | None:
    """The record of a shard that is done, with an object of the recorded size; None if it is to be made.

    Raises:
        JobError: the record is damaged, or of another configuration.
    """
    record = _recorded(objects, shard, configuration_hash)
    return record if record is not None and objects.size(layout.shard_key(shard)) == record.nbytes else None


def finished_shards(objects: Objects, configuration_hash: str) -> dict[int, LedgerRecord]:
    """Records of the shards that are done: in the ledger, with an object of the recorded size. Nothing is deleted.

    Raises:
        JobError: a record is damaged, or of another configuration: making its shard again cannot mend that.
    """
    shards = [int(match[1]) for match in map(_LEDGER_KEY.fullmatch, objects.list(layout.LEDGER)) if match]
    sizes = objects.list(f"{layout.FEATURES}/c")
    records = in_parallel(lambda shard: _recorded(objects, shard, configuration_hash), shards)
    return {
        record.shard: record
        for record in records
        if record is not None and sizes.get(layout.shard_key(record.shard)) == record.nbytes
    }


def read_record(objects: Objects, key: str) -> LedgerRecord:
    """A ledger record.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return LedgerRecord.from_bytes(objects.get(key))


def withdraw(objects: Objects, shard: int) -> None:
    """Delete a shard, for one that is damaged: it is to be made again. Not while jobs write the store.

    The object goes first: a record without an object is not done, and is still known to be damaged.
    """
    objects.delete(layout.shard_key(shard))
    objects.delete(layout.ledger_key(shard))


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, by many requests at once."""
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        return list(pool.map(function, items))


def _commit(objects: Objects, record: LedgerRecord) -> LedgerRecord:
    """Create the ledger record; the one that counts."""
    try:
        objects.create(layout.ledger_key(record.shard), record.to_bytes())
        return record
    except FileExistsError:
        recorded = _recorded(objects, record.shard, record.configuration_hash)
    if recorded is None or recorded.sha256 != record.sha256:
        raise JobError(f"{objects.uri}: shard {record.shard} was deleted or replaced while it was committed: {_REPAIR}")
    return recorded


def _check_same_store(objects: Objects, configuration_hash: str) -> None:
    """A job that was begun with --overwrite meanwhile has another store here: leave nothing in it."""
    try:
        stored = read_attributes(objects)["configuration_hash"]
    except StoreError as error:
        raise JobError(f"{error}: another job has deleted the store that this one writes") from error
    if stored != configuration_hash:
        raise JobError(f"{objects.uri} is now another store: another job replaced it (--overwrite)")


def _recorded(objects: Objects, shard: int, configuration_hash: str) -> LedgerRecord | None:
    """The shard's ledger record, whatever became of its object.

    Raises:
        JobError: it is damaged, or of another configuration.
    """
    try:
        record = read_record(objects, layout.ledger_key(shard))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise JobError(f"{objects.uri}: the ledger record of shard {shard} is damaged ({error}): {_REPAIR}") from error
    if record.configuration_hash != configuration_hash:
        raise JobError(
            f"{objects.uri}: shard {shard} is in the ledger, made with another configuration by {record.made_by}: stop "
            f"the job that does so, {_REPAIR}"
        )
    return record


def _with_recorded(objects: Objects, recorded: LedgerRecord, own: LedgerRecord, data: bytes) -> LedgerRecord:
    """What to do with a shard that is made and in the ledger already."""
    key = layout.shard_key(own.shard)
    if recorded.sha256 == own.sha256:
        if objects.size(key) != own.nbytes:  # lost or cut off: these are the bytes that the record is of
            objects.put(key, data)
        return recorded
    if objects.size(key) != recorded.nbytes:
        raise JobError(
            f"{objects.uri}: the object {key} was lost or cut off after it was committed, and this machine makes other "
            f"bytes than the one that made it ({recorded.made_by}): {_REPAIR}"
        )
    _say_adopted(recorded)
    return recorded


def _record_of_object(objects: Objects, own: LedgerRecord) -> LedgerRecord:
    """The record for the object that is there, of a shard that was not in the ledger a moment ago.

    Raises:
        JobError: nobody knows what it is.
    """
    key = layout.shard_key(own.shard)
    sha256 = hashlib.sha256(objects.get(key)).hexdigest()
    if sha256 == own.sha256:
        return own
    try:
        intent = read_record(objects, layout.intent_key(own.shard, sha256))
    except (FileNotFoundError, ValueError):  # deleted, if the shard was committed meanwhile
        recorded = _recorded(objects, own.shard, own.configuration_hash)
        if recorded is None:
            raise JobError(
                f"{objects.uri}: {key} was there, it is not what this job makes, and nothing says what it is: delete "
                "it, then run this job with --resume"
            ) from None
        return recorded
    if intent.configuration_hash != own.configuration_hash:
        raise JobError(
            f"{objects.uri}: {key} was made with another configuration by {intent.made_by}: stop the job that does so, "
            "delete the object, then run this job with --resume"
        )
    return intent


def _say_adopted(record: LedgerRecord) -> None:
    logger.warning(
        "shard %d: another job (%s) was first, with other bytes: they are kept", record.shard, record.made_by
    )

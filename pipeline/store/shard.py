"""Commit shards, so that record and object agree whichever job writes them and whenever a writer is killed.

A shard is done when its ledger record exists. It is written in this order:

1. The record is written under a key of its own that contains the object's SHA-256: the *intent*.
2. The object is *created*: the storage refuses a second one (S3: If-None-Match; a local file: a hard link).
3. The ledger record is created in the same way: the commit. Then the intent is deleted.

No job ever replaces or deletes an existing object, so step 2 decides which bytes a shard has. A writer that is refused
there (because of a crash between 2 and 3, or another job between them) reads the existing object and commits *that*,
with the intent that its writer left. Two jobs with the same configuration can share a store even if their bytes differ
because they run on different hardware: the first object is kept. An object without an intent of this configuration
does not belong to the store, and is an error. Resuming deletes no record. A committed object that is missing or
truncated is written again if the shard has the same bytes as before; otherwise ``jobs/verify_store.py --repair``, the
only job that deletes shards, has to remove it.

A shard may have more objects than that of its features: its *companions*, such as guidance images. They are created
before the features, so that whoever finds the features finds them too. The bytes of a companion do not decide which
rows have features. So a writer that is refused there adopts the existing object, if an intent of this configuration
names it, and the record describes the objects that exist.

This relies only on exclusive creation and read-after-write consistency. Only the last shard of a store to which rows
are appended is replaced: see `pipeline.store.appending.grown_shard`. Until then, its record has fewer rows than it.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.blocks import read_blocks
from densefeat.storage.metadata import read_layout, read_root
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.store import read_attributes
from pipeline.errors import JobError
from pipeline.reporting.seconds import StageSeconds
from schemas.index import INDEX
from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table

__all__ = [
    "REPAIR",
    "NewShard",
    "check_same_store",
    "committed",
    "finished_shards",
    "read_record",
    "recorded",
    "write_shard",
]

logger = logging.getLogger(__name__)

_LEDGER_KEY = re.compile(re.escape(layout.LEDGER) + r"/(\d{6,})\.parquet")
REPAIR = "run jobs/verify_store.py --repair, then this job with --resume"


@dataclass(frozen=True, eq=False)
class NewShard:
    """A shard that was made, to be packed and committed.

    Attributes:
        shard: its number.
        shard_rows: rows of a full shard (the last one may have fewer).
        chunks: encoded features of the rows, in order; None for a row that failed. See `densefeat.layout.pack_shard`.
        outcomes: of the rows; packing sets their ``chunk_offset`` and ``chunk_nbytes``.
        facts: fields of the record: configuration_hash, clipped, made_by.
        seconds: time spent on the shard so far; the time of writing is added.
        companions: array -> its object, for each array besides the features.
    """

    shard: int
    shard_rows: int
    chunks: Iterable[bytes | None]
    outcomes: Sequence[RowOutcome]
    facts: dict[str, Any]
    seconds: StageSeconds = field(default_factory=StageSeconds)
    companions: Mapping[str, bytes] = field(default_factory=dict)

    def packed(self) -> tuple[LedgerRecord, bytes]:
        """The record of the shard, and the object of its features."""
        data, places = layout.pack_shard(self.chunks, self.shard_rows)
        for outcome, place in zip(self.outcomes, places, strict=True):
            outcome.chunk_offset, outcome.chunk_nbytes = place or (None, None)
        ok = sum(outcome.ok for outcome in self.outcomes)
        record = LedgerRecord(
            shard=self.shard,
            rows_ok=ok,
            rows_failed=len(self.outcomes) - ok,
            seconds=self.seconds.total(),
            outcomes=outcomes_table(self.outcomes),
            companions={array: _described(companion) for array, companion in self.companions.items()},
            **_described(data),
            **self.facts,
        )
        return record, data


def write_shard(objects: Objects, new: NewShard) -> LedgerRecord:
    """Write the objects of a whole shard to a store, then commit it by writing its ledger record.

    Returns:
        The committed record; that of another job, if it was first.

    Raises:
        JobError: the store was replaced, or the existing shard has another configuration.
        OSError: the storage failed.
    """
    record, data = new.packed()
    check_same_store(objects, record.configuration_hash)
    if (found := recorded(objects, new.shard, record.configuration_hash)) is not None:
        return _with_recorded(objects, found, record, {**new.companions, layout.FEATURES: data})
    with new.seconds.stage("write"):
        objects.put(layout.intent_key(new.shard, record.sha256), record.to_bytes())
        there = {array: _create_companion(objects, record, array, of) for array, of in new.companions.items()}
        try:
            objects.create(layout.shard_key(new.shard), data)
            ours = True
        except FileExistsError:
            ours = False
    to_commit = replace(record, seconds=new.seconds.total()) if ours else _record_of_object(objects, record)
    committed_record = _commit(objects, replace(to_commit, companions=there))
    for sha256 in {record.sha256, committed_record.sha256}:
        objects.delete(layout.intent_key(new.shard, sha256))
    if committed_record.sha256 != record.sha256:
        _log_adopted(committed_record)
    return committed_record


def committed(objects: Objects, shard: int, configuration_hash: str, rows: int) -> LedgerRecord | None:
    """Record of a shard of ``rows`` rows whose objects exist and have the recorded sizes; None if it is not done.

    Raises:
        JobError: the record is damaged, or has another configuration.
    """
    record = recorded(objects, shard, configuration_hash)
    return record if record is not None and record.rows >= rows and not _lost(objects, record) else None


def finished_shards(objects: Objects, configuration_hash: str) -> dict[int, LedgerRecord]:
    """Records of all shards whose objects exist and have the recorded sizes, by shard number. Nothing is deleted.

    Raises:
        JobError: a record is damaged, or has another configuration; rewriting its shard cannot fix that.
    """
    shards = [int(match[1]) for match in map(_LEDGER_KEY.fullmatch, objects.list(layout.LEDGER)) if match]
    if not shards:  # the store may be claimed and not set up yet
        return {}
    features = read_layout(objects, read_root(objects))
    in_store = [shard for shard in shards if shard < features.shards]
    blocks = read_blocks(objects, features, in_store, configuration_hash, INDEX)
    records = [record for block in blocks for record in LedgerRecord.of_block(block)]
    in_blocks = {record.shard for record in records}
    single = [shard for shard in in_store if shard not in in_blocks]
    read = in_order(lambda shard: recorded(objects, shard, configuration_hash), single)
    records += [record for record in read if record is not None]
    sizes: dict[str, int] = {}
    for array in {array for record in records for array in record.objects}:
        sizes |= objects.list(f"{array}/c")
    return {
        record.shard: record
        for record in records
        if record.rows == len(features.rows_of(record.shard))
        and all(
            sizes.get(layout.shard_key(record.shard, array)) == facts["nbytes"]
            for array, facts in record.objects.items()
        )
    }


def read_record(objects: Objects, key: str) -> LedgerRecord:
    """Read a ledger record.

    Raises:
        FileNotFoundError: the record does not exist.
        ValueError: the record is damaged.
    """
    return LedgerRecord.from_bytes(objects.get(key))


def _commit(objects: Objects, record: LedgerRecord) -> LedgerRecord:
    """Create the ledger record; returns the committed one, which another job may have written.

    Raises:
        JobError: the shard was deleted or replaced in the meantime.
    """
    try:
        objects.create(layout.ledger_key(record.shard), record.to_bytes())
        return record
    except FileExistsError:
        found = recorded(objects, record.shard, record.configuration_hash)
    if found is None or found.sha256 != record.sha256:
        raise JobError(
            f"{objects.uri}: shard {record.shard} was deleted or replaced while it was being committed: {REPAIR}"
        )
    return found


def check_same_store(objects: Objects, configuration_hash: str) -> None:
    """Write nothing if another job has replaced the store (--overwrite) or deleted it.

    Raises:
        JobError: the store was replaced or deleted.
    """
    try:
        stored = read_attributes(objects)["configuration_hash"]
    except StoreError as error:
        raise JobError(f"{error}: another job has deleted the store that this job writes") from error
    if stored != configuration_hash:
        raise JobError(f"{objects.uri} is now another store: another job replaced it (--overwrite)")


def recorded(objects: Objects, shard: int, configuration_hash: str) -> LedgerRecord | None:
    """Ledger record of a shard, whether or not its object exists; None if there is no record.

    Raises:
        JobError: the record is damaged, or has another configuration.
    """
    try:
        record = read_record(objects, layout.ledger_key(shard))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise JobError(f"{objects.uri}: the ledger record of shard {shard} is damaged ({error}): {REPAIR}") from error
    if record.configuration_hash != configuration_hash:
        raise JobError(
            f"{objects.uri}: shard {shard} is in the ledger, made with another configuration by {record.made_by}: stop "
            f"that job, {REPAIR}"
        )
    return record


def _with_recorded(objects: Objects, found: LedgerRecord, own: LedgerRecord, data: Mapping[str, bytes]) -> LedgerRecord:
    """Keep the recorded shard if another job has committed it already; write its objects again if they are lost.

    Raises:
        JobError: an object is missing or truncated, and this machine's bytes differ from the recorded ones; or rows
            were appended to the shard, which another job writes.
    """
    for array in _lost(objects, found):
        key = layout.shard_key(own.shard, array)
        if own.objects.get(array) != found.objects[array]:
            raise JobError(
                f"{objects.uri}: the object {key} was lost or truncated after it was committed, and this machine "
                f"produces other bytes than the machine that wrote it ({found.made_by}): {REPAIR}"
            )
        if own.rows != len(read_layout(objects, read_root(objects)).rows_of(own.shard)):
            raise JobError(f"{objects.uri}: rows were appended to shard {own.shard} since this job began: stop it")
        objects.put(key, data[array])
    if found.sha256 != own.sha256:
        _log_adopted(found)
    return found


def _lost(objects: Objects, record: LedgerRecord) -> list[str]:
    """Arrays whose object of a shard is missing, or has another size than recorded."""
    return [
        array
        for array, facts in record.objects.items()
        if objects.size(layout.shard_key(record.shard, array)) != facts["nbytes"]
    ]


def _described(data: bytes) -> dict[str, Any]:
    """Size and digest of an object, as in `LedgerRecord.objects`."""
    return {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _create_companion(objects: Objects, record: LedgerRecord, array: str, data: bytes) -> dict[str, Any]:
    """Create a companion's object; returns the description of the existing one if another job was first.

    Raises:
        JobError: the existing object belongs to no job of this configuration.
    """
    key = layout.shard_key(record.shard, array)
    try:
        objects.create(key, data)
        return record.companions[array]
    except FileExistsError:
        existing = _described(objects.get(key))
    if existing in (named.objects.get(array) for named in _intents(objects, record)):
        return existing
    found = recorded(objects, record.shard, record.configuration_hash)  # that job may be done in the meantime
    if found is None or found.companions.get(array) != existing:
        raise _unknown_object(objects, key)
    return existing


def _intents(objects: Objects, record: LedgerRecord) -> list[LedgerRecord]:
    """Intents of the same shard, rows and configuration."""
    found = []
    for key in objects.list(layout.INTENTS):
        if key.startswith(layout.intent_prefix(record.shard)):
            try:
                intent = read_record(objects, key)
            except (FileNotFoundError, ValueError):  # deleted or half-written by a job that died
                continue
            if (intent.configuration_hash, intent.rows) == (record.configuration_hash, record.rows):
                found.append(intent)
    return found


def _record_of_object(objects: Objects, own: LedgerRecord) -> LedgerRecord:
    """Find the record of an existing object whose shard was not in the ledger when this job looked.

    Raises:
        JobError: the object has no intent and no ledger record, or has another configuration.
    """
    key = layout.shard_key(own.shard)
    sha256 = hashlib.sha256(objects.get(key)).hexdigest()
    if sha256 == own.sha256:
        return own
    try:
        intent = read_record(objects, layout.intent_key(own.shard, sha256))
    except (FileNotFoundError, ValueError):  # the intent is deleted if the shard was committed in the meantime
        found = recorded(objects, own.shard, own.configuration_hash)
        if found is None:
            raise _unknown_object(objects, key) from None
        return found
    if intent.configuration_hash != own.configuration_hash:
        raise JobError(
            f"{objects.uri}: {key} was made with another configuration by {intent.made_by}: stop that job, delete the "
            "object, then run this job with --resume"
        )
    return intent


def _unknown_object(objects: Objects, key: str) -> JobError:
    return JobError(
        f"{objects.uri}: {key} exists, its bytes differ from this job's, and no record describes it: delete it, then "
        "run this job with --resume"
    )


def _log_adopted(record: LedgerRecord) -> None:
    logger.warning(
        "shard %d: another job (%s) wrote it first, with different bytes: they are kept", record.shard, record.made_by
    )

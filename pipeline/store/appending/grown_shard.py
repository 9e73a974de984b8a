"""Add rows to a shard that is committed: the last one of a store to which rows were appended.

Its rows are not computed again, because their images may be gone. The new object has their chunks, byte for byte and at
the same places, and then those of the new rows. So whoever has read the old record or the old index of the object still
reads the right bytes. Between the growth of the store and the end of this, the record of the shard has fewer rows than
the shard: that is how a job knows what is to be done. It is done in this order:

1. All new objects and the new record are *created* as one object, the decision. A worker that is refused takes the
   existing one: workers on other hardware may have other bytes for the new rows.
2. The objects of the shard are replaced by those of the decision, companions first.
3. The record is replaced: the commit. Then the decision is deleted.

Steps 2 and 3 write the same bytes whoever does them, and are done only while the record has fewer rows. After a kill,
the next job finds the decision and does them again, without any image. A decision that is created too late, after the
commit, is not carried out; it is deleted, at the latest when the store is finished. A worker that stands still between
its look at the record and its write until the store has grown again can bring an older object back;
``jobs/verify_store.py`` finds that.
"""

import io
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.shard import REPAIR, NewShard, check_same_store, committed, recorded, write_shard
from schemas.ledger import LedgerRecord, RowOutcome

__all__ = ["KeptRows", "decision", "done_or_kept"]

logger = logging.getLogger(__name__)

_RECORD = "record"  # in a decision, beside the names of the arrays


@dataclass(frozen=True)
class KeptRows:
    """The rows that a shard has already; none if it has no record.

    Attributes:
        record: of these rows.
        outcomes: of these rows.
        chunks: their encoded features; None for a row that failed.
        guidance: their encoded guidance images, if the store has them.
        embedding: their embeddings [n, D], if the store has them.
    """

    record: LedgerRecord | None = None
    outcomes: list[RowOutcome] = field(default_factory=list)
    chunks: list[bytes | None] = field(default_factory=list)
    guidance: list[bytes | None] = field(default_factory=list)
    embedding: npt.NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.outcomes)

    def guidance_object(self, chunks: Iterable[bytes | None], shard_rows: int) -> bytes:
        """The object of the shard's guidance images, with those of new rows."""
        return layout.pack_shard(itertools.chain(self.guidance, chunks), shard_rows, index_first=True)[0]

    def embedding_object(self, embeddings: Sequence[npt.NDArray[np.float16]], shard_rows: int) -> bytes:
        """The object of the shard's embeddings, with those of new rows, in parts [n, D]."""
        kept = [] if self.embedding is None else [self.embedding]
        return encode_embeddings(np.concatenate([*kept, *embeddings]), shard_rows)

    def write(self, objects: Objects, new: NewShard) -> LedgerRecord:
        """Write and commit the shard with new rows; a shard without kept rows is written by `write_shard`.

        Args:
            objects: the store.
            new: the new rows of the shard; its companions have the kept rows, too.

        Returns:
            The committed record; that of another worker, if it was first.

        Raises:
            JobError: as for `write_shard`; or the existing object has another order than this writer's.
            OSError: the storage failed.
        """
        if self.record is None:
            record = write_shard(objects, new)
            if record.rows < len(new.outcomes):
                raise JobError(
                    f"{objects.uri}: another job wrote shard {new.shard} without the rows that were appended to it: "
                    "run the same command again"
                )
            return record
        places = [(outcome.chunk_offset, outcome.chunk_nbytes) for outcome in self.outcomes]
        chunks, outcomes = itertools.chain(self.chunks, new.chunks), [*self.outcomes, *new.outcomes]
        record, data = replace(new, chunks=chunks, outcomes=outcomes).packed()
        if places != [(outcome.chunk_offset, outcome.chunk_nbytes) for outcome in self.outcomes]:
            raise JobError(
                f"{objects.uri}: rows cannot be appended to shard {new.shard}, because its chunks are not in the order "
                "of its rows: another program wrote it"
            )
        before = self.record.seconds
        record = replace(
            record,
            clipped=self.record.clipped + record.clipped,
            seconds={
                name: before.get(name, 0.0) + record.seconds.get(name, 0.0) for name in {**before, **record.seconds}
            },
        )
        return _decide(objects, record, {**new.companions, layout.FEATURES: data})


def done_or_kept(
    objects: Objects, shard: int, configuration_hash: str, rows: int, shard_rows: int
) -> LedgerRecord | KeptRows:
    """Record of a shard of ``rows`` rows, if it is done or a decision can be carried out; else the rows that it has.

    Raises:
        JobError: the record is damaged, or has another configuration; or an object of rows to be kept is damaged.
    """
    found = recorded(objects, shard, configuration_hash)
    if found is None:
        return KeptRows()
    if found.rows >= rows:
        return committed(objects, shard, configuration_hash, rows) or KeptRows()
    return _carried_out(objects, shard, configuration_hash, rows) or _kept(objects, found, shard_rows)


def decision(objects: Objects, shard: int, rows: int) -> tuple[LedgerRecord, dict[str, bytes]] | None:
    """The record and objects that were decided for a shard of ``rows`` rows; None if there is no such decision.

    Raises:
        ValueError: it is damaged.
    """
    try:
        data = objects.get(layout.grown_shard_key(shard, rows))
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            parts = {name: array.tobytes() for name, array in arrays.items()}
        record = LedgerRecord.from_bytes(parts.pop(_RECORD))
    except Exception as error:  # damaged bytes can raise anything in the parser of the zip
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if parts.keys() != record.objects.keys() or (record.shard, record.rows) != (shard, rows):
        raise ValueError("it is about another shard")
    return record, parts


def _decide(objects: Objects, record: LedgerRecord, data: Mapping[str, bytes]) -> LedgerRecord:
    check_same_store(objects, record.configuration_hash)
    encoded = io.BytesIO()
    parts = {_RECORD: record.to_bytes(), **data}
    arrays: dict[str, Any] = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
    np.savez(encoded, **arrays)
    where = record.shard, record.configuration_hash, record.rows
    if (done := _committed_since(objects, *where)) is not None:
        return done
    try:
        objects.create(layout.grown_shard_key(record.shard, record.rows), encoded.getvalue())
    except FileExistsError:
        logger.warning("shard %d: another worker decided on its new rows first: they are kept", record.shard)
    found = _carried_out(objects, *where) or _committed_since(objects, *where)
    if found is None:
        raise JobError(f"{objects.uri}: the rows appended to shard {record.shard} were deleted meanwhile: {REPAIR}")
    return found


def _carried_out(objects: Objects, shard: int, configuration_hash: str, rows: int) -> LedgerRecord | None:
    """Carry out the decision on a shard; None if there is none."""
    key = layout.grown_shard_key(shard, rows)
    try:
        decided = decision(objects, shard, rows)
    except ValueError as error:
        logger.warning("%s/%s is damaged: %s; the new rows are computed again", objects.uri, key, error)
        objects.delete(key)
        return None
    if decided is None:
        return None
    record, data = decided
    check_same_store(objects, configuration_hash)
    for array in record.objects:
        if (done := _committed_since(objects, shard, configuration_hash, rows)) is not None:
            objects.delete(key)
            return done
        objects.put(layout.shard_key(shard, array), data[array])
    objects.put(layout.ledger_key(shard), record.to_bytes())
    objects.delete(key)
    return record


def _committed_since(objects: Objects, shard: int, configuration_hash: str, rows: int) -> LedgerRecord | None:
    """The record of a shard that had fewer rows, if it has them all by now; None if not.

    Raises:
        JobError: the record was deleted.
    """
    found = recorded(objects, shard, configuration_hash)
    if found is None:
        raise JobError(f"{objects.uri}: shard {shard} was deleted while rows were added to it: {REPAIR}")
    return found if found.rows >= rows else None


def _kept(objects: Objects, record: LedgerRecord, shard_rows: int) -> KeptRows:
    """Read the rows of a committed shard. Its objects may have more rows than the record already."""
    data = {}
    for array in record.objects:
        key = layout.shard_key(record.shard, array)
        try:
            data[array] = objects.get(key)
        except FileNotFoundError:
            raise JobError(f"{objects.uri}: {key} is missing, to which rows are to be added: {REPAIR}") from None
    outcomes = [RowOutcome(**outcome) for outcome in record.outcomes.to_pylist()]
    places = [(one.chunk_offset or 0, one.chunk_nbytes or 0) if one.ok else None for one in outcomes]
    array = layout.FEATURES
    try:
        chunks = _chunks(data[array], places)
        guidance, embedding = [], None
        if (array := layout.GUIDANCE) in data:
            index = layout.unpack_shard_index(data[array], shard_rows, index_first=True)
            guidance = _chunks(data[array], index[: record.rows])
        if (array := layout.EMBEDDING) in data:
            values = layout.decode_values(data[array], "float16", (shard_rows, -1))
            embedding = values[: record.rows].astype(np.float16)
    except (ValueError, RuntimeError) as error:
        key = layout.shard_key(record.shard, array)
        raise JobError(f"{objects.uri}: {key} is damaged: {error}; rows cannot be added to it: {REPAIR}") from error
    return KeptRows(record, outcomes, chunks, guidance, embedding)


def _chunks(data: bytes, places: Sequence[tuple[int, int] | None]) -> list[bytes | None]:
    """Chunks at some places of an object.

    Raises:
        ValueError: one is damaged.
    """
    chunks = [None if place is None else data[place[0] : sum(place)] for place in places]
    for chunk in chunks:
        if chunk is not None:
            layout.without_crc(chunk, "a chunk")
    return chunks

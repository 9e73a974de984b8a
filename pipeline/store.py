"""Writing a store: set it up once, write shards in any order from anywhere, finish it.

A shard counts as done when its ledger record is there; the record is written after the object. What a crash can leave
behind (a store that is half set up, an object without a record) is written again by the next run.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.index import stored_index
from densefeat.layout import FeatureLayout
from densefeat.objects import TEMPORARY, Objects
from densefeat.parquet import parquet_bytes
from densefeat.store import read_attributes
from pipeline.errors import JobError
from pipeline.pca import Basis
from pipeline.stage_seconds import StageSeconds
from pipeline.storage_errors import explain_storage_error
from pipeline.store_documents import zarr_documents
from schemas.attributes import StoreAttributes
from schemas.index import REFERENCES, pending_index, with_outcomes
from schemas.ledger import LedgerRecord, RowOutcome, manifest, outcomes_table

_PARALLEL_REQUESTS = 32

# Every key that a store can have, half-written ones included.
_OWN_KEY = re.compile(
    r"zarr\.json|index\.parquet|manifest\.parquet|_ledger/\d{6,}\.parquet|_tmp/[^/]+"
    r"|features/(zarr\.json|c/\d+/0/0/0)|step/(zarr\.json|c/0)|pca/zarr\.json|pca/\w+/(zarr\.json|c/0(/0)?)"
)


def existing_store(objects: Objects) -> StoreAttributes | None:
    """Attributes of the store that is there, None if nothing is.

    Raises:
        StoreError: what is there is not a densefeat store, or one of another format version.
    """
    if not objects.exists(layout.ATTRIBUTES):
        return None
    return StoreAttributes.from_dict(read_attributes(objects))


def check_writable(objects: Objects) -> None:
    """Write an object, read it, and take it away.

    Raises:
        OSError: with the storage's reason.
    """
    probe = f"{TEMPORARY}/{uuid.uuid4()}"  # of its own: other jobs may try at the same moment
    objects.create(probe, b"densefeat")
    objects.put(probe, b"densefeat")
    objects.get(probe)
    objects.delete(probe)
    objects.tidy()


def foreign_keys(objects: Objects) -> list[str]:
    """What lies at the store's place and is not a part of any store."""
    return [key for key in objects.list() if not _OWN_KEY.fullmatch(key)]


def delete_store(objects: Objects) -> None:
    """Remove a store and nothing else: what has another name stays, whatever it is.

    ``zarr.json`` goes last: a deletion that is interrupted leaves what is still known as a store.
    """
    own = [key for key in objects.list() if _OWN_KEY.fullmatch(key) and key != layout.ATTRIBUTES]
    _parallel(objects.delete, own)
    objects.delete(layout.ATTRIBUTES)


def set_up(
    objects: Objects,
    attributes: StoreAttributes,
    features: FeatureLayout,
    basis: Basis,
    step: np.ndarray[Any, Any] | None,
    index: pa.Table,
    *,
    claimed: bool = False,
) -> StoreAttributes:
    """Write everything but shards; afterwards the store can be opened, and every row is pending.

    ``zarr.json`` comes first, create-only, so that of two jobs that set up the same store one stops here; it comes
    again at the end to say that setup is complete.

    Args:
        objects: where the store goes.
        attributes: with ``setup_complete`` False.
        features: shape and cutting.
        basis: PCA basis.
        step: [k] float32 for int8, else None.
        index: ``schemas.index.pending_index`` of the source.
        claimed: an earlier run of the same configuration claimed the store and died.

    Raises:
        FileExistsError: somebody else set up a store here in the meantime.
    """
    documents = zarr_documents(attributes.completed(), features, basis, step)
    if not claimed:
        claim = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes.to_dict()}, indent=2)
        objects.create(layout.ATTRIBUTES, claim.encode())
    objects.put(layout.INDEX, parquet_bytes(index))
    root = documents.pop(layout.ATTRIBUTES)
    for key, data in documents.items():
        objects.put(key, data)
    objects.put(layout.ATTRIBUTES, root)
    return attributes.completed()


def step_sha256(step: np.ndarray[Any, Any] | None) -> str | None:
    """Digest of the quantization steps, None for float16."""
    return None if step is None else hashlib.sha256(step.astype("<f4").tobytes()).hexdigest()


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

    Raises:
        JobError: the shard is recorded already with other bytes: two jobs with different results write this store.
        OSError: the storage's reason.
    """
    data, places = layout.pack_shard(chunks, shard_rows)
    sha256 = hashlib.sha256(data).hexdigest()
    if objects.exists(layout.ledger_key(shard)):  # before its object could be replaced by another
        return _same_shard(objects, shard, sha256)
    for outcome, place in zip(outcomes, places, strict=True):
        outcome.chunk_offset, outcome.chunk_nbytes = place or (None, None)
    ok = sum(outcome.ok for outcome in outcomes)
    with seconds.stage("write"):
        objects.put(layout.shard_key(shard), data)
    record = LedgerRecord(
        shard=shard,
        rows_ok=ok,
        rows_failed=len(outcomes) - ok,
        nbytes=len(data),
        sha256=sha256,
        seconds=seconds.total(),
        outcomes=outcomes_table(outcomes),
        **facts,
    )
    try:
        objects.create(layout.ledger_key(shard), record.to_bytes())
    except FileExistsError:
        return _same_shard(objects, shard, sha256)
    return record


def _same_shard(objects: Objects, shard: int, sha256: str) -> LedgerRecord:
    """The record of a shard that was made already: our own whose answer got lost, or another job's.

    Raises:
        JobError: it has other bytes than ours.
    """
    other = read_record(objects, layout.ledger_key(shard))
    if other.sha256 != sha256:
        raise JobError(
            f"shard {shard} of {objects.uri} is in the ledger with other bytes (made by {other.made_by}): another job "
            "with other options, hardware or software writes the same shards; stop one of them, then run "
            "jobs/verify_store.py --repair and resume"
        )
    return other


def read_record(objects: Objects, key: str) -> LedgerRecord:
    """A ledger record."""
    return LedgerRecord.from_bytes(objects.get(key))


def finished_shards(objects: Objects, configuration_hash: str) -> dict[int, LedgerRecord]:
    """Records of the shards that are done: in the ledger, of this configuration, with an object of the recorded size.

    Records that fail this are removed, so that their shards are made again.
    """
    keys = list(objects.list(layout.LEDGER))
    sizes = objects.list(f"{layout.FEATURES}/c")

    def check(key: str) -> LedgerRecord | None:
        try:
            record = read_record(objects, key)
        except ValueError:
            record = None
        if (
            record is None
            or record.configuration_hash != configuration_hash
            or sizes.get(layout.shard_key(record.shard)) != record.nbytes
        ):
            objects.delete(key)
            return None
        return record

    return {record.shard: record for record in _parallel(check, keys) if record is not None}


def reopen(objects: Objects) -> None:
    """Make a finished store unfinished again, because a shard of it is to be made anew: every row is pending until
    its shard's record says otherwise. Nothing happens to a store that is not finished.
    """
    if objects.exists(layout.MANIFEST):
        index = stored_index(objects)
        objects.delete(layout.MANIFEST)
        objects.put(layout.INDEX, parquet_bytes(pending_index(index.select(REFERENCES.names))))


def finish(objects: Objects, records: Sequence[LedgerRecord]) -> None:
    """Merge the outcomes of all shards into the index, and write the manifest: the store is complete."""
    ordered = sorted(records, key=lambda record: record.shard)
    merged = with_outcomes(stored_index(objects), pa.concat_tables(record.outcomes for record in ordered))
    objects.put(layout.INDEX, parquet_bytes(merged))
    objects.put(layout.MANIFEST, parquet_bytes(manifest(ordered)))
    objects.tidy()


@contextmanager
def storage_explained(uri: str) -> Iterator[None]:
    """Turn storage errors in the block that trying again will not mend into a ``JobError`` about ``uri``."""
    try:
        yield
    except Exception as error:
        explained = explain_storage_error(error, uri)
        if explained is None:
            raise
        raise explained from error


def _parallel(function: Any, items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        return list(pool.map(function, items))

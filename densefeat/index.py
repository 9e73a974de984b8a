"""The index of a store: one record per row, completed from the ledger while the store is unfinished."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.layout import FeatureLayout
from densefeat.parquet import read_parquet
from densefeat.storage.objects import Objects

__all__ = ["read_index", "recorded_shards", "stored_index"]

logger = logging.getLogger(__name__)

_PARALLEL_REQUESTS = 32
_PENDING = "pending"
# Columns that this package reads: `_OUTCOME` from ledger records, `_COLUMNS` from the index. schemas/index.py has the
# whole schema.
_OUTCOME = {
    "row": pa.int64(),
    "status": pa.string(),
    "error": pa.string(),
    "chunk_offset": pa.int64(),
    "chunk_nbytes": pa.int64(),
}
_COLUMNS = {"key": pa.string(), "label": pa.int64(), "affine": pa.list_(pa.float64()), **_OUTCOME}

_REBUILD = "jobs/verify_store.py --repair rebuilds it from the images and the ledger"


def read_index(objects: Objects, features: FeatureLayout) -> pa.Table:
    """Read the index with the outcomes of all finished shards; rows of the others are pending.

    Raises:
        StoreError: the index is missing or damaged, or the storage does not reveal which shards are done.
    """
    try:
        # The order matters: a job that finishes in between merges the index before it writes the manifest.
        finished = objects.exists(layout.MANIFEST)
        index = stored_index(objects, features.rows)
        return index if finished else _with_finished_shards(index, objects, features)
    except PermissionError as error:
        if objects.can_list:
            raise
        raise StoreError(
            f"{objects.uri}: cannot tell which shards are done: {error}. An unfinished store needs a server that "
            "answers 404 for missing objects: open it with the protocol of its storage (s3://, gs://), or finish it"
        ) from error


def stored_index(objects: Objects, rows: int | None = None) -> pa.Table:
    """Read the index as stored, without the ledger.

    Args:
        objects: the store.
        rows: expected number of rows, if known.

    Raises:
        StoreError: the index is missing or damaged.
    """
    try:
        index = read_parquet(objects.get(layout.INDEX))
        _check_columns(index, _COLUMNS)
        if rows is not None and index.num_rows != rows:
            raise ValueError(f"it has {index.num_rows} rows, the features have {rows}")
        if not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
            raise ValueError("its rows are not numbered from 0")
    except FileNotFoundError:
        raise StoreError(f"{objects.uri}: {layout.INDEX} is missing; {_REBUILD}") from None
    except ValueError as error:
        raise StoreError(f"{objects.uri}: {layout.INDEX} is damaged: {error}; {_REBUILD}") from error
    return index


def recorded_shards(objects: Objects, features: FeatureLayout) -> list[int]:
    """The shards that have a ledger record, in order.

    Raises:
        OSError: the storage failed.
    """
    if objects.can_list:
        keys = set(objects.list(layout.LEDGER))
        return [shard for shard in range(features.shards) if layout.ledger_key(shard) in keys]
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        exists = list(pool.map(lambda shard: objects.exists(layout.ledger_key(shard)), range(features.shards)))
    return [shard for shard, recorded in enumerate(exists) if recorded]


def _with_finished_shards(index: pa.Table, objects: Objects, features: FeatureLayout) -> pa.Table:
    """Complete the index of an unfinished store from the valid ledger records."""
    shards = recorded_shards(objects, features)
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        read = partial(_outcomes, objects, features, index.schema)
        records = dict(zip(shards, pool.map(read, shards), strict=True))
    parts = []
    for shard in range(features.shards):
        rows = features.rows_of(shard)
        part = index.slice(rows.start, len(rows))
        outcomes = records.get(shard)
        # Only the ledger says what is done; outcomes that an earlier merge left in the index are ignored.
        parts.append(_replaced(part, _pending(part) if outcomes is None else outcomes))
    return pa.concat_tables(parts).combine_chunks()


def _outcomes(objects: Objects, features: FeatureLayout, index: pa.Schema, shard: int) -> pa.Table | None:
    """The outcomes of a shard's rows in its ledger record; None if the record is damaged or gone.

    The shard then counts as not done, as for a resumed job, which drops the record and computes the shard again.
    """
    key = layout.ledger_key(shard)
    try:
        record = read_parquet(objects.get(key))
        _check_columns(record, _OUTCOME)
        _check_columns(record, {field.name: field.type for field in index if field.name in record.column_names})
        if record["row"].to_pylist() != list(features.rows_of(shard)):
            raise ValueError("it is about other rows")
    except FileNotFoundError:  # deleted by a job since it was listed
        return None
    except ValueError as error:
        logger.warning(
            "%s: the ledger record %s is damaged: %s; its rows count as pending, and --resume computes them again",
            objects.uri, key, error,
        )  # fmt: skip
        return None
    return record


def _check_columns(table: pa.Table, columns: dict[str, pa.DataType]) -> None:
    for name, kind in columns.items():
        if table.column_names.count(name) != 1:
            raise ValueError(f"it has {table.column_names.count(name)} columns {name!r}, expected 1")
        if table.schema.field(name).type != kind:
            raise ValueError(f"its column {name!r} holds {table.schema.field(name).type}, expected {kind}")


def _pending(index: pa.Table) -> pa.Table:
    rows = index.num_rows
    columns = {name: pa.nulls(rows, kind) for name, kind in _OUTCOME.items()}
    return pa.table({**columns, "row": index["row"], "status": pa.array([_PENDING] * rows)})


def _replaced(index: pa.Table, outcomes: pa.Table) -> pa.Table:
    columns = [outcomes[name] if name in outcomes.column_names else index[name] for name in index.column_names]
    return pa.table(columns, schema=index.schema)

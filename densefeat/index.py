"""The index of a store: one record a row, completed from the ledger as long as the store is not finished."""

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
# What this package reads of the index, and a ledger record must bring. schemas/index.py has the whole schema.
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
    """The index with the outcomes of all shards that are done; rows of the others are pending.

    Raises:
        StoreError: the index is missing or damaged, or it cannot be told which shards are done.
    """
    try:
        # In this order: a job that finishes in between has merged the index before it wrote the manifest.
        finished = objects.exists(layout.MANIFEST)
        index = stored_index(objects, features.rows)
        return index if finished else _with_finished_shards(index, objects, features)
    except PermissionError as error:
        if objects.can_list:
            raise
        raise StoreError(
            f"{objects.uri}: cannot tell which shards are done: {error}. A store that is not finished needs a server "
            "that answers 404 for what is not there: open it by its storage's own protocol (s3://, gs://), or finish it"
        ) from error


def stored_index(objects: Objects, rows: int | None = None) -> pa.Table:
    """The index as it lies in the store, whatever the ledger says.

    Args:
        objects: the store.
        rows: as many as there must be, if known.

    Raises:
        StoreError: it is missing or damaged.
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
        OSError: the storage's reason.
    """
    if objects.can_list:
        keys = set(objects.list(layout.LEDGER))
        return [shard for shard in range(features.shards) if layout.ledger_key(shard) in keys]
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        there = list(pool.map(lambda shard: objects.exists(layout.ledger_key(shard)), range(features.shards)))
    return [shard for shard, recorded in enumerate(there) if recorded]


def _with_finished_shards(index: pa.Table, objects: Objects, features: FeatureLayout) -> pa.Table:
    """The index of an unfinished store, completed from the ledger as far as there are sound records."""
    shards = recorded_shards(objects, features)
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        read = partial(_outcomes, objects, features, index.schema)
        records = dict(zip(shards, pool.map(read, shards), strict=True))
    parts = []
    for shard in range(features.shards):
        rows = features.rows_of(shard)
        part = index.slice(rows.start, len(rows))
        outcomes = records.get(shard)
        # Whatever an earlier merge left in the index: only the ledger says what is done.
        parts.append(_replaced(part, _pending(part) if outcomes is None else outcomes))
    return pa.concat_tables(parts).combine_chunks()


def _outcomes(objects: Objects, features: FeatureLayout, index: pa.Schema, shard: int) -> pa.Table | None:
    """What a shard's ledger record says of its rows; None if it is damaged, as if the shard were not done.

    A resumed job does the same: it drops the record and makes the shard again.
    """
    key = layout.ledger_key(shard)
    try:
        record = read_parquet(objects.get(key))
        _check_columns(record, _OUTCOME)
        _check_columns(record, {field.name: field.type for field in index if field.name in record.column_names})
        if record["row"].to_pylist() != list(features.rows_of(shard)):
            raise ValueError("it is about other rows")
    except FileNotFoundError:  # taken out by a job since we listed it
        return None
    except ValueError as error:
        logger.warning(
            "%s: the ledger record %s is damaged: %s; its rows are taken for pending, and --resume makes them again",
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

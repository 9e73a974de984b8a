"""The ledger of a store: which shards are done, and what became of each of their rows."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.storage.parquet import read_parquet

__all__ = [
    "OUTCOME",
    "PENDING",
    "check_columns",
    "pending",
    "read_record",
    "recorded_shards",
    "rows_described",
    "with_outcomes",
]

logger = logging.getLogger(__name__)

PENDING = "pending"
# Columns of a record that this package reads. schemas/index.py has the whole schema.
OUTCOME = {
    "row": pa.int64(),
    "status": pa.string(),
    "error": pa.string(),
    "chunk_offset": pa.int64(),
    "chunk_nbytes": pa.int64(),
}


def recorded_shards(objects: Objects, features: FeatureLayout) -> list[int]:
    """The shards that have a ledger record, in order.

    Raises:
        OSError: the storage failed.
    """
    if objects.can_list:
        keys = set(objects.list(layout.LEDGER))
        return [shard for shard in range(features.shards) if layout.ledger_key(shard) in keys]
    exists = in_order(lambda shard: objects.exists(layout.ledger_key(shard)), range(features.shards))
    return [shard for shard, recorded in enumerate(exists) if recorded]


def read_record(objects: Objects, features: FeatureLayout, index: pa.Schema, shard: int) -> pa.Table:
    """The outcomes of a shard's rows in its ledger record; facts about the shard are in the table's metadata.

    After rows were appended to a store, the record of its last shard has only the rows before, until the shard is done
    again; and for a reader from before, it has more rows than the shard, which are left out.

    Args:
        objects: the store.
        features: its layout.
        index: schema of its index, with which columns of the same name agree.
        shard: number of the shard.

    Raises:
        FileNotFoundError: the shard has no record.
        ValueError: the record is damaged. The shard then counts as not done, as for a resumed job, which computes it
            again.
        OSError: the storage failed.
    """
    record = read_parquet(objects.get(layout.ledger_key(shard)))
    check_columns(record, OUTCOME)
    check_columns(record, {field.name: field.type for field in index if field.name in record.column_names})
    rows, first = features.rows_of(shard), shard * features.shard_rows
    if record["row"].to_pylist() == list(rows):
        return record
    try:
        recorded = rows_described(json.loads((record.schema.metadata or {})[layout.ATTRIBUTES_KEY.encode()]))
    except (LookupError, TypeError) as error:
        raise ValueError(f"it has no facts about its shard: {type(error).__name__}: {error}") from error
    if recorded > features.shard_rows or record["row"].to_pylist() != list(range(first, first + recorded)):
        raise ValueError("it is about other rows")
    return record.slice(0, len(rows))


def rows_described(facts: Mapping[str, Any]) -> int:
    """Number of the rows that the facts about a shard describe."""
    return int(facts["rows_ok"] + facts["rows_failed"])


def pending(index: pa.Table) -> pa.Table:
    """The index with no row done: only the ledger says what is; outcomes that an earlier merge left are ignored."""
    for name, kind in OUTCOME.items():
        if name != "row":
            value = pa.scalar(PENDING if name == "status" else None, kind)
            field = index.schema.get_field_index(name)
            index = index.set_column(field, index.schema.field(field), pa.repeat(value, index.num_rows))
    return index


def with_outcomes(index: pa.Table, records: Sequence[pa.Table]) -> pa.Table:
    """The index with the outcomes of the rows in some records."""
    if not records:
        return index
    # At once rather than shard by shard: of a million rows, a tenth of the time.
    together = pa.concat_tables([record.replace_schema_metadata(None) for record in records], promote_options="default")
    places = np.arange(index.num_rows)
    places[together["row"].to_numpy()] = index.num_rows + np.arange(together.num_rows)
    rows = pa.array(places)
    for number, field in enumerate(index.schema):
        if field.name in together.column_names and field.name != "row":
            both = pa.chunked_array([*index[field.name].chunks, *together[field.name].chunks], field.type)
            index = index.set_column(number, field, both.combine_chunks().take(rows))
    return index


def check_columns(table: pa.Table, columns: Mapping[str, pa.DataType]) -> None:
    """Check that a table has each of these columns once, with this type.

    Raises:
        ValueError: it has not; the message names the column.
    """
    for name, kind in columns.items():
        if table.column_names.count(name) != 1:
            raise ValueError(f"it has {table.column_names.count(name)} columns {name!r}, expected 1")
        if table.schema.field(name).type != kind:
            raise ValueError(f"its column {name!r} holds {table.schema.field(name).type}, expected {kind}")

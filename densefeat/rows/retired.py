"""Rows that people took out of use: their features stay in the store, and readers leave them out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.ledger import PENDING, check_columns
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet

__all__ = ["ATTRIBUTE", "RETIRED", "SCHEMA", "Retired", "read_retired", "with_retired"]

RETIRED = "retired"  # the status of such a row
ATTRIBUTE = "retired"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("since", pa.string(), nullable=False),  # UTC, for people
    ]
)


@dataclass(frozen=True)
class Retired:
    """The attribute ``retired`` of a store's root group, which says where the list of its retired rows is.

    Attributes:
        rows: number of retired rows.
        sha256: SHA-256 (hex) of the list, after which its object is named.
    """

    rows: int
    sha256: str

    @classmethod
    def of(cls, uri: str, attributes: Mapping[str, Any]) -> "Retired | None":
        """The attribute of a store; None if no row is retired.

        Raises:
            StoreError: it is damaged.
        """
        if ATTRIBUTE not in attributes:
            return None
        own = attributes[ATTRIBUTE]
        rows, digest = (own.get("rows"), own.get("sha256")) if isinstance(own, dict) else (None, None)
        if type(rows) is not int or not isinstance(digest, str) or len(own) != 2:
            raise StoreError(
                f"{uri}: the attribute retired in {layout.ATTRIBUTES} is damaged: expected rows and sha256: got {own!r}"
            )
        return cls(rows, digest)


def read_retired(objects: Objects, retired: Retired | None) -> pa.Table:
    """Read the list of retired rows, ascending (`SCHEMA`).

    Args:
        objects: the store.
        retired: its attribute, as it was when the store was opened; None: the list is empty.

    Raises:
        StoreError: the list is missing or damaged. Rows that people took out of use must not come back by that.
        OSError: the storage failed.
    """
    if retired is None:
        return SCHEMA.empty_table()
    key = layout.retired_key(retired.sha256)
    try:
        data = objects.get(key)
        if (digest := hashlib.sha256(data).hexdigest()) != retired.sha256:
            raise ValueError(f"its SHA-256 is {digest}")
        table = read_parquet(data)
        check_columns(table, {field.name: field.type for field in SCHEMA})
        if table.num_rows != retired.rows:
            raise ValueError(f"it has {table.num_rows} rows, the attribute says {retired.rows}")
    except FileNotFoundError:
        raise _damaged(objects, key, "is missing") from None
    except ValueError as error:
        raise _damaged(objects, key, f"is damaged: {error}") from error
    return table


def _damaged(objects: Objects, key: str, problem: str) -> StoreError:
    return StoreError(
        f"{objects.uri}: the list of retired rows {key} {problem}. Restore it from a copy of the store; or take all "
        "rows back with jobs/retire_rows.py --restore-all, and retire them again"
    )


def with_retired(index: pa.Table, retired: pa.Table) -> pa.Table:
    """The index with the status of rows that are retired, their reasons as errors, and no chunks.

    Rows that are pending stay so, until their shard is done.
    """
    rows = retired.filter(pc.less(retired["row"], index.num_rows))
    if rows.num_rows == 0:
        return index
    places = np.full(index.num_rows, -1)
    places[rows["row"].to_numpy()] = np.arange(rows.num_rows)
    mask = pc.and_(pa.array(places >= 0), pc.not_equal(index["status"], PENDING))
    reasons = rows["reason"].combine_chunks().take(pa.array(places, mask=places < 0))
    columns = {
        "status": pa.scalar(RETIRED),
        "error": reasons,
        "chunk_offset": pa.scalar(None, pa.int64()),
        "chunk_nbytes": pa.scalar(None, pa.int64()),
    }
    for name, values in columns.items():
        number = index.schema.get_field_index(name)
        index = index.set_column(number, index.schema.field(number), pc.if_else(mask, values, index[name]))
    return index

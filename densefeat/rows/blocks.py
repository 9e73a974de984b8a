"""Blocks of the ledger: the records of a run of shards in one object, so that readers need not fetch each.

A job writes a block when all of its shards are done. Records remain the truth: a shard whose record is gone is not
done, whatever a block says; and whoever deletes a record deletes its block first. A damaged block, or one of another
configuration, is not used, and its records are read one by one.
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.rows.ledger import OUTCOME, check_columns, rows_described
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.storage.parquet import parquet_bytes, read_parquet

__all__ = ["LedgerBlock", "block_bytes", "read_blocks"]

logger = logging.getLogger(__name__)

_METADATA_KEY = layout.ATTRIBUTES_KEY.encode()


@dataclass(frozen=True)
class LedgerBlock:
    """Some of the records in a block.

    Attributes:
        facts: of each shard, in order; with ``shard``, its number.
        outcomes: of the rows of these shards, in order.
    """

    facts: list[dict[str, Any]]
    outcomes: pa.Table

    def records(self) -> Iterator[tuple[dict[str, Any], pa.Table]]:
        """Facts and outcomes of each shard."""
        start = 0
        for facts in self.facts:
            rows = facts["rows_ok"] + facts["rows_failed"]
            yield facts, self.outcomes.slice(start, rows)
            start += rows


def block_bytes(records: Sequence[tuple[dict[str, Any], pa.Table]]) -> bytes:
    """Encode the facts and outcomes of shards as a block."""
    outcomes = pa.concat_tables([table.replace_schema_metadata(None) for _, table in records])
    return parquet_bytes(outcomes.replace_schema_metadata({_METADATA_KEY: json.dumps([facts for facts, _ in records])}))


def read_blocks(
    objects: Objects, features: FeatureLayout, shards: Collection[int], configuration_hash: str, index: pa.Schema
) -> list[LedgerBlock]:
    """Read the blocks of shards; those of a storage that cannot list are not found.

    Args:
        objects: the store.
        features: its layout.
        shards: those that have a record, and whose records are wanted.
        configuration_hash: of the store.
        index: schema of its index, with which columns of the same name agree.

    Returns:
        The records of such shards, in order. Other shards are not in a block, nor is one to which rows were appended.

    Raises:
        OSError: the storage failed.
    """
    wanted = np.zeros(features.shards, dtype=bool)
    wanted[list(shards)] = True
    numbers = np.unique(np.flatnonzero(wanted) // layout.BLOCK_SHARDS).tolist()
    keys = [layout.ledger_block_key(number) for number in numbers]
    there = set(objects.list(layout.LEDGER_BLOCKS)) if keys and objects.can_list else set()

    def read(key: str) -> LedgerBlock | None:
        try:
            block = _checked(read_parquet(objects.get(key)), features, configuration_hash, index)
        except FileNotFoundError:  # deleted by a repair since it was listed
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: %s is damaged: %s; its records are read one by one", objects.uri, key, error)
            return None
        return _restricted(block, features, wanted)

    return [block for block in in_order(read, [key for key in keys if key in there]) if block is not None]


def _checked(table: pa.Table, features: FeatureLayout, configuration_hash: str, index: pa.Schema) -> LedgerBlock:
    facts = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    check_columns(table, OUTCOME)
    check_columns(table, {field.name: field.type for field in index if field.name in table.column_names})
    starts, counts = np.array([(one["shard"] * features.shard_rows, rows_described(one)) for one in facts]).T
    rows = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    if counts.max() > features.shard_rows or not np.array_equal(table["row"].to_numpy(), np.concatenate(rows)):
        raise ValueError("it is about other rows")
    if any(one["configuration_hash"] != configuration_hash for one in facts):
        raise ValueError("it is of another configuration")
    return LedgerBlock(facts, table.replace_schema_metadata(None))


def _restricted(block: LedgerBlock, features: FeatureLayout, wanted: Any) -> LedgerBlock:
    def is_kept(facts: dict[str, Any]) -> bool:
        shard = facts["shard"]
        return shard < len(wanted) and bool(wanted[shard]) and rows_described(facts) == len(features.rows_of(shard))

    if all(map(is_kept, block.facts)):
        return block
    kept = [(facts, table) for facts, table in block.records() if is_kept(facts)]
    return LedgerBlock(
        [facts for facts, _ in kept],
        pa.concat_tables([table for _, table in kept]) if kept else block.outcomes.slice(0, 0),
    )

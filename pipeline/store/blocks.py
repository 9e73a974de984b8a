"""Write blocks of the ledger (`densefeat.rows.blocks`) as a job goes on."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pyarrow as pa

from densefeat import layout
from densefeat.rows.blocks import block_bytes
from densefeat.storage.objects import Objects
from schemas.ledger import LedgerRecord

__all__ = ["BlockWriter", "delete_block"]


class BlockWriter:
    """Collects records, and writes a block when all records of its shards are there.

    A store of no more shards than one block has no blocks: its records are few. Shards that another job makes are not
    seen: a block that is shared with it is not written, and its records are read one by one.

    Args:
        objects: the store.
        shards: number of shards of the store.
        done: records of shards that were done before.
    """

    def __init__(self, objects: Objects, shards: int, done: Iterable[LedgerRecord]) -> None:
        self._objects, self._shards = objects, shards
        self._there = set(objects.list(layout.LEDGER_BLOCKS))
        self._collected: dict[int, dict[int, LedgerRecord]] = {}
        for record in done:
            self.add(record)

    def add(self, record: LedgerRecord) -> list[LedgerRecord]:
        """Add the record of a shard.

        Returns:
            The records of the block that is now written, in less memory than before; empty if none is.

        Raises:
            OSError: the storage failed.
        """
        if self._shards <= layout.BLOCK_SHARDS:
            return []
        block = record.shard // layout.BLOCK_SHARDS
        key = layout.ledger_block_key(block)
        if key in self._there:
            return []
        records = self._collected.setdefault(block, {})
        records[record.shard] = record
        if len(records) == min(layout.BLOCK_SHARDS, self._shards - block * layout.BLOCK_SHARDS):
            ordered = [self._collected[block][shard] for shard in sorted(records)]
            self._objects.put(key, block_bytes([(record.facts(), record.outcomes) for record in ordered]))
            self._there.add(key)
            del self._collected[block]
            return _in_one_table(ordered)
        return []


def _in_one_table(records: Sequence[LedgerRecord]) -> list[LedgerRecord]:
    """The same records, with parts of one table as outcomes: a table of its own takes 11 kB, and a part of one 4."""
    together = pa.concat_tables(record.outcomes for record in records).combine_chunks()
    parts, start = [], 0
    for record in records:
        parts.append(replace(record, outcomes=together.slice(start, len(record.outcomes))))
        start += len(record.outcomes)
    return parts


def delete_block(objects: Objects, shard: int) -> None:
    """Delete the block of a shard, before its record is deleted."""
    objects.delete(layout.ledger_block_key(shard // layout.BLOCK_SHARDS))

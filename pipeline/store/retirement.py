"""Take rows out of use, and back: in the list that readers apply to the index (`densefeat.rows.retired`).

The list is an object named after its digest, and the root's metadata says which one counts: they are replaced with one
write. Neither shards nor index nor ledger change, so rows keep their numbers, and jobs that repair or extend the store
need not know. The list before stays, for readers that have the store open.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.retired import SCHEMA, Retired, read_retired
from densefeat.storage.metadata import own_attributes, read_root
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes

__all__ = ["add", "restore", "restore_all", "retire"]

_ATTRIBUTE = "retired"


def retire(objects: Objects, rows: Collection[int], reason: str, check: Callable[[], None] = lambda: None) -> int:
    """Take rows out of use. Those that are out of use already keep their reason.

    Args:
        objects: the store, whose lease the caller holds.
        rows: their numbers, which the store has.
        reason: for people.
        check: called before the change; raises if the lease is lost.

    Returns:
        Number of rows that were in use before.

    Raises:
        StoreError: there is no store, or its list of retired rows is damaged.
    """
    own = sorted(set(rows))
    since = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return add(objects, pa.table([own, [reason] * len(own), [since] * len(own)], schema=SCHEMA), check)


def add(objects: Objects, retired: pa.Table, check: Callable[[], None] = lambda: None) -> int:
    """Take the rows of a list (`densefeat.rows.retired.SCHEMA`) out of use; the rest is as for `retire`."""
    before = _read(objects)
    new = retired.filter(pc.invert(pc.is_in(retired["row"], before["row"].combine_chunks())))
    if len(new):
        _replace(objects, pa.concat_tables([before, new]).sort_by("row"), check)
    return len(new)


def restore(objects: Objects, rows: Collection[int], check: Callable[[], None] = lambda: None) -> int:
    """Take rows back into use; arguments and errors as for `retire`.

    Returns:
        Number of rows that were out of use before.
    """
    before = _read(objects)
    kept = before.filter(pc.invert(pc.is_in(before["row"], pa.array(list(rows), pa.int64()))))
    if len(kept) < len(before):
        _replace(objects, kept, check)
    return len(before) - len(kept)


def restore_all(objects: Objects, check: Callable[[], None] = lambda: None) -> None:
    """Take all rows back into use, also if their list is damaged; arguments as for `retire`."""
    _replace(objects, SCHEMA.empty_table(), check)


def _read(objects: Objects) -> pa.Table:
    attributes = own_attributes(objects.uri, read_root(objects))
    return read_retired(objects, Retired.of(objects.uri, attributes)).cast(SCHEMA)


def _replace(objects: Objects, table: pa.Table, check: Callable[[], None]) -> None:
    root = read_root(objects)
    own = root["attributes"][layout.ATTRIBUTES_KEY]
    kept = set[str]()
    with suppress(StoreError):  # damaged, and replaced
        if before := Retired.of(objects.uri, own):
            kept.add(layout.retired_key(before.sha256))
    own.pop(_ATTRIBUTE, None)
    if len(table):
        data = parquet_bytes(table)
        now = Retired(len(table), hashlib.sha256(data).hexdigest())
        own[_ATTRIBUTE] = asdict(now)
        objects.put(key := layout.retired_key(now.sha256), data)
        kept.add(key)
    check()
    objects.put(layout.ATTRIBUTES, json.dumps(root, indent=2).encode())
    for key in set(objects.list(layout.RETIRED)) - kept:
        objects.delete(key)

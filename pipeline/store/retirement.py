"""Take rows out of use, and back: in the list that readers apply to the index (`densefeat.rows.retired`).

The list is an object named after its digest, and the root's metadata says which one counts: they are replaced with one
write. Neither shards nor index nor ledger change, so rows keep their numbers, and jobs that repair or extend the store
need not know. Lists of before stay, for readers that have the store open: they are small.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.rows.index import stored_index
from densefeat.rows.retired import ATTRIBUTE, RETIRED, SCHEMA, Retired, read_retired
from densefeat.storage.metadata import own_attributes, read_root
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes

__all__ = ["add", "restore", "restore_all", "retire", "without_features"]


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
    return add(objects, pa.table([own, [reason] * len(own), [_now()] * len(own)], schema=SCHEMA), check)


def add(objects: Objects, retired: pa.Table, check: Callable[[], None] = lambda: None) -> int:
    """Take the rows of a list (`densefeat.rows.retired.SCHEMA`) out of use; the rest is as for `retire`."""
    before = _read(objects)
    new = retired.filter(pc.invert(pc.is_in(retired["row"], before["row"].combine_chunks())))
    if len(new):
        _replace(objects, pa.concat_tables([before, new]).sort_by("row"), check)
    return len(new)


def restore(objects: Objects, rows: Collection[int], check: Callable[[], None] = lambda: None) -> int:
    """Take rows back into use, but those that have no features here; arguments and errors as for `retire`.

    Returns:
        Number of rows that are in use again.
    """
    before, gone = _read(objects), without_features(objects)
    restored = pc.is_in(before["row"], pa.array(sorted(set(rows) - gone.keys()), pa.int64()))
    kept = before.filter(pc.invert(restored))
    if len(kept) < len(before):
        _replace(objects, kept, check)
    return len(before) - len(kept)


def restore_all(objects: Objects, check: Callable[[], None] = lambda: None) -> None:
    """Take all rows back into use, but those that have no features here; also if their list is damaged.

    Arguments as for `retire`.
    """
    gone = without_features(objects)
    kept = [sorted(gone), [gone[row] for row in sorted(gone)], [_now()] * len(gone)]
    _replace(objects, pa.table(kept, schema=SCHEMA), check)


def without_features(objects: Objects) -> dict[int, str]:
    """Rows that were retired when the store was converted or merged, which has nothing of them but the reason."""
    index = stored_index(objects)
    rows = index.filter(pc.equal(index["status"], RETIRED))
    return dict(zip(rows["row"].to_pylist(), rows["error"].to_pylist(), strict=True))


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _read(objects: Objects) -> pa.Table:
    attributes = own_attributes(objects.uri, read_root(objects))
    return read_retired(objects, Retired.of(objects.uri, attributes)).cast(SCHEMA)


def _replace(objects: Objects, table: pa.Table, check: Callable[[], None]) -> None:
    root = read_root(objects)
    own = root["attributes"][layout.ATTRIBUTES_KEY]
    own.pop(ATTRIBUTE, None)
    if len(table):
        data = parquet_bytes(table)
        now = Retired(len(table), hashlib.sha256(data).hexdigest())
        own[ATTRIBUTE] = asdict(now)
        objects.put(layout.retired_key(now.sha256), data)
    check()
    objects.put(layout.ATTRIBUTES, json.dumps(root, indent=2).encode())

"""Append rows to a finished store: claim them with one object, from which everything else follows.

The claim has the references of all rows, old and new. It is created, so that only one job can append to a store of so
many rows, and the rest is written in this order:

1. The manifest is deleted: the store is unfinished, and what is done is in the ledger.
2. The index is replaced by that of all rows, all pending. Readers leave out rows that the arrays do not have.
3. The metadata of the arrays gets the new number of rows; that of the features last.
4. The block of the ledger that has the last shard is deleted: the shard may have more rows now.
5. The root's metadata gets the new number of rows, the source and the class names. From now on readers see the rows.
6. The claim is deleted.

Each step can be done again. A job that continues the store looks for a claim first, and does them all.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from densefeat import layout
from densefeat.storage.metadata import read_layout, read_root
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from pipeline.errors import JobError
from pipeline.images.listing.source import keys_digest
from pipeline.store.blocks import delete_block
from schemas.attributes import AppendedSource, StoreAttributes
from schemas.index import REFERENCES, pending_index

__all__ = ["Growth", "begun_growth", "complete_growth", "grow", "has_keys_of"]

_METADATA_KEY = layout.ATTRIBUTES_KEY.encode()


@dataclass(frozen=True, eq=False)
class Growth:
    """Rows that are to be appended to a store.

    Attributes:
        rows_before: number of rows of the store.
        references: of all rows, those before and the new ones (``schemas.index.REFERENCES``).
        class_names: of all labels.
        appended: sources that were appended, the last of which has the new rows.
    """

    rows_before: int
    references: pa.Table
    class_names: tuple[str, ...]
    appended: tuple[AppendedSource, ...]

    @property
    def rows_added(self) -> int:
        """Number of new rows."""
        return len(self.references) - self.rows_before

    def to_bytes(self) -> bytes:
        """Encode as a Parquet file."""
        facts = {
            "rows_before": self.rows_before,
            "class_names": list(self.class_names),
            "appended": [asdict(source) for source in self.appended],
        }
        return parquet_bytes(self.references.replace_schema_metadata({_METADATA_KEY: json.dumps(facts)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Growth":
        """Decode.

        Raises:
            ValueError: the bytes are not those of a growth.
        """
        try:
            table = read_parquet(data)
            facts = json.loads(table.schema.metadata[_METADATA_KEY])
            return cls(
                rows_before=facts["rows_before"],
                references=table.replace_schema_metadata(None).cast(REFERENCES),
                class_names=tuple(facts["class_names"]),
                appended=tuple(AppendedSource(**source) for source in facts["appended"]),
            )
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not rows to append: {error}") from error


def begun_growth(objects: Objects) -> Growth | None:
    """The growth that a job began and did not complete; None if there is none.

    Raises:
        JobError: its claim is damaged.
        StoreError: the metadata of the store is damaged.
    """
    rows = read_layout(objects, read_root(objects)).rows
    key = layout.growth_key(rows)
    try:
        return Growth.from_bytes(objects.get(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise JobError(
            f"{objects.uri}: {key} is damaged: {error}. Delete it, run jobs/verify_store.py --repair, and append again"
        ) from error


def grow(objects: Objects, growth: Growth, check: Callable[[], None] = lambda: None) -> None:
    """Append rows; afterwards they are pending.

    Args:
        objects: the store.
        growth: the rows; those of `begun_growth`, or of a plan.
        check: called before what other jobs rely on is changed; raises if this job is to end.

    Raises:
        JobError: the store is not the one that the rows were planned for.
    """
    root = read_root(objects)
    features = read_layout(objects, root)
    key = layout.growth_key(growth.rows_before)
    if features.rows != growth.rows_before or not (objects.exists(key) or objects.exists(layout.MANIFEST)):
        raise JobError(f"{objects.uri}: another job appended images in the meantime: run the same command again")
    if "consolidated_metadata" not in root:  # which shows the new rows to readers
        raise JobError(
            f"{objects.uri}: a store that an early version of densefeat made cannot grow: make a new one of all "
            f"images, with --pca {objects.uri}"
        )
    check()
    try:
        objects.create(key, growth.to_bytes())
    except FileExistsError:
        raise JobError(f"{objects.uri}: another job began to append other images: run the same command again") from None
    objects.delete(layout.MANIFEST)
    objects.put(layout.INDEX, parquet_bytes(pending_index(growth.references)))
    for array in (*layout.COMPANIONS, layout.FEATURES):
        document = f"{array}/{layout.ATTRIBUTES}"
        if array == layout.FEATURES or objects.exists(document):
            metadata = json.loads(objects.get(document))
            objects.put(document, _json(_with_rows(metadata, len(growth.references))))
    delete_block(objects, features.shards - 1)
    check()
    objects.put(layout.ATTRIBUTES, _json(_grown_root(root, growth)))
    objects.delete(key)
    objects.delete_folder(layout.GROWTH)


def complete_growth(objects: Objects) -> None:
    """Append the rows that a job began to append and did not complete; does nothing if there are none.

    Raises:
        JobError: as for `begun_growth`.
    """
    if (growth := begun_growth(objects)) is not None:
        grow(objects, growth)


def has_keys_of(attributes: StoreAttributes, references: pa.Table) -> bool:
    """Whether the images are those of a store's sources, in order."""
    if len(references) != attributes.rows:
        return False
    first, start = attributes.configuration.source, 0
    for rows, digest in ((first.rows, first.keys_sha256), *((s.rows, s.keys_sha256) for s in attributes.appended)):
        if keys_digest(references.slice(start, rows)) != digest:
            return False
        start += rows
    return True


def _grown_root(root: dict[str, Any], growth: Growth) -> dict[str, Any]:
    own = root["attributes"][layout.ATTRIBUTES_KEY]
    own["class_names"] = list(growth.class_names)
    own["appended"] = [asdict(source) for source in growth.appended]
    below = root.get("consolidated_metadata", {}).get("metadata", {})
    for array in (layout.FEATURES, *layout.COMPANIONS):
        if array in below:
            _with_rows(below[array], len(growth.references))
    return root


def _with_rows(metadata: dict[str, Any], rows: int) -> dict[str, Any]:
    metadata["shape"][0] = rows
    return metadata


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()

"""Repair what `pipeline.store.verify` reports: delete damaged shards, and rebuild index and manifest."""

from collections.abc import Sequence

import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.index import stored_index
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.images.listing.source import keys_digest, list_images
from pipeline.store.layout import finish, reopen, stored_attributes
from pipeline.store.shard import finished_shards, withdraw
from schemas.configuration import SourceConfiguration
from schemas.index import REFERENCES, pending_index

__all__ = ["rebuild_tables", "take_out"]


def take_out(objects: Objects, shards: Sequence[int]) -> None:
    """Delete damaged shards: their rows become pending, and a resumed job makes them again."""
    for shard in shards:
        withdraw(objects, shard)
    reopen(objects)


def rebuild_tables(objects: Objects, damaged: Sequence[int]) -> bool:
    """Rebuild the index from the images and the ledger, and the manifest if all shards are done.

    Damaged shards are deleted as by `take_out`, after a check that the index can be rebuilt.

    The images of the rows are read from the index. If it is damaged, they are listed again at the location in the
    store's configuration.

    Returns:
        Whether the store is finished.

    Raises:
        JobError: the images are gone, or are not those that the store was made of; nothing was changed. Or a ledger
            record is damaged, or has another configuration.
        StoreError: there is no store, or its attributes are damaged.
    """
    store = FeatureStore(objects.uri, objects.storage_options)
    source = stored_attributes(objects.uri, store.attributes).configuration.source
    references = _references(objects, store.layout.rows, source)
    for shard in damaged:
        withdraw(objects, shard)
    for key in objects.list(layout.LEDGER_BLOCKS):  # derived from the records, which remain
        objects.delete(key)
    objects.delete(layout.MANIFEST)  # first: until the index is rebuilt, the ledger says which rows are done
    objects.put(layout.INDEX, parquet_bytes(pending_index(references)))
    records = finished_shards(objects, store.attributes["configuration_hash"])
    if len(records) < store.layout.shards:
        return False
    finish(objects, list(records.values()))
    return True


def _references(objects: Objects, rows: int, source: SourceConfiguration) -> pa.Table:
    """The images of the store, one per row (``schemas.index.REFERENCES``)."""
    try:
        index = stored_index(objects, features)
        if keys_digest(index) == source.keys_sha256:
            return index.select(REFERENCES.names).cast(REFERENCES)
    except (StoreError, ValueError, KeyError):  # the index is damaged, perhaps in columns that only this code reads
        pass
    try:
        listed = list_images(source.images, limit=source.limit, image_column=source.image_column)
    except JobError as error:
        raise JobError(
            f"the index of {objects.uri} cannot be rebuilt: its images {source.images} cannot be listed: {error} "
            f"Put them back, or copy {layout.INDEX} from a copy of the store"
        ) from error
    if listed.references.num_rows != rows or keys_digest(listed.references) != source.keys_sha256:
        raise JobError(
            f"the index of {objects.uri} cannot be rebuilt: {source.images} holds other images than the store was "
            f"made of ({listed.references.num_rows:,} instead of {rows:,}, or other names). Put the original images "
            f"back, or copy {layout.INDEX} from a copy of the store"
        )
    return listed.references

"""Repair what `pipeline.store.verify` reports: delete damaged shards, and rebuild index and manifest."""

from collections.abc import Sequence

import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.layout import FeatureLayout
from densefeat.rows.index import stored_index
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.images.listing.source import list_images
from pipeline.images.new_rows import with_labels_of, without_keys
from pipeline.store.appending.growth import complete_growth, has_keys_of
from pipeline.store.blocks import delete_block
from pipeline.store.layout import finish, reopen, stored_attributes
from pipeline.store.shard import finished_shards
from schemas.attributes import StoreAttributes
from schemas.index import REFERENCES, pending_index

__all__ = ["rebuild_tables", "take_out", "withdraw"]


def take_out(objects: Objects, shards: Sequence[int]) -> None:
    """Delete damaged shards: their rows become pending, and a resumed job makes them again."""
    complete_growth(objects)
    for shard in shards:
        withdraw(objects, shard)
    reopen(objects)


def withdraw(objects: Objects, shard: int) -> None:
    """Delete a damaged shard, so that a resumed job makes it again. Not safe while jobs write to the store.

    The objects are deleted first: a record without them does not count as done, and is still reported as damaged.
    """
    delete_block(objects, shard)
    for array in (layout.FEATURES, *layout.COMPANIONS):
        objects.delete(layout.shard_key(shard, array))
    objects.delete(layout.ledger_key(shard))


def rebuild_tables(objects: Objects, damaged: Sequence[int]) -> bool:
    """Rebuild the index from the images and the ledger, and the manifest if all shards are done.

    Damaged shards are deleted as by `take_out`, after a check that the index can be rebuilt.

    The images of the rows are read from the index. If it is damaged, they are listed again at the locations in the
    store's attributes. Rows that a killed job began to append are appended first.

    Returns:
        Whether the store is finished.

    Raises:
        JobError: the images are gone, or are not those that the store was made of; nothing was changed. Or a ledger
            record is damaged, or has another configuration.
        StoreError: there is no store, or its attributes are damaged.
    """
    complete_growth(objects)
    store = FeatureStore(objects.uri, objects.storage_options)
    references = _references(objects, store.layout, stored_attributes(objects.uri, store.attributes))
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


def _references(objects: Objects, features: FeatureLayout, attributes: StoreAttributes) -> pa.Table:
    """The images of the store, one per row (``schemas.index.REFERENCES``)."""
    try:
        index = stored_index(objects, features)
        if has_keys_of(attributes, index):
            return index.select(REFERENCES.names).cast(REFERENCES)
    except (StoreError, ValueError, KeyError):  # the index is damaged, perhaps in columns that only this code reads
        pass
    references, images = REFERENCES.empty_table(), ", ".join(dict.fromkeys(attributes.sources))
    first = attributes.configuration.source
    try:
        for location, rows in ((first.images, first.rows), *((one.images, one.rows) for one in attributes.appended)):
            limit = first.limit if not references.num_rows else None
            source = list_images(location, limit=limit, image_column=first.image_column)
            listed = with_labels_of(source, attributes.class_names)
            if attributes.appended:
                listed = without_keys(listed, references).slice(0, rows)
            references = pa.concat_tables([references, listed])
    except JobError as error:
        raise JobError(
            f"the index of {objects.uri} cannot be rebuilt: its images {images} cannot be listed: {error} "
            f"Put them back, or copy {layout.INDEX} from a copy of the store"
        ) from error
    if not has_keys_of(attributes, references):
        raise JobError(
            f"the index of {objects.uri} cannot be rebuilt: {images} holds other images than the store was "
            f"made of ({references.num_rows:,} instead of {features.rows:,}, or other names). Put the original images "
            f"back, or copy {layout.INDEX} from a copy of the store"
        )
    return references.combine_chunks()

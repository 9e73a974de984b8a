"""Write a store: set it up once, write shards in any order from any machine (`pipeline.store.shard`), finish it.

Setup begins with a *claim*: a ``zarr.json``, created only if there is none, that holds the configuration of the store
and the fitted basis and steps. Everything else that setup writes is derived from the claim, and is created but never
replaced; only ``zarr.json`` itself is replaced at the end. So it does not matter whether the job that made the claim is
alive, slow or dead: any job with the same configuration can complete the setup, all of them write the same bytes, and
none of them can overwrite later changes. A job with another configuration is refused.
"""

import base64
import io
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.layout import FeatureLayout
from densefeat.rows.index import stored_index
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.storage.parquet import parquet_bytes
from densefeat.store import read_attributes
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.io.storage import CHECK
from pipeline.store.documents import zarr_documents
from pipeline.store.reports import card_is_made
from schemas.attributes import StoreAttributes
from schemas.index import REFERENCES, pending_index, with_outcomes
from schemas.ledger import LedgerRecord, manifest

# Attribute that only the claim has, next to the store's own attributes.
_SETUP_KEY = f"{layout.ATTRIBUTES_KEY}_setup"

# Temporary objects: probes of the storage, leases of jobs, and half-written objects of earlier versions.
_TEMPORARY = rf"{re.escape(CHECK)}/[0-9a-f]{{32}}|{layout.JOB_KEY}|_tmp/[^/]+"
# Every key that a store can have.
_OWN_KEY = re.compile(
    "|".join(
        (
            *map(re.escape, (layout.ATTRIBUTES, layout.INDEX, layout.MANIFEST)),
            rf"{re.escape(layout.LEDGER)}/\d{{6,}}\.parquet",
            rf"{re.escape(layout.LEDGER_BLOCKS)}/\d{{6,}}\.parquet",
            rf"{re.escape(layout.INTENTS)}/\d{{6,}}-[0-9a-f]{{64}}\.parquet",
            *(rf"{re.escape(name)}/(zarr\.json|c/\d+/0(/0/0)?)" for name in (layout.FEATURES, *layout.COMPANIONS)),
            rf"{re.escape(layout.STEP)}/(zarr\.json|c/0)",
            rf"{re.escape(layout.PCA)}/(\w+/)?zarr\.json",
            rf"{re.escape(layout.PCA)}/\w+/c/0(/0)?",
            rf"{re.escape(layout.UPSAMPLER)}/(\w+/)?zarr\.json",
            rf"{re.escape(layout.UPSAMPLER)}/\w+/c/0(/0)*",
            rf"{re.escape(layout.GROWTH)}/(rows-\d{{9,}}\.parquet|shard-\d{{6,}}-\d+\.npz)",
            rf"{re.escape(layout.RETIRED)}/[0-9a-f]{{64}}\.parquet",
            layout.REPORT_KEY,
            _TEMPORARY,
        )
    )
)


def existing_store(objects: Objects) -> StoreAttributes | None:
    """Attributes of the store at this location; None if it has no ``zarr.json``.

    Raises:
        StoreError: ``zarr.json`` is damaged, or is not that of a densefeat store of this format version.
    """
    if not objects.exists(layout.ATTRIBUTES):
        return None
    return stored_attributes(objects.uri, read_attributes(objects))


def stored_attributes(uri: str, attributes: Mapping[str, Any]) -> StoreAttributes:
    """Convert a reader's attributes (`densefeat.FeatureStore.attributes`) to `StoreAttributes`.

    Raises:
        StoreError: the attributes are damaged.
    """
    try:
        return StoreAttributes.from_dict(attributes)
    except ValueError as error:
        raise StoreError(f"{uri}: the attributes in {layout.ATTRIBUTES} are damaged: {error}") from error


def foreign_keys(objects: Objects) -> list[str]:
    """Keys at the store's location that no store can have; a text about it may lie there."""
    return [key for key in objects.list() if not _OWN_KEY.fullmatch(key) and key != layout.CARD]


def remains(objects: Objects) -> list[str]:
    """Keys of a store at this location; without a ``zarr.json``, they are left over from a deletion or a copy."""
    return [key for key in objects.list() if _OWN_KEY.fullmatch(key) and not re.fullmatch(_TEMPORARY, key)]


def delete_store(objects: Objects) -> None:
    """Delete a store and nothing else: objects with any other name are kept, and so are the leases of jobs.

    ``zarr.json`` is deleted last, so that an interrupted deletion leaves something that is still recognized as a store.
    The manifest is deleted first, and the ledger after the shards, so that such a store does not look complete.
    """
    kept = re.compile(rf"{re.escape(layout.ATTRIBUTES)}|{layout.JOB_KEY}")
    own = [key for key in objects.list() if _OWN_KEY.fullmatch(key) and not kept.fullmatch(key)]
    objects.delete(layout.MANIFEST)
    if card_is_made(objects):
        objects.delete(layout.CARD)
    data = tuple(f"{name}/" for name in (layout.FEATURES, *layout.COMPANIONS))
    _delete_all(objects, [key for key in own if key.startswith(data)])
    _delete_all(objects, own)
    objects.delete(layout.ATTRIBUTES)


def set_up(
    objects: Objects,
    attributes: StoreAttributes,
    features: FeatureLayout,
    basis: Basis,
    step: np.ndarray[Any, Any] | None,
    index: pa.Table,
) -> StoreAttributes:
    """Write everything except shards. Afterwards the store can be opened, and every row is pending.

    Args:
        objects: the store's location.
        attributes: its attributes, with ``setup_complete`` False.
        features: shape and sharding of the feature array.
        basis: PCA basis.
        step: quantization steps, [k] float32, for int8; None for float16.
        index: ``schemas.index.pending_index`` of the source.

    Returns:
        The attributes as stored, with ``setup_complete`` True.

    Raises:
        FileExistsError: another job set up a store here in the meantime.
    """
    claim(objects, attributes, basis, step)
    return complete_setup(objects, features, index)


def claim(
    objects: Objects,
    attributes: StoreAttributes,
    basis: Basis,
    step: np.ndarray[Any, Any] | None,
    upsampler: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> None:
    """Begin to set up a store: this fixes its configuration, basis, steps and the arrays of a fitted upsampler.

    Arguments as for `set_up`.

    Raises:
        FileExistsError: there is a ``zarr.json`` already.
    """
    outcome = io.BytesIO()
    arrays: dict[str, Any] = {**basis.__dict__, **({} if step is None else {layout.STEP: step})}
    arrays |= {f"{layout.UPSAMPLER}/{name}": array for name, array in upsampler.items()}
    np.savez(outcome, **arrays)
    setup = {"by": uuid.uuid4().hex, "npz": base64.b64encode(outcome.getvalue()).decode()}
    document = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {**attributes.to_dict(), _SETUP_KEY: setup},
    }
    objects.create(layout.ATTRIBUTES, json.dumps(document, indent=2).encode())


def complete_setup(objects: Objects, features: FeatureLayout, index: pa.Table) -> StoreAttributes:
    """Complete the setup that a claim began, if it is not complete; any job with the same configuration may do so.

    Returns:
        The attributes as stored, with ``setup_complete`` True.

    Raises:
        FileExistsError: another job deleted the claim or replaced the store in the meantime.
        JobError: an earlier version of densefeat began the setup and did not complete it.
    """
    claimed = objects.get(layout.ATTRIBUTES)
    attributes = StoreAttributes.from_dict(read_attributes(objects))
    if attributes.setup_complete:
        return attributes
    documents = zarr_documents(attributes.completed(), features, *_claimed_outcome(objects, claimed))
    root = documents.pop(layout.ATTRIBUTES)
    for key, data in {layout.INDEX: parquet_bytes(index), **documents}.items():
        with suppress(FileExistsError):  # written by another job that completes this setup
            objects.create(key, data)
    if objects.get(layout.ATTRIBUTES) == claimed:
        objects.put(layout.ATTRIBUTES, root)
    stored = existing_store(objects)
    if stored is None or stored != attributes.completed():
        raise FileExistsError(f"another job replaced the store {objects.uri}")
    return stored


def _claimed_outcome(
    objects: Objects, claimed: bytes
) -> tuple[Basis, np.ndarray[Any, Any] | None, dict[str, np.ndarray[Any, Any]]]:
    """Read basis, steps and the arrays of a fitted upsampler from a claim."""
    setup = json.loads(claimed)["attributes"].get(_SETUP_KEY)
    if setup is None:
        raise JobError(
            f"{objects.uri}: a job of an earlier version of densefeat began to set it up and did not finish: use "
            "--overwrite"
        )
    with np.load(io.BytesIO(base64.b64decode(setup["npz"])), allow_pickle=False) as arrays:
        outcome = dict(arrays)
    step = outcome.pop(layout.STEP, None)
    prefix = f"{layout.UPSAMPLER}/"
    upsampler = {name.removeprefix(prefix): outcome.pop(name) for name in list(outcome) if name.startswith(prefix)}
    return Basis(**outcome), step, upsampler


def _delete_all(objects: Objects, keys: Iterable[str]) -> None:
    for _ in in_order(objects.delete, keys):
        pass


def reopen(objects: Objects) -> None:
    """Mark a finished store as unfinished, before a shard is rewritten; does nothing if it is not finished.

    Every row is pending until the record of its shard says otherwise.
    """
    if objects.exists(layout.MANIFEST):
        index = stored_index(objects)
        objects.delete(layout.MANIFEST)
        objects.put(layout.INDEX, parquet_bytes(pending_index(index.select(REFERENCES.names))))


def finish(objects: Objects, records: Sequence[LedgerRecord]) -> None:
    """Merge the outcomes of all shards into the index and write the manifest, which makes the store complete."""
    ordered = sorted(records, key=lambda record: record.shard)
    merged = with_outcomes(stored_index(objects), pa.concat_tables(record.outcomes for record in ordered))
    objects.put(layout.INDEX, parquet_bytes(merged))
    objects.put(layout.MANIFEST, parquet_bytes(manifest(ordered)))
    for folder in (layout.INTENTS, layout.GROWTH):  # left by killed jobs; no longer needed
        _delete_all(objects, objects.list(folder))
        objects.delete_folder(folder)
    objects.sweep()

"""Writing a store: set it up once, write shards in any order from anywhere (`pipeline.store.shard`), finish it.

Setting up begins with a *claim*: ``zarr.json``, created if and only if there is none, that says what was asked for, and
holds what came of it (basis and steps). All that setting up writes follows from the claim, and is created and never
replaced, but for ``zarr.json`` itself at the end. So it does not matter whether the claim's job is alive, slow or dead:
any job that asks for the same completes the setup, all of them write the same, and none of them can spoil what came
after it. A job that asks for something else is refused.
"""

import base64
import hashlib
import io
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.index import stored_index
from densefeat.layout import FeatureLayout
from densefeat.parquet import parquet_bytes
from densefeat.storage.objects import Objects
from densefeat.store import read_attributes
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.io.storage import CHECK
from pipeline.store.documents import zarr_documents
from pipeline.store.shard import in_parallel
from schemas.attributes import StoreAttributes
from schemas.index import REFERENCES, pending_index, with_outcomes
from schemas.ledger import LedgerRecord, manifest

# Beside the store's own attributes, in the claim only.
_SETUP_KEY = f"{layout.ATTRIBUTES_KEY}_setup"


# What is there for a moment only, or was: probes, and half-written objects of earlier versions.
_PASSING = rf"{re.escape(CHECK)}/[0-9a-f]{{32}}|_tmp/[^/]+"
# Every key that a store can have.
_OWN_KEY = re.compile(
    "|".join(
        (
            *map(re.escape, (layout.ATTRIBUTES, layout.INDEX, layout.MANIFEST)),
            rf"{re.escape(layout.LEDGER)}/\d{{6,}}\.parquet",
            rf"{re.escape(layout.INTENTS)}/\d{{6,}}-[0-9a-f]{{64}}\.parquet",
            rf"{re.escape(layout.FEATURES)}/(zarr\.json|c/\d+/0/0/0)",
            rf"{re.escape(layout.STEP)}/(zarr\.json|c/0)",
            rf"{re.escape(layout.PCA)}/(\w+/)?zarr\.json",
            rf"{re.escape(layout.PCA)}/\w+/c/0(/0)?",
            _PASSING,
        )
    )
)


def existing_store(objects: Objects) -> StoreAttributes | None:
    """Attributes of the store that is there, None if nothing is.

    Raises:
        StoreError: what is there is not a densefeat store, or one of another format version, or damaged.
    """
    if not objects.exists(layout.ATTRIBUTES):
        return None
    return stored_attributes(objects.uri, read_attributes(objects))


def stored_attributes(uri: str, attributes: Mapping[str, Any]) -> StoreAttributes:
    """Attributes as a reader has them (`densefeat.FeatureStore.attributes`), typed.

    Raises:
        StoreError: they are damaged.
    """
    try:
        return StoreAttributes.from_dict(attributes)
    except ValueError as error:
        raise StoreError(f"{uri}: the attributes in {layout.ATTRIBUTES} are damaged: {error}") from error


def foreign_keys(objects: Objects) -> list[str]:
    """What lies at the store's place and is not a part of any store."""
    return [key for key in objects.list() if not _OWN_KEY.fullmatch(key)]


def remains(objects: Objects) -> list[str]:
    """Keys of a store at the place; without a ``zarr.json`` they are what a deletion or a copy left."""
    return [key for key in objects.list() if _OWN_KEY.fullmatch(key) and not re.fullmatch(_PASSING, key)]


def delete_store(objects: Objects) -> None:
    """Remove a store and nothing else: what has another name stays, whatever it is.

    ``zarr.json`` goes last: a deletion that is interrupted leaves what is still known as a store; and the ledger after
    the objects that it is of, so that what is left is not taken for done.
    """
    own = [key for key in objects.list() if _OWN_KEY.fullmatch(key) and key != layout.ATTRIBUTES]
    objects.delete(layout.MANIFEST)
    in_parallel(objects.delete, [key for key in own if key.startswith(f"{layout.FEATURES}/")])
    in_parallel(objects.delete, own)
    objects.delete(layout.ATTRIBUTES)


def set_up(
    objects: Objects,
    attributes: StoreAttributes,
    features: FeatureLayout,
    basis: Basis,
    step: np.ndarray[Any, Any] | None,
    index: pa.Table,
) -> StoreAttributes:
    """Write everything but shards; afterwards the store can be opened, and every row is pending.

    Args:
        objects: where the store goes.
        attributes: with ``setup_complete`` False.
        features: shape and cutting.
        basis: PCA basis.
        step: [k] float32 for int8, else None.
        index: ``schemas.index.pending_index`` of the source.

    Raises:
        FileExistsError: somebody else set up a store here in the meantime.
    """
    claim(objects, attributes, basis, step)
    return complete_setup(objects, features, index)


def claim(objects: Objects, attributes: StoreAttributes, basis: Basis, step: np.ndarray[Any, Any] | None) -> None:
    """Begin to set up a store: from here on it is settled what it will be. Arguments as for `set_up`.

    Raises:
        FileExistsError: somebody else was first.
    """
    outcome = io.BytesIO()
    arrays: dict[str, Any] = {**basis.__dict__, **({} if step is None else {layout.STEP: step})}
    np.savez(outcome, **arrays)
    setup = {"by": uuid.uuid4().hex, "npz": base64.b64encode(outcome.getvalue()).decode()}
    document = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {**attributes.to_dict(), _SETUP_KEY: setup},
    }
    objects.create(layout.ATTRIBUTES, json.dumps(document, indent=2).encode())


def complete_setup(objects: Objects, features: FeatureLayout, index: pa.Table) -> StoreAttributes:
    """Write what follows from the claim that is there, unless it is written; any job that asks for the same may do it.

    Raises:
        FileExistsError: somebody else deleted the claim and set up a store here in the meantime.
        JobError: an earlier version of densefeat made the claim, and did not live to complete it.
    """
    claimed = objects.get(layout.ATTRIBUTES)
    attributes = StoreAttributes.from_dict(read_attributes(objects))
    if attributes.setup_complete:
        return attributes
    basis, step = _claimed_outcome(objects, claimed)
    documents = zarr_documents(attributes.completed(), features, basis, step)
    root = documents.pop(layout.ATTRIBUTES)
    for key, data in {layout.INDEX: parquet_bytes(index), **documents}.items():
        with suppress(FileExistsError):  # of another job that completes this setup
            objects.create(key, data)
    if objects.get(layout.ATTRIBUTES) == claimed:
        objects.put(layout.ATTRIBUTES, root)
    stored = existing_store(objects)
    if stored is None or stored != attributes.completed():
        raise FileExistsError(f"another job replaced the store {objects.uri}")
    return stored


def _claimed_outcome(objects: Objects, claimed: bytes) -> tuple[Basis, np.ndarray[Any, Any] | None]:
    """Basis and steps out of a claim."""
    setup = json.loads(claimed)["attributes"].get(_SETUP_KEY)
    if setup is None:
        raise JobError(
            f"{objects.uri}: a job of an earlier version of densefeat began to set it up and did not finish: use "
            "--overwrite"
        )
    with np.load(io.BytesIO(base64.b64decode(setup["npz"])), allow_pickle=False) as arrays:
        outcome = dict(arrays)
    step = outcome.pop(layout.STEP, None)
    return Basis(**outcome), step


def step_sha256(step: np.ndarray[Any, Any] | None) -> str | None:
    """Digest of the quantization steps, None for float16."""
    return None if step is None else hashlib.sha256(step.astype("<f4").tobytes()).hexdigest()


def reopen(objects: Objects) -> None:
    """Make a finished store unfinished again, because a shard of it is to be made anew: every row is pending until
    its shard's record says otherwise. Nothing happens to a store that is not finished.
    """
    if objects.exists(layout.MANIFEST):
        index = stored_index(objects)
        objects.delete(layout.MANIFEST)
        objects.put(layout.INDEX, parquet_bytes(pending_index(index.select(REFERENCES.names))))


def finish(objects: Objects, records: Sequence[LedgerRecord]) -> None:
    """Merge the outcomes of all shards into the index, and write the manifest: the store is complete."""
    ordered = sorted(records, key=lambda record: record.shard)
    merged = with_outcomes(stored_index(objects), pa.concat_tables(record.outcomes for record in ordered))
    objects.put(layout.INDEX, parquet_bytes(merged))
    objects.put(layout.MANIFEST, parquet_bytes(manifest(ordered)))
    in_parallel(objects.delete, objects.list(layout.INTENTS))  # of killed workers; all that they were for is done
    objects.delete_folder(layout.INTENTS)
    objects.sweep()

"""Copy rows of a finished store: their outcomes, and what is stored of them as it is, checked but not decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.embeddings import read_embeddings
from densefeat.rows.retired import RETIRED
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore
from schemas.ledger import RowOutcome

__all__ = ["CopiedRows", "copied_rows", "outcomes_of"]

_REPAIR = "run jobs/verify_store.py --repair on that store, and the job that made it with --resume; then this job again"


@dataclass(frozen=True)
class CopiedRows:
    """Rows of a store, or of several one after the other.

    Attributes:
        outcomes: of the rows.
        chunks: their encoded features; None for a row that failed.
        guidance: their encoded guidance images; None where there is none. Empty if the store has none.
        embeddings: their embeddings, in parts [n, D]. Empty if the store has none.
    """

    outcomes: list[RowOutcome] = field(default_factory=list)
    chunks: list[bytes | None] = field(default_factory=list)
    guidance: list[bytes | None] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float16]] = field(default_factory=list)

    def extend(self, other: "CopiedRows") -> None:
        """Add rows at the end."""
        self.outcomes.extend(other.outcomes)
        self.chunks.extend(other.chunks)
        self.guidance.extend(other.guidance)
        self.embeddings.extend(other.embeddings)


def copied_rows(store: FeatureStore, objects: Objects, index: pa.Table, rows: range) -> CopiedRows:
    """Read rows of one shard: one request, and in stores that have them two for guidance and one for embeddings.

    Nothing of a retired row is copied but its reason.

    Args:
        store: a finished store.
        objects: of the store.
        index: of the store, with the rows that are retired.
        rows: their numbers, all in one shard.

    Raises:
        StoreError: a chunk is missing or damaged; the message names the store and the row.
    """
    outcomes = outcomes_of(index, rows)
    places = [(one.chunk_offset or 0, one.chunk_nbytes or 0) if one.ok else None for one in outcomes]
    shard = rows.start // store.layout.shard_rows
    copied = CopiedRows(outcomes, _chunks(objects, layout.shard_key(shard), rows, places))
    in_use = [one.status != RETIRED for one in outcomes]
    if store.has_guidance:
        guidance = _guidance(store, objects, rows, places)
        copied.guidance.extend(chunk if used else None for chunk, used in zip(guidance, in_use, strict=True))
    if store.has_embedding:
        embeddings = _embeddings(store, objects, rows)
        embeddings[np.logical_not(in_use)] = np.nan
        copied.embeddings.append(embeddings)
    return copied


def outcomes_of(index: pa.Table, rows: range) -> list[RowOutcome]:
    """The outcomes of rows in the index of a finished store, with the places of their chunks there."""
    names = list(RowOutcome.__dataclass_fields__)
    return [RowOutcome(**record) for record in index.select(names).slice(rows.start, len(rows)).to_pylist()]


def _guidance(
    store: FeatureStore, objects: Objects, rows: range, features: Sequence[tuple[int, int] | None]
) -> list[bytes | None]:
    """Guidance images, of failed rows too: an image that decodes has one, whatever became of its features."""
    shard, first = divmod(rows.start, store.layout.shard_rows)
    key = layout.shard_key(shard, layout.GUIDANCE)
    try:
        index = objects.get_range(key, 0, layout.shard_index_nbytes(store.layout.shard_rows))
        places = layout.unpack_shard_index(index, store.layout.shard_rows, index_first=True)[first:][: len(rows)]
    except FileNotFoundError:
        raise StoreError(f"{objects.uri}: the object {key} of row {rows.start} is missing: {_REPAIR}") from None
    except ValueError as error:
        raise StoreError(f"{objects.uri}: row {rows.start} in {key} is damaged: {error}: {_REPAIR}") from error
    for row, place, of_features in zip(rows, places, features, strict=True):
        if place is None and of_features is not None:
            raise StoreError(f"{objects.uri}: row {row} has no guidance image in {key}: {_REPAIR}")
    return _chunks(objects, key, rows, places)


def _chunks(objects: Objects, key: str, rows: range, places: Sequence[tuple[int, int] | None]) -> list[bytes | None]:
    """The chunks of rows at some places, with one request; None where there is no place."""
    known = [place for place in places if place is not None]
    if not known:
        return [None] * len(places)
    start, end = min(at for at, _ in known), max(at + nbytes for at, nbytes in known)
    try:
        data = objects.get_range(key, start, end)
    except FileNotFoundError:
        row = next(row for row, place in zip(rows, places, strict=True) if place is not None)
        raise StoreError(f"{objects.uri}: the object {key} of row {row} is missing: {_REPAIR}") from None
    chunks: list[bytes | None] = []
    for row, place in zip(rows, places, strict=True):
        chunk = None if place is None else data[place[0] - start : sum(place) - start]
        if place is not None and chunk is not None:
            _check(objects, key, row, chunk, place[1])
        chunks.append(chunk)
    return chunks


def _check(objects: Objects, key: str, row: int, chunk: bytes, nbytes: int) -> None:
    where = f"{objects.uri}: row {row} in {key} is damaged"
    if len(chunk) != nbytes:
        raise StoreError(f"{where}: {nbytes:,} bytes are recorded, the object has {len(chunk):,} there: {_REPAIR}")
    try:
        layout.without_crc(chunk, "its chunk")
    except ValueError as error:
        raise StoreError(f"{where}: {error}: {_REPAIR}") from error


def _embeddings(store: FeatureStore, objects: Objects, rows: range) -> npt.NDArray[np.float16]:
    """Embeddings [n, D], NaN where there is none."""
    channels = store.attributes["configuration"]["storage"]["embedding"]
    try:
        found = read_embeddings(objects, rows, store.layout.shard_rows, channels)
    except FileNotFoundError as error:
        raise StoreError(f"{objects.uri}: the object {error} of row {rows.start} is missing: {_REPAIR}") from error
    except ValueError as error:
        raise StoreError(f"{objects.uri}: the embedding of row {rows.start}: {error}: {_REPAIR}") from error
    return found.astype(np.float16)

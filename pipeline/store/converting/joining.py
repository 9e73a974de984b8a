"""Check that stores can be one, and describe the store that they make together."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.layout import FeatureLayout
from densefeat.rows.index import stored_index
from densefeat.rows.retired import SCHEMA
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet
from densefeat.storage.places import overlap
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.images.new_rows import joined_names, with_labels
from pipeline.io.storage import storage_explained
from pipeline.reporting.software import software_versions
from pipeline.store.fitted import Fitted, stored_fitted
from pipeline.store.layout import stored_attributes
from schemas.attributes import AppendedSource, StoreAttributes, unlikenesses
from schemas.index import PENDING, REFERENCES

__all__ = ["Joined", "Part", "joined"]

logger = logging.getLogger(__name__)

_SHOWN = 3  # keys that are in several stores


@dataclass(frozen=True, eq=False)
class Part:
    """A store that becomes a part of another one.

    Attributes:
        store: the store.
        objects: its objects.
        index: its index, with the outcomes of all rows and those that are retired.
        attributes: its attributes.
        fitted: what was fitted to its images.
        clipped: number of clipped values of each of its shards.
        nbytes: bytes of the objects of its shards.
    """

    store: FeatureStore
    objects: Objects
    index: pa.Table
    attributes: StoreAttributes
    fitted: Fitted
    clipped: tuple[int, ...]
    nbytes: int

    @property
    def references(self) -> pa.Table:
        """``schemas.index.REFERENCES`` of its rows."""
        return self.index.select(REFERENCES.names).cast(REFERENCES)

    @property
    def sources(self) -> tuple[AppendedSource, ...]:
        """All its sources, as they are appended to those of another store."""
        first = self.attributes.configuration.source
        return AppendedSource(first.images, first.rows, first.keys_sha256), *self.attributes.appended


@dataclass(frozen=True, eq=False)
class Joined:
    """The store that others make together.

    Attributes:
        parts: these stores, in order.
        attributes: of the whole.
        features: shape and sharding of its features.
        references: of its rows (``schemas.index.REFERENCES``).
    """

    parts: tuple[Part, ...]
    attributes: StoreAttributes
    features: FeatureLayout
    references: pa.Table

    @property
    def fitted(self) -> Fitted:
        """What was fitted to the images of the first store; the others have it, too."""
        return self.parts[0].fitted

    @property
    def nbytes(self) -> int:
        """Bytes of the objects of all shards of its parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def retired(self) -> pa.Table:
        """The rows that are out of use in a part (`densefeat.rows.retired.SCHEMA`), with their numbers in the whole."""
        lists = [
            part.store.retired.set_column(0, SCHEMA.field("row"), pc.add(part.store.retired["row"], start))
            for part, start in self.starts()
        ]
        return pa.concat_tables(table.cast(SCHEMA) for table in lists)

    def starts(self) -> Iterator[tuple[Part, int]]:
        """The parts, and the number of their first row in the whole."""
        start = 0
        for part in self.parts:
            yield part, start
            start += len(part.store)


def joined(
    uris: Sequence[str], output: str, *, shard_rows: int | None = None, allow_duplicate_keys: bool = False
) -> Joined:
    """Read stores, and check that they can be one; nothing is written.

    Args:
        uris: the stores; the rows of the first one come first.
        output: where they will be one.
        shard_rows: rows of a shard; None: as in the first store.
        allow_duplicate_keys: whether a key may be in several stores.

    Raises:
        JobError: a place is named twice, a store is not finished, or its rows and others cannot be in one store; the
            message lists all differences of all stores.
        StoreError: there is no store, or it is damaged.
    """
    for one, other in combinations((*uris, output), 2):
        if overlap(one, other):
            raise JobError(f"{one} and {other} are the same place, or one is in the other: name each store once")
    parts = tuple(_part(uri) for uri in uris)
    first = parts[0]
    _check_alike(parts)
    _check_keys(parts, allow_duplicate_keys)
    references, names = _joined_references(parts)
    rows = shard_rows or first.store.layout.shard_rows
    configuration = first.attributes.configuration
    attributes = StoreAttributes(
        configuration=replace(configuration, storage=replace(configuration.storage, shard_images=rows)),
        versions=software_versions(),
        class_names=names,
        explained_variance=first.attributes.explained_variance,
        step_sha256=first.attributes.step_sha256,
        compact=first.attributes.compact,
        backbone_license=first.attributes.backbone_license,
        appended=(*first.attributes.appended, *(source for part in parts[1:] for source in part.sources)),
    )
    features = replace(first.store.layout, rows=len(references), shard_rows=rows)
    return Joined(parts, attributes, features, references)


def _part(uri: str) -> Part:
    with storage_explained(uri, "read"):
        store, objects = FeatureStore(uri), Objects(uri)
        finished, index = objects.exists(layout.MANIFEST), store.in_use(stored_index(objects, store.layout))
        if not finished or PENDING in index["status"].unique().to_pylist():
            raise JobError(f"{uri} is not finished: finish it first, with --resume of the job that made it")
        attributes = stored_attributes(uri, store.attributes)
        fitted = stored_fitted(store, attributes)
        shards = _manifest(store, objects)
        clipped = tuple(shard["clipped"] for shard in shards)
        nbytes = sum(
            shard["nbytes"] + sum(facts["nbytes"] for _, facts in shard.get("companions") or ()) for shard in shards
        )
        return Part(store, objects, index, attributes, fitted, clipped, nbytes)


def _manifest(store: FeatureStore, objects: Objects) -> list[dict[str, Any]]:
    """The records of all shards in the manifest."""
    try:
        manifest = read_parquet(objects.get(layout.MANIFEST))
        if manifest["shard"].to_pylist() != list(range(store.layout.shards)):
            raise ValueError("it is about other shards")
        wanted = [name for name in ("clipped", "nbytes", "companions") if name in manifest.column_names]
        shards: list[dict[str, Any]] = manifest.select(wanted).to_pylist()
        return shards
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"{store.uri}: {layout.MANIFEST} is damaged: {error}: jobs/verify_store.py --repair rebuilds it"
        ) from error


def _check_alike(parts: Sequence[Part]) -> None:
    """Check that the rows of all stores can be in one.

    Raises:
        JobError: they cannot; the message lists the differences from the first store.
    """
    first, found = parts[0], list[str]()
    for part in parts[1:]:
        different = unlikenesses(first.attributes, part.attributes, sides=("first", "this one"))
        if not different and part.store.layout.image_shape != first.store.layout.image_shape:
            different = [f"features: first {first.store.layout.image_shape}, this one {part.store.layout.image_shape}"]
        found += [f"{part.store.uri}: {line}" for line in different]
    if found:
        raise JobError(
            f"these stores cannot be merged with the first, {first.store.uri}:\n  "
            + "\n  ".join(found)
            + "\nA store that is to be merged with another is made with the same options and --like: its basis, "
            f"quantization steps and upsampler's fit are then those of the other: --like {first.store.uri}"
        )


def _check_keys(parts: Sequence[Part], allow_duplicates: bool) -> None:
    keys = pa.chunked_array([pc.unique(part.index["key"]) for part in parts], pa.string())
    counts = keys.value_counts()
    several = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if not len(several):
        return
    few = ", ".join(several.slice(0, _SHOWN).to_pylist()) + (" …" if len(several) > _SHOWN else "")
    message = f"{len(several):,} keys are in more than one store ({few})"
    if not allow_duplicates:
        raise JobError(
            f"{message}: such rows can be read by their numbers only. Merge stores of other images, or pass "
            "--allow-duplicate-keys"
        )
    logger.warning("%s: these rows can be read by their numbers only", message)


def _joined_references(parts: Sequence[Part]) -> tuple[pa.Table, tuple[str, ...]]:
    """The references of all rows, with labels as numbers of common class names; and these names."""
    tables, names = [parts[0].references], parts[0].attributes.class_names
    for part in parts[1:]:
        own = part.references
        names = joined_names(pa.concat_tables(tables), names, part.attributes.class_names)
        tables.append(with_labels(own, part.attributes.class_names, names))
        if left_out := tables[-1]["label"].null_count - own["label"].null_count:
            logger.warning(
                "the labels of %s rows of %s are left out: %s", f"{left_out:,}", part.store.uri,
                "they are numbers, and the stores before it have names of classes" if names
                else "they have names of classes, and the stores before it have only numbers",
            )  # fmt: skip
    return pa.concat_tables(tables).combine_chunks(), names

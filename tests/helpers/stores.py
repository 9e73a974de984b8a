"""Small stores with known contents, written by the pipeline's own writer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.layout import FeatureLayout, step_sha256
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.guidance import QUALITY, encode_guidance
from densefeat.storage.objects import Objects
from pipeline.features.pca import Basis
from pipeline.images.listing.source import keys_digest
from pipeline.store.appending.grown_shard import done_or_kept
from pipeline.store.appending.growth import Growth
from pipeline.store.layout import claim, complete_setup, finish, set_up
from pipeline.store.shard import NewShard, finished_shards, write_shard
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.attributes import AppendedSource, StoreAttributes
from schemas.configuration import (
    GeometryConfiguration,
    PcaConfiguration,
    SourceConfiguration,
    StorageConfiguration,
    StoreConfiguration,
)
from schemas.index import OK, REFERENCES, pending_index
from schemas.ledger import LedgerRecord, RowOutcome

ROWS, K, C, H, W, SHARD_ROWS = 11, 5, 9, 12, 10, 4
FAILED_ROWS = (2, 8)  # one amid a shard, one at the start of the last
NEW = 4  # rows to append, so that the last shard is filled, and one more begun
LAST = ROWS // SHARD_ROWS  # the shard that is not full
D = 6  # of the embeddings of shards that `make_new_rows` makes

GUIDANCE = (8, 10)  # height and width of guidance images

SHARED = Path(__file__).parents[3] / "shared"


@dataclass
class KnownStore:
    """A store and what is in it."""

    uri: str
    codes: np.ndarray  # [ROWS, K, H, W] as stored
    step: np.ndarray | None
    basis: Basis
    records: list[LedgerRecord]
    configuration_hash: str = ""


def references(rows: int = ROWS) -> pa.Table:
    columns = {
        "key": [f"class/{row:03d}.jpg" for row in range(rows)],
        "uri": [f"/photos/class/{row:03d}.jpg" for row in range(rows)],
        "offset": [None] * rows,
        "nbytes": [1000 + row for row in range(rows)],
        "label": [row % 3 for row in range(rows)],
    }
    return pa.table(columns, schema=REFERENCES)


def basis(k: int = K, c: int = C, seed: int = 0) -> Basis:
    rng = np.random.default_rng(seed)
    orthonormal, _ = np.linalg.qr(rng.normal(size=(c, c)))
    variance = np.arange(k, 0, -1, dtype=np.float64)
    return Basis(
        rng.normal(size=c).astype(np.float32),
        np.ascontiguousarray(orthonormal[:k], dtype=np.float32),
        variance,
        variance / (variance.sum() * 1.25),
    )


def known_codes(dtype: str = "int8", rows: int = ROWS, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "int8":
        return rng.integers(-127, 128, size=(rows, K, H, W)).astype(np.int8)
    return rng.normal(size=(rows, K, H, W)).astype(np.float16)


def outcome(row: int) -> RowOutcome:
    if row in FAILED_ROWS:
        return RowOutcome(row, "corrupt", "image file is truncated")
    # The original was twice as large, and shifted by (4, 2).
    return RowOutcome(row, OK, None, 2 * H, 2 * W, (0.5, 0, -2, 0, 0.5, -1), (0, 0, H, W))


def known_configuration(
    digest: str, dtype: str = "int8", source: dict[str, Any] | None = None, fitted_on_images: int | None = None
) -> StoreConfiguration:
    """Of a store of `known_codes`; ``source``: fields that differ from the defaults."""
    own: dict[str, Any] = {"images": "/photos", "limit": None, "kind": "folder", "image_column": None}
    own |= {"rows": ROWS, "keys_sha256": keys_digest(references())}
    return StoreConfiguration(
        source=SourceConfiguration(**{**own, **(source or {})}),
        backbone={"name": "test"},
        geometry=GeometryConfiguration((H, W), "crop", (H, W), 1 << 20, 1),
        pca=PcaConfiguration(K, fitted_on_images, digest),
        upsampler={"name": "bilinear"},
        storage=StorageConfiguration(dtype, SHARD_ROWS, 1, 0.1 if dtype == "int8" else None),
    )


def set_up_store(uri: str, dtype: str = "int8", source: dict[str, Any] | None = None) -> KnownStore:
    """A store with no shard done; ``source``: of its configuration."""
    step = np.linspace(0.01, 0.05, K, dtype=np.float32) if dtype == "int8" else None
    store = KnownStore(uri, known_codes(dtype), step, basis(), [])
    configuration = known_configuration(store.basis.digest, dtype, source)
    attributes = StoreAttributes(configuration, {"densefeat": "test"}, ("a", "b", "c"), 0.8, step_sha256(step))
    store.configuration_hash = attributes.hash
    features = FeatureLayout(ROWS, K, H, W, dtype, SHARD_ROWS)
    set_up(Objects(uri), attributes, features, store.basis, step, pending_index(references()))
    return store


def write_known_shard(store: KnownStore, shard: int) -> LedgerRecord:
    rows = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, ROWS))
    outcomes = [outcome(row) for row in rows]
    chunks = [layout.encode_chunk(store.codes[o.row]) if o.ok else None for o in outcomes]
    facts = {"configuration_hash": store.configuration_hash, "clipped": 0, "made_by": {"host": "test"}}
    return write_shard(Objects(store.uri), NewShard(shard, SHARD_ROWS, chunks, outcomes, facts))


def make_store(uri: str, dtype: str = "int8", source: dict[str, Any] | None = None) -> KnownStore:
    """A finished store."""
    store = set_up_store(uri, dtype, source)
    store.records = [write_known_shard(store, shard) for shard in range(-(-ROWS // SHARD_ROWS))]
    finish(Objects(uri), store.records)
    return store


def growth(rows: int = ROWS, new: int = NEW, images: str = "/more") -> Growth:
    """Rows for a store of ``rows`` rows that were appended to one of `ROWS`."""
    keys = references(rows + new)
    appended = [("/more", ROWS, rows)] * (rows > ROWS) + [(images, rows, rows + new)]
    sources = [
        AppendedSource(images, end - start, keys_digest(keys.slice(start, end - start)))
        for images, start, end in appended
    ]
    return Growth(rows, keys, ("a", "b", "c", "d"), tuple(sources))


def make_new_rows(known: KnownStore, shard: int, rows: int, seed: int = 5, embedded: bool = False) -> LedgerRecord:
    """What a worker does for a shard of ``rows`` rows, with random codes and companions."""
    objects = Objects(known.uri)
    kept = done_or_kept(objects, shard, known.configuration_hash, rows, SHARD_ROWS)
    if isinstance(kept, LedgerRecord):
        return kept
    first = shard * SHARD_ROWS
    codes = known_codes(rows=64, seed=seed)
    outcomes = [
        RowOutcome(row, OK, None, 2 * H, 2 * W, (0.5, 0, -2, 0, 0.5, -1), (0, 0, H, W))
        for row in range(first + len(kept), first + rows)
    ]
    chunks: list[bytes | None] = [layout.encode_chunk(codes[outcome.row]) for outcome in outcomes]
    companions = {}
    if embedded:
        images = [layout.with_crc(bytes([seed, outcome.row])) for outcome in outcomes]
        companions[layout.GUIDANCE] = kept.guidance_object(images, SHARD_ROWS)
        vectors = np.arange(D * len(outcomes)).reshape(-1, D) + 100 * seed
        companions[layout.EMBEDDING] = kept.embedding_object([vectors.astype(np.float16)], SHARD_ROWS)
    facts = {"configuration_hash": known.configuration_hash, "clipped": 1, "made_by": {"host": "later"}}
    return kept.write(objects, NewShard(shard, SHARD_ROWS, chunks, outcomes, facts, companions=companions))


def finished(known: KnownStore, rows: int, seed: int = 5) -> None:
    """Make what is missing of a store of ``rows`` rows, and finish it."""
    objects, shards = Objects(known.uri), -(-rows // SHARD_ROWS)
    done = finished_shards(objects, known.configuration_hash)
    for shard in set(range(shards)) - done.keys():
        done[shard] = make_new_rows(known, shard, min(SHARD_ROWS, rows - shard * SHARD_ROWS), seed)
    finish(objects, list(done.values()))


@dataclass(frozen=True)
class Kind:
    """What a store holds of its rows.

    Attributes:
        dtype: int8 or float16.
        compact: whether it has guidance images.
        embedding: whether it has embeddings.
        fitted: whether it has the arrays of a fitted upsampler.
    """

    dtype: str = "int8"
    compact: bool = False
    embedding: bool = False
    fitted: bool = False


STEP = np.linspace(0.01, 0.05, K, dtype=np.float32)
COMPACT = {
    "size": [2 * H, 2 * W],
    "last_step": {"name": "jbu", "radius": 1, "sigma_spatial": 1.0, "sigma_range": 0.2},
    "guidance": list(GUIDANCE),
}


def part_attributes(images: str, references: pa.Table, kind: Kind, shard_rows: int, **options: Any) -> StoreAttributes:
    """Attributes of a store of ``references``, from ``images``; ``options``: ``class_names``, ``step``."""
    own = known_configuration(basis().digest, kind.dtype, {
        "images": images, "rows": len(references), "keys_sha256": keys_digest(references),
    })  # fmt: skip
    storage = replace(
        own.storage,
        shard_images=shard_rows,
        represent="compact" if kind.compact else None,
        guidance_quality=QUALITY if kind.compact else None,
        embedding=D if kind.embedding else None,
    )
    own = replace(own, storage=storage)
    if kind.fitted:
        own = own.with_fit(UpsamplerFit({"ridge": 0.5}, bias()).identity())
    return StoreAttributes(
        own,
        {"densefeat": "test"},
        options.get("class_names", ("a", "b", "c")),
        0.8,
        step_sha256(options.get("step", STEP) if kind.dtype == "int8" else None),
        COMPACT if kind.compact else None,
    )


def bias() -> dict[str, np.ndarray]:
    """Arrays of a fitted upsampler."""
    return {"bias": np.random.default_rng(9).normal(size=(K, 3, 3)).astype(np.float32)}


def part_references(name: str, rows: int, labels: list[int | None] | None = None) -> pa.Table:
    """Images of a store; ``labels``: None for 0, 1, 2, 0, …"""
    columns = {
        "key": [f"{name}/{row:03d}.jpg" for row in range(rows)],
        "uri": [f"/photos/{name}/{row:03d}.jpg" for row in range(rows)],
        "offset": [None] * rows,
        "nbytes": [1000 + row for row in range(rows)],
        "label": [row % 3 for row in range(rows)] if labels is None else labels,
    }
    return pa.table(columns, schema=REFERENCES)


def make_part(uri: str, rows: int, shard_rows: int, kind: Kind, seed: int = 0, **options: Any) -> None:
    """A finished store of random rows, one in four failed, one in eight with a guidance image nonetheless.

    ``options``: ``class_names``, ``labels``, ``step``, and ``name``, with which keys begin.
    """
    rng, objects = np.random.default_rng(seed), Objects(uri)
    name = uri.rpartition("/")[2]
    references = part_references(options.get("name", name), rows, options.get("labels"))
    attributes = part_attributes(f"/{name}", references, kind, shard_rows, **options)
    features = FeatureLayout(rows, K, H, W, kind.dtype, shard_rows)
    step = options.get("step", STEP) if kind.dtype == "int8" else None
    claim(objects, attributes, basis(), step, bias() if kind.fitted else {})
    complete_setup(objects, features, pending_index(references))
    records = []
    for shard in range(features.shards):
        outcomes, chunks, images, vectors = [], list[bytes | None](), list[bytes | None](), []
        for row in features.rows_of(shard):
            fate = int(rng.integers(8))
            decodes = fate > 0
            ok = fate > 1
            affine = (0.5, 0, float(rng.normal()), 0, 0.5, float(rng.normal()))
            place: Any = (2 * H + row, 2 * W, affine, (0, 0, H, W - row % 3))
            reason: Any = (OK, None) if ok else ("nonfinite", "NaN") if decodes else ("corrupt", f"broken {row}")
            outcomes.append(RowOutcome(row, *reason, *(place if ok else ())))
            codes = rng.integers(-127, 128, size=(K, H, W))
            stored = codes.astype(np.int8) if kind.dtype == "int8" else (codes / 7).astype(np.float16)
            chunks.append(layout.encode_chunk(stored) if ok else None)
            images.append(encode_guidance(rng.integers(0, 256, (*GUIDANCE, 3), np.uint8)) if decodes else None)
            vectors.append(rng.normal(size=D) if decodes else np.full(D, np.nan))
        companions = {}
        if kind.compact:
            companions[layout.GUIDANCE] = layout.pack_shard(images, shard_rows, index_first=True)[0]
        if kind.embedding:
            companions[layout.EMBEDDING] = encode_embeddings(np.array(vectors, np.float16), shard_rows)
        facts = {"configuration_hash": attributes.hash, "clipped": shard + 1, "made_by": {"host": "test"}}
        records.append(
            write_shard(objects, NewShard(shard, shard_rows, chunks, outcomes, facts, companions=companions))
        )
    finish(objects, records)

"""Finished stores of equal configuration, with random contents of all kinds, which can be merged."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.guidance import QUALITY, encode_guidance
from densefeat.storage.objects import Objects
from pipeline.images.listing.source import keys_digest
from pipeline.reporting.seconds import StageSeconds
from pipeline.store.layout import claim, complete_setup, finish, step_sha256
from pipeline.store.shard import write_shard
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.attributes import StoreAttributes
from schemas.index import OK, REFERENCES, pending_index
from schemas.ledger import RowOutcome
from tests.helpers.stores import D, H, K, W, basis, known_configuration

GUIDANCE = (8, 10)  # height and width of guidance images


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
        records.append(write_shard(objects, shard, shard_rows, chunks, outcomes, StageSeconds(), facts, companions))
    finish(objects, records)

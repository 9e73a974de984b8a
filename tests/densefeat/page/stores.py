"""Small stores with photographs, for the page."""

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from densefeat import layout
from densefeat.layout import INDEX, FeatureLayout, step_sha256
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from pipeline.store.layout import finish, set_up
from pipeline.store.shard import NewShard, write_shard
from schemas.attributes import StoreAttributes
from schemas.index import OK, REFERENCES, pending_index
from schemas.ledger import RowOutcome
from tests.helpers.stores import ROWS, H, W, basis, known_configuration, make_store, set_up_store, write_known_shard

MISSING_ROW = 5  # its photograph is deleted


def photograph(row: int, kind: str = "JPEG", size: tuple[int, int] = (2 * W, 2 * H)) -> bytes:
    """A photograph of (width, height) in a colour of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (20 * row % 256, 100, (200 - 10 * row) % 256)).save(buffer, kind)
    return buffer.getvalue()


def photographed_store(folder: Path, *, finished: bool = True) -> str:
    """A store of known codes; each row's URI is a photograph in ``folder``, but for one that is missing."""
    uri = str(folder / "store")
    store = make_store(uri) if finished else set_up_store(uri)
    if not finished:
        write_known_shard(store, 0)
    photographs = folder / "photographs" / "class"
    photographs.mkdir(parents=True)
    for row in range(ROWS):
        (photographs / f"{row:03d}.jpg").write_bytes(photograph(row))
    (photographs / f"{MISSING_ROW:03d}.jpg").unlink()
    replace_columns(uri, uri=[str(photographs / f"{row:03d}.jpg") for row in range(ROWS)])
    return uri


def replace_columns(uri: str, /, **columns: list[Any] | pa.Array | pa.ChunkedArray) -> None:
    """Replace columns of the index of a local store."""
    file = Path(uri) / INDEX
    index = read_parquet(file.read_bytes())
    for name, values in columns.items():
        number = index.schema.get_field_index(name)
        field = index.schema.field(number)
        values = pa.array(values, field.type) if isinstance(values, list) else values
        index = index.set_column(number, field, values)
    file.write_bytes(parquet_bytes(index))


def references(keys: Sequence[str], uris: Sequence[str], classes: int = 3) -> pa.Table:
    """Rows of images that are files."""
    rows = np.arange(len(keys))
    return pa.table([keys, uris, pa.nulls(len(rows), pa.int64()), rows + 1000, rows % classes], schema=REFERENCES)


def written_store(
    uri: str,
    images: pa.Table,
    shape: tuple[int, int, int],
    *,
    dtype: str = "int8",
    shard_rows: int = 4,
    shards: Collection[int] | None = None,
    failed: Collection[int] = (),
    classes: Sequence[str] = ("a", "b", "c"),
) -> str:
    """A store of random codes [k, H, W] whose images had 2W × 2H pixels; finished if ``shards`` is None."""
    k, height, width = shape
    components = basis(k, max(k, 2))
    step = np.full(k, 0.05, np.float32) if dtype == "int8" else None
    configuration = known_configuration(components.digest, dtype)
    attributes = StoreAttributes(configuration, {"densefeat": "test"}, tuple(classes), 0.8, step_sha256(step))
    features = FeatureLayout(images.num_rows, k, height, width, dtype, shard_rows)
    objects, rng = Objects(uri), np.random.default_rng(0)
    set_up(objects, attributes, features, components, step, pending_index(images))
    records = []
    for shard in range(features.shards) if shards is None else shards:
        outcomes = [
            RowOutcome(row, "corrupt", f"cut off at byte {row}")
            if row in failed
            else RowOutcome(row, OK, None, 2 * height, 2 * width, (0.5, 0, 0, 0, 0.5, 0), (0, 0, height, width))
            for row in features.rows_of(shard)
        ]
        codes = [rng.normal(0, 40, shape).clip(-127, 127).astype(dtype) for _ in outcomes]
        chunks = [layout.encode_chunk(one) if o.ok else None for one, o in zip(codes, outcomes, strict=True)]
        facts = {"configuration_hash": attributes.hash, "clipped": 0, "made_by": {"host": "test"}}
        records.append(write_shard(objects, NewShard(shard, shard_rows, chunks, outcomes, facts)))
    if shards is None:
        finish(objects, records)
    return uri

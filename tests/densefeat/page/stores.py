"""Small stores with photographs, for the page."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from densefeat.layout import INDEX
from densefeat.parquet import parquet_bytes, read_parquet
from tests.helpers.stores import ROWS, H, W, make_store, set_up_store, write_known_shard

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

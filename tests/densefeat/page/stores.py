"""Small stores with photographs, for the page."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from densefeat.layout import INDEX
from densefeat.parquet import parquet_bytes, read_parquet
from tests.helpers.stores import ROWS, H, W, make_store, set_up_store, write_known_shard

MISSING_ROW = 5  # its photograph is deleted


def photographed_store(folder: Path, *, finished: bool = True) -> str:
    """A store of known codes; each row's URI is a photograph in ``folder``, but for one that is missing."""
    uri = str(folder / "store")
    store = make_store(uri) if finished else set_up_store(uri)
    if not finished:
        write_known_shard(store, 0)
    photographs = folder / "photographs" / "class"
    photographs.mkdir(parents=True)
    for row in range(ROWS):
        pixels = np.full((2 * H, 2 * W, 3), (20 * row, 100, 200 - 10 * row), np.uint8)
        Image.fromarray(pixels).save(photographs / f"{row:03d}.jpg")
    (photographs / f"{MISSING_ROW:03d}.jpg").unlink()
    file = folder / "store" / INDEX
    index = read_parquet(file.read_bytes())
    uris = pa.array([str(photographs / f"{row:03d}.jpg") for row in range(ROWS)])
    file.write_bytes(
        parquet_bytes(index.set_column(index.schema.get_field_index("uri"), index.schema.field("uri"), uris))
    )
    return uri

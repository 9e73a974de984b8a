"""Write rows of a store to files of other formats, one image in memory at a time."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from densefeat.store import FeatureStore

__all__ = ["write_npz", "write_pixels"]


def write_npz(store: FeatureStore, rows: list[int], path: Path) -> None:
    """Write rows as a NumPy archive, to be read with ``numpy.load``.

    It has ``features`` [n, k, H, W] float32, ``row`` [n] int64, ``key`` [n] str, ``label`` [n] int64 (−1 if unknown)
    and ``valid_box`` [n, 4] int64 (y0, x0, y1, x1).

    Raises:
        MissingFeatures: a row has no features.
        StoreError: a row is damaged.
        OSError: the file cannot be written.
    """
    small: dict[str, npt.NDArray[Any]] = {
        "row": np.array(rows, dtype=np.int64),
        "key": np.array([store.lookup["key"][row].as_py() for row in rows], dtype=np.str_),
        "label": store.labels[rows],
        "valid_box": np.array([store.geometry(row).valid_box for row in rows], dtype=np.int64).reshape(-1, 4),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), *store.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for row in rows:
                member.write(np.ascontiguousarray(store.read(row), dtype="<f4").data)


def write_pixels(store: FeatureStore, rows: list[int], path: Path) -> None:
    """Write the pixels of rows as a Parquet table, one row group per image; padding is left out.

    Columns: ``row`` int64, ``key`` string, ``y`` and ``x`` int32 (pixel of the features), ``image_y`` and ``image_x``
    float32 (its centre in the original image as displayed, corners at integers), and ``component_0`` …
    ``component_{k−1}`` float32.

    Raises:
        MissingFeatures: a row has no features.
        StoreError: a row is damaged.
        OSError: the file cannot be written.
    """
    names = [f"component_{i}" for i in range(store.layout.components)]
    schema = pa.schema([
        ("row", pa.int64()), ("key", pa.string()), ("y", pa.int32()), ("x", pa.int32()),
        ("image_y", pa.float32()), ("image_x", pa.float32()), *[(name, pa.float32()) for name in names],
    ])  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for row in rows:
            geometry = store.geometry(row)
            y0, x0, y1, x1 = geometry.valid_box
            features = store.read(row, box=geometry.valid_box).reshape(len(names), -1)
            y, x = (axis.reshape(-1) for axis in np.mgrid[y0:y1, x0:x1].astype(np.int32))
            image_y = ((y + 0.5 - geometry.shift[0]) / geometry.scale[0]).astype(np.float32)
            image_x = ((x + 0.5 - geometry.shift[1]) / geometry.scale[1]).astype(np.float32)
            key = pa.array([store.lookup["key"][row].as_py()] * len(y), pa.string())
            columns = [np.full(len(y), row), key, y, x, image_y, image_x, *features]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))

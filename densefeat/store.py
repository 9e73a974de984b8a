"""Read a feature store: whole rows, boxes, or values at points, as arrays."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from densefeat import layout
from densefeat.arguments import box_of, points_of, whole_number
from densefeat.errors import MissingFeatures, StoreError
from densefeat.index import read_index
from densefeat.metadata import own_attributes, read_attributes, read_layout, read_root, read_small_array
from densefeat.storage.objects import Objects

__all__ = ["FeatureStore", "read_attributes"]

Floats = npt.NDArray[np.float32]


class FeatureStore:
    """Dense features of an image dataset, read lazily.

    Opening reads a few kilobytes; the index is read when first needed; after that, every image is one range request.
    Thread-safe, fork-safe, and picklable for ``spawn`` workers (see ``densefeat.TorchFeatures``).

    Args:
        uri: folder (``str`` or ``Path``), ``s3://…``, ``gs://…``, ``https://…`` or any other fsspec URI.
        storage_options: passed to fsspec, e.g. ``{"anon": True}`` or ``{"endpoint_url": …}``.

    Attributes:
        attributes: the store's own description: configuration, its hash, versions.
        shape: (k, H, W) of one row.

    Raises:
        StoreError: there is no store, it is still being set up, its metadata is damaged, or its format version is
            unknown.
        OSError: storage errors such as a missing permission, here and in all methods.
        StorageUnavailable: the storage does not answer, here and in all methods.
    """

    def __init__(self, uri: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        self.uri = os.fspath(uri)
        self._objects = Objects(self.uri, storage_options)
        root = read_root(self._objects)
        self.attributes = own_attributes(self.uri, root)
        if not self.attributes["setup_complete"]:
            raise StoreError(
                f"{self.uri} is still being set up; if the job that started it died, run it again with --resume"
            )
        self.layout = read_layout(self._objects, root)
        self.shape = self.layout.image_shape

    def __len__(self) -> int:
        """Number of rows, including failed ones."""
        return self.layout.rows

    def __repr__(self) -> str:
        k, height, width = self.shape
        return f"FeatureStore({self.uri!r}: {len(self):,} rows of {k}×{height}×{width} {self.layout.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        # The index can be large: every process reads it again instead of receiving a copy.
        dropped = ("index", "_row_of_key", "_places")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    @cached_property
    def index(self) -> pa.Table:
        """One record per row: key, uri, label, status, error, original size, affine map, valid box (schemas/index.py).

        In an unfinished store, rows of unfinished shards are pending. A damaged record is logged, and its rows are
        pending.

        Raises:
            StoreError: the index is missing or damaged.
        """
        return read_index(self._objects, self.layout)

    @property
    def keys(self) -> list[str]:
        """Key of every row."""
        keys: list[str] = self.index["key"].to_pylist()
        return keys

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            rows[key] = -1 if key in rows else row  # -1: ambiguous
        return rows

    @cached_property
    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        columns = (self.index[name].fill_null(-1).to_numpy() for name in ("chunk_offset", "chunk_nbytes"))
        offset, nbytes = columns
        return offset, nbytes

    @cached_property
    def step(self) -> Floats | None:
        """[k] float32 for int8 stores: feature = code × step. None for float16.

        Raises:
            StoreError: the array is missing or damaged.
        """
        return self._array_of_k(layout.STEP) if self.layout.dtype == "int8" else None

    @cached_property
    def mean(self) -> Floats:
        """[C] float32: mean of the backbone's features."""
        return self.array(f"{layout.PCA}/mean")

    @cached_property
    def components(self) -> Floats:
        """[k, C] float32, orthonormal rows: the PCA basis."""
        return self._array_of_k(f"{layout.PCA}/components")

    def row_of(self, row_or_key: int | str) -> int:
        """Row number, 0 … len − 1, of a key (``str``) or of a row, which may be negative to count from the end.

        Raises:
            KeyError: no such key, or several rows have it.
            IndexError: no such row.
            TypeError: neither a string nor a Python, NumPy or torch integer.
        """
        if isinstance(row_or_key, str):
            row = self._row_of_key.get(row_or_key)
            if row is None:
                raise KeyError(f"no row has the key {row_or_key!r}; keys look like {self.keys[0]!r}")
            if row < 0:
                raise KeyError(f"several rows have the key {row_or_key!r}: use a row number")
            return row
        row = whole_number(row_or_key, "a row that is not a key")
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} rows")
        return row % len(self)

    def read_codes(self, row_or_key: int | str) -> npt.NDArray[Any]:
        """Read [k, H, W] as stored (int8 or float16, read-only array), to multiply by ``step`` on another device.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: the row failed, or its shard is not done.
            StoreError: the row or the index is damaged.
        """
        row = self.row_of(row_or_key)
        offset, nbytes = (int(column[row]) for column in self._places)
        if offset < 0 or nbytes <= 0:
            raise self._missing(row)
        key = layout.shard_key(row // self.layout.shard_rows)
        try:
            data = self._objects.get_range(key, offset, offset + nbytes)
            if len(data) != nbytes:
                raise ValueError(f"{nbytes:,} bytes are recorded at {offset:,}, and the object has {len(data):,} there")
            return layout.decode_chunk(data, self.layout)
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri}: the shard object {key} of row {row} is missing; {_REPAIR}") from error
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.uri}: row {row} in {key} is damaged: {error}; {_REPAIR}") from error

    def read(self, row_or_key: int | str, box: Iterable[int] | None = None) -> Floats:
        """Read [k, H, W] float32, or only ``box`` = (y0, x0, y1, x1) in feature pixels: [k, y1 − y0, x1 − x0].

        Raises:
            KeyError, IndexError, TypeError: as `row_of`; TypeError also if the box does not consist of integers.
            MissingFeatures: the row failed, or its shard is not done.
            StoreError: the row or the index is damaged.
            ValueError: the box does not have four sides, is empty or lies outside.
        """
        if box is None:
            return layout.dequantize(self.read_codes(row_or_key), self.step)
        rows, columns = box_of(box, self.layout.height, self.layout.width)
        return layout.dequantize(self.read_codes(row_or_key)[:, rows, columns], self.step)

    def sample(self, row_or_key: int | str, points_xy: npt.ArrayLike, *, coordinates: str = "features") -> Floats:
        """Sample features at points, bilinearly between pixel centres: [points, k] float32.

        Args:
            row_or_key: the row.
            points_xy: [points, 2], (x, y) with corners at integers: the first pixel's centre is (0.5, 0.5). Points
                outside take the value at the border. An empty list gives [0, k].
            coordinates: ``"features"``: pixels of the stored features. ``"image"``: pixels of the original image as
                displayed (after EXIF rotation), converted by the recorded affine map.

        Raises:
            KeyError, IndexError, MissingFeatures, StoreError: as ``read``.
            TypeError: the points are not real numbers, or as `row_of`.
            ValueError: the points are not [points, 2] or not finite, or ``coordinates`` is unknown.
        """
        points = points_of(points_xy)
        if coordinates not in ("features", "image"):
            raise ValueError(f'coordinates must be "features" or "image": got {coordinates!r}')
        codes = self.read_codes(row_or_key)
        if coordinates == "image":
            affine = self._affine(self.row_of(row_or_key))
            points = points @ affine[:, :2].T + affine[:, 2]
        return _bilinear(codes, points, self.step)

    def reconstruct(self, features: npt.ArrayLike) -> Floats:
        """Reconstruct backbone channels from components: [k, …] → [C, …] float32, without the variance PCA dropped.

        Raises:
            ValueError: the first axis does not have k entries.
        """
        components = np.asarray(features, dtype=np.float32)
        if components.ndim == 0 or components.shape[0] != self.layout.components:
            raise ValueError(f"features must be [k={self.layout.components}, …]: got shape {components.shape}")
        channels = np.tensordot(self.components, components, axes=(0, 0))
        return np.asarray(channels + self.mean.reshape(-1, *[1] * (components.ndim - 1)), dtype=np.float32)

    def _affine(self, row: int) -> npt.NDArray[np.float64]:
        """Affine map [2, 3] from original pixels to feature pixels."""
        affine = np.array(self.index["affine"][row].as_py(), dtype=np.float64)
        if affine.shape != (6,) or not np.isfinite(affine).all():
            raise StoreError(f"{self.uri}: {layout.INDEX} is damaged: row {row} has the affine map {affine}; {_REPAIR}")
        return affine.reshape(2, 3)

    def _missing(self, row: int) -> MissingFeatures | StoreError:
        status, error = (self.index[name][row].as_py() for name in ("status", "error"))
        key = self.index["key"][row].as_py()
        if status == "ok":
            return StoreError(f"{self.uri}: {layout.INDEX} is damaged: row {row} is ok but has no chunk; {_REPAIR}")
        if status == "pending":
            return MissingFeatures(
                row, status, f"row {row} ({key}): its shard is not done yet; resume the job to compute it"
            )
        return MissingFeatures(row, status, f"row {row} ({key}) has no features: {status}: {error}")

    def array(self, name: str) -> Floats:
        """Read a small array of the store as float32, e.g. ``"pca/explained_variance"``.

        Raises:
            StoreError: the array, or a part of it, is missing or damaged.
        """
        return read_small_array(self._objects, name)

    def _array_of_k(self, name: str) -> Floats:
        """Read an array whose first axis has one entry per component."""
        array = self.array(name)
        if array.shape[:1] != (self.layout.components,):
            raise StoreError(
                f"{self.uri}: the array {name} is damaged: its shape is {array.shape}, expected "
                f"{self.layout.components} components"
            )
        return array


_REPAIR = "verify the store with jobs/verify_store.py --repair and compute the lost rows again with --resume"


def _bilinear(codes: npt.NDArray[Any], points: npt.NDArray[np.float64], step: Floats | None) -> Floats:
    """Interpolate [k, H, W] at (x, y) points, corners at integers; dequantize only the pixels needed."""
    height, width = codes.shape[1:]
    x = np.clip(points[:, 0] - 0.5, 0, width - 1)
    y = np.clip(points[:, 1] - 0.5, 0, height - 1)
    x0, y0 = (np.minimum(np.floor(c).astype(int), max(n - 2, 0)) for c, n in ((x, width), (y, height)))
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    corners: Sequence[tuple[Any, Any, Floats]] = (
        (y0, x0, (1 - fy) * (1 - fx)),
        (y0, x1, (1 - fy) * fx),
        (y1, x0, fy * (1 - fx)),
        (y1, x1, fy * fx),
    )
    total = sum(layout.dequantize(codes[:, rows, columns], step) * weight for rows, columns, weight in corners)
    return np.ascontiguousarray(np.asarray(total, dtype=np.float32).T)

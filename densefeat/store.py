"""Reading a feature store: rows as arrays, in whole, in part, or at points."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.storage import MemoryStore

from densefeat import layout
from densefeat.errors import MissingFeatures, StoreError
from densefeat.layout import FeatureLayout
from densefeat.objects import Objects
from densefeat.parquet import read_parquet

Floats = npt.NDArray[np.float32]


class FeatureStore:
    """Dense features of an image dataset, read lazily.

    Opening reads a few kilobytes; the index is read when it is first needed; then every image is one range request.
    Works from many threads, survives ``fork`` and pickles to ``spawn`` workers (see ``densefeat.TorchFeatures``).

    Args:
        uri: folder, ``s3://…``, ``gs://…``: whatever fsspec opens.
        storage_options: passed to fsspec, e.g. ``{"anon": True}`` or ``{"endpoint_url": …}``.

    Attributes:
        attributes: the store's own description: configuration, its hash, versions.
        shape: (k, H, W) of one row.

    Raises:
        StoreError: there is no store, it is still being set up, or its format version is another one.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None) -> None:
        self.uri = uri
        self._objects = Objects(uri, storage_options)
        self.attributes = read_attributes(self._objects)
        if not self.attributes["setup_complete"]:
            raise StoreError(f"{uri} is still being set up; if the job that did it died, run it again with --resume")
        self.layout = _read_layout(self._objects)
        self.shape = self.layout.image_shape

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return self.layout.rows

    def __repr__(self) -> str:
        k, height, width = self.shape
        return f"FeatureStore({self.uri!r}: {len(self):,} rows of {k}×{height}×{width} {self.layout.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        # The index can be large: every process reads its own rather than being sent one.
        dropped = ("index", "_row_of_key", "_places")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    @cached_property
    def index(self) -> pa.Table:
        """One record a row: key, uri, label, status, error, original size, affine map, valid box (schemas/index.py).

        Of a store that is not finished: what the shards done so far recorded.
        """
        # In this order: a job that finishes in between has merged the index before it wrote the manifest.
        finished = self._objects.exists(layout.MANIFEST)
        index = read_parquet(self._objects.get(layout.INDEX))
        return index if finished else _with_finished_shards(index, self._objects)

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
        """[k] float32 for int8 stores: feature = code × step. None for float16."""
        return self.array(layout.STEP) if self.layout.dtype == "int8" else None

    @cached_property
    def mean(self) -> Floats:
        """[C] float32: mean of the backbone's features."""
        return self.array(f"{layout.PCA}/mean")

    @cached_property
    def components(self) -> Floats:
        """[k, C] float32, orthonormal rows: the PCA basis."""
        return self.array(f"{layout.PCA}/components")

    def row_of(self, row_or_key: int | str) -> int:
        """Row number of a key, or of a row counted from the end.

        Raises:
            KeyError: no such key, or several rows have it.
            IndexError: no such row.
        """
        if isinstance(row_or_key, str):
            row = self._row_of_key.get(row_or_key)
            if row is None:
                raise KeyError(f"no row has the key {row_or_key!r}; keys look like {self.keys[0]!r}")
            if row < 0:
                raise KeyError(f"several rows have the key {row_or_key!r}: use a row number")
            return row
        row = int(row_or_key)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} rows")
        return row % len(self)

    def read_codes(self, row_or_key: int | str) -> npt.NDArray[Any]:
        """[k, H, W] as stored, int8 or float16: for those who multiply by ``step`` on their own device.

        Raises:
            MissingFeatures: the row failed, or its shard is not done.
            StoreError: the bytes are damaged.
        """
        row = self.row_of(row_or_key)
        offset, nbytes = (int(column[row]) for column in self._places)
        if offset < 0:
            raise self._missing(row)
        key = layout.shard_key(row // self.layout.shard_rows)
        try:
            data = self._objects.get_range(key, offset, offset + nbytes)
            return layout.decode_chunk(data, self.layout)
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri}: the shard object {key} of row {row} is gone; {_REPAIR}") from error
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.uri}: row {row} in {key} is damaged: {error}; {_REPAIR}") from error

    def read(self, row_or_key: int | str, box: tuple[int, int, int, int] | None = None) -> Floats:
        """[k, H, W] float32, or the part ``box`` = (y0, x0, y1, x1) of it in feature pixels: [k, y1 − y0, x1 − x0].

        Raises:
            MissingFeatures: the row failed, or its shard is not done.
            StoreError: the bytes are damaged.
            ValueError: the box is empty or lies outside.
        """
        codes = self.read_codes(row_or_key)
        if box is not None:
            y0, x0, y1, x1 = box
            if not (0 <= y0 < y1 <= self.layout.height and 0 <= x0 < x1 <= self.layout.width):
                size = (self.layout.height, self.layout.width)
                raise ValueError(f"box (y0, x0, y1, x1) must lie in 0 … {size} and not be empty: got {box}")
            codes = codes[:, y0:y1, x0:x1]
        return layout.dequantize(codes, self.step)

    def sample(self, row_or_key: int | str, points_xy: npt.ArrayLike, *, coordinates: str = "features") -> Floats:
        """Features at points, bilinear between pixel centres, [points, k] float32.

        Args:
            row_or_key: the row.
            points_xy: [points, 2], (x, y) with corners at integers: the first pixel's centre is (0.5, 0.5). Points
                outside take the value at the border.
            coordinates: ``"features"``: pixels of the stored features. ``"image"``: pixels of the original image as
                displayed (after EXIF rotation); the recorded affine map takes them to the features.

        Raises:
            MissingFeatures, StoreError: as ``read``.
            ValueError: not [points, 2], or unknown coordinates.
        """
        points = np.asarray(points_xy, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points_xy must be [points, 2], (x, y) each: got shape {points.shape}")
        if coordinates not in ("features", "image"):
            raise ValueError(f'coordinates must be "features" or "image": got {coordinates!r}')
        codes = self.read_codes(row_or_key)
        if coordinates == "image":
            affine = np.array(self.index["affine"][self.row_of(row_or_key)].as_py()).reshape(2, 3)
            points = points @ affine[:, :2].T + affine[:, 2]
        return _bilinear(codes, points, self.step)

    def reconstruct(self, features: npt.ArrayLike) -> Floats:
        """Backbone channels from components: [k, …] → [C, …] float32, up to what PCA left out.

        Raises:
            ValueError: the first axis does not have k entries.
        """
        components = np.asarray(features, dtype=np.float32)
        if components.ndim == 0 or components.shape[0] != self.layout.components:
            raise ValueError(f"features must be [k={self.layout.components}, …]: got shape {components.shape}")
        channels = np.tensordot(self.components, components, axes=(0, 0))
        return np.asarray(channels + self.mean.reshape(-1, *[1] * (components.ndim - 1)), dtype=np.float32)

    def _missing(self, row: int) -> MissingFeatures:
        status, error = (self.index[name][row].as_py() for name in ("status", "error"))
        key = self.index["key"][row].as_py()
        if status == "pending":
            return MissingFeatures(
                row, status, f"row {row} ({key}): its shard is not done yet; resume the job to make it"
            )
        return MissingFeatures(row, status, f"row {row} ({key}) has no features: {status}: {error}")

    def array(self, name: str) -> Floats:
        """A small array of the store as float32, e.g. ``"pca/explained_variance"``.

        Raises:
            StoreError: it is damaged, or a part of it is missing.
        """
        fetched = {key: self._objects.get(key) for key in self._objects.list(name)}
        buffer = zarr.core.buffer.default_buffer_prototype().buffer
        store = MemoryStore({key: buffer.from_bytes(data) for key, data in fetched.items()})
        try:
            array = np.asarray(zarr.open_array(store, path=name, mode="r", zarr_format=3)[...], dtype=np.float32)
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(f"{self.uri}: the array {name} is damaged: {error}; {_BEGIN_ANEW}") from error
        if np.isnan(array).any():  # the fill value: a chunk that is not there
            raise StoreError(f"{self.uri}: a part of the array {name} is missing; {_BEGIN_ANEW}")
        return array


_PARALLEL_REQUESTS = 32
_BEGIN_ANEW = "copy it from a copy of the store, or make the store anew with --overwrite"
_REPAIR = "verify the store with jobs/verify_store.py --repair and make it again with --resume"


def read_attributes(objects: Objects) -> dict[str, Any]:
    """The store's own attributes, whether or not it is finished (see schemas/attributes.py for what they hold).

    Raises:
        StoreError: there is no densefeat store, or its format version is another one.
    """
    try:
        metadata = json.loads(objects.get(layout.ATTRIBUTES))
        attributes: dict[str, Any] | None = metadata.get("attributes", {}).get(layout.ATTRIBUTES_KEY)
    except FileNotFoundError:
        raise StoreError(f"{objects.uri} is not a feature store: it has no {layout.ATTRIBUTES}") from None
    except (ValueError, AttributeError) as error:
        raise StoreError(
            f"{objects.uri} is not a feature store: its {layout.ATTRIBUTES} is damaged: {error}"
        ) from error
    if attributes is None:
        raise StoreError(f"{objects.uri} is a Zarr group, but not a feature store: it has no densefeat attributes")
    if attributes.get("format_version") != layout.FORMAT_VERSION:
        raise StoreError(
            f"{objects.uri} has format version {attributes.get('format_version')}, this densefeat knows "
            f"{layout.FORMAT_VERSION}: use the densefeat release that made it"
        )
    return attributes


def _read_layout(objects: Objects) -> FeatureLayout:
    key = f"{layout.FEATURES}/{layout.ATTRIBUTES}"
    try:
        return FeatureLayout.from_metadata(json.loads(objects.get(key)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{objects.uri}: {key} is missing or damaged: {error}; {_BEGIN_ANEW}") from error


def _with_finished_shards(index: pa.Table, objects: Objects) -> pa.Table:
    """The index of an unfinished store, completed from the ledger as far as there are records."""
    columns = {name: index[name].to_pylist() for name in index.column_names}
    # Whatever an earlier merge left: only the ledger says what is done.
    columns["status"] = ["pending"] * index.num_rows
    columns["chunk_offset"] = [None] * index.num_rows
    columns["chunk_nbytes"] = [None] * index.num_rows
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        records = list(pool.map(lambda key: read_parquet(objects.get(key)), objects.list(layout.LEDGER)))
    for record in records:
        for outcome in record.to_pylist():
            row = outcome.pop("row")
            for name, value in outcome.items():
                columns[name][row] = value
    return pa.table(columns, schema=index.schema)


def _bilinear(codes: npt.NDArray[Any], points: npt.NDArray[np.float64], step: Floats | None) -> Floats:
    """Interpolate [k, H, W] at (x, y) points, corners at integers; dequantizes only the pixels it needs."""
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

"""Read a feature store: whole rows, boxes, or values at points, as arrays."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.align import align, sample_bilinearly
from densefeat.arguments import box_of, points_of, vectors_of, whole_number
from densefeat.errors import StoreError
from densefeat.rows.embeddings import read_embeddings
from densefeat.rows.index import REPAIR, Rows
from densefeat.rows.stored import StoredRows
from densefeat.similarity import Directions
from densefeat.storage.metadata import read_attributes
from densefeat.storage.parallel import in_order

__all__ = ["FeatureStore", "read_attributes"]

Floats = npt.NDArray[np.float32]
Missing = Literal["raise", "nan", "skip"]


class FeatureStore(StoredRows):
    """Dense features of an image dataset, read lazily.

    Opening reads a few kilobytes; the index is read when first needed; after that, every image is one range request.
    ``store[0]``, ``store["key"]``, ``store[2:8]`` and ``store[[5, 3]]`` are ``store.read`` of these rows.
    Thread-safe, fork-safe, and picklable for ``spawn`` workers (see ``densefeat.TorchFeatures``).

    Args:
        uri: folder (``str`` or ``Path``), ``s3://…``, ``gs://…``, ``https://…`` or any other fsspec URI.
        storage_options: passed to fsspec, e.g. ``{"anon": True}`` or ``{"endpoint_url": …}``.

    Attributes:
        attributes: the store's own description: configuration, its hash, versions.
        shape: (k, H, W) of one row.
        layout: of the stored array.
        compact: description of a compact store, which has components before the last step of upsampling, and an image
            that guides it: ``read`` and the other methods take this step, with torch on the CPU. To take it elsewhere,
            see `densefeat.torch.LastStep`. None for a dense store.

    Raises:
        StoreError: there is no store, it is still being set up, its metadata is damaged, or its format version is
            unknown.
        OSError: storage errors such as a missing permission, here and in all methods.
        StorageUnavailable: the storage does not answer, here and in all methods.
    """

    def __getitem__(self, rows: int | str | Rows) -> Floats:
        """Read one row [k, H, W], or several [n, k, H, W]; see `read`."""
        return self.read(rows)

    def __iter__(self) -> Iterator[Floats]:
        """Read all rows in order, a few ahead of the one in use: [k, H, W] float32 each.

        Raises:
            MissingFeatures: at the first row that has no features. To leave these out, read ``rows_with_features``.
        """
        return in_order(self.read, range(len(self)), _READ_AHEAD)

    def __repr__(self) -> str:
        k, height, width = self.shape
        compact = "" if self.compact is None else f", compact at {self.layout.height}×{self.layout.width}"
        return f"FeatureStore({self.uri!r}: {len(self):,} rows of {k}×{height}×{width} {self.layout.dtype}{compact})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels, so that ``class_names[label]`` is the name of a label; empty if there are none.

        Raises:
            StoreError: the attribute is damaged.
        """
        names = self.attributes.get("class_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise StoreError(f"{self.uri}: the attribute class_names is damaged: expected a list of names: got {names}")
        return tuple(names)

    def read(
        self, rows: int | str | Rows, box: Iterable[int] | None = None, *, missing: Missing = "raise", threads: int = 8
    ) -> Floats:
        """Read one row as [k, H, W] float32, or several as [n, k, H, W].

        An image is stored as one chunk. A box therefore takes as long to fetch and decode as the whole row; it saves
        memory, and the conversion of the rest to float32.

        Args:
            rows: a row number or key; or a slice, list or array of them, which are read in parallel and returned in
                the given order.
            box: (y0, x0, y1, x1) in feature pixels, y1 and x1 exclusive: returns […, k, y1 − y0, x1 − x0].
            missing: for rows without features, which failed or whose shard is not done. ``"raise"``: raise
                MissingFeatures before anything is read. ``"nan"``: fill them with NaN. ``"skip"``: leave them out, for
                several rows; the result has those that are in ``rows_with_features``.
            threads: number of rows that are read at a time.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`; TypeError also if the box does not consist of integers.
            MissingFeatures: rows have no features; its attribute ``rows`` has their numbers.
            StoreError: a row or the index is damaged.
            ValueError: the box does not have four sides, is empty or lies outside; ``missing`` is unknown, or
                ``"skip"`` for a single row; ``threads`` is less than 1.
        """
        if missing not in ("raise", "nan", "skip"):
            raise ValueError(f'missing must be "raise", "nan" or "skip": got {missing!r}')
        _, height, width = self.shape
        part = box_of((0, 0, height, width) if box is None else box, height, width)
        if self._are_several(rows):
            return self._read_several(self._rows_of(rows), part, missing, threads)  # type: ignore[arg-type]
        if missing == "skip":
            raise ValueError(f'missing="skip" is for several rows: got the single row {rows!r}')
        row = self.row_of(rows)  # type: ignore[arg-type]  # row_of refuses the rest
        if missing == "nan" and self._without_features([row]):
            return np.full((self.layout.components, *_shape(part)), np.nan, dtype=np.float32)
        return self._read_part(row, part)

    def _read_part(self, row: int, part: tuple[slice, slice]) -> Floats:
        values, step = self.read_values(row)
        return layout.dequantize(values[:, part[0], part[1]], step)

    def _read_several(self, rows: list[int], part: tuple[slice, slice], missing: Missing, threads: int) -> Floats:
        if whole_number(threads, "threads") < 1:
            raise ValueError(f"threads must be at least 1: got {threads}")
        absent = set(missing_rows := self._without_features(rows))
        if absent and missing == "raise":
            raise self._missing(*missing_rows)
        if missing == "skip":
            rows = [row for row in rows if row not in absent]
        features = np.empty((len(rows), self.layout.components, *_shape(part)), dtype=np.float32)
        _ = self.step, None if self._interpolates else self.last_step, self._guidance  # once, not in every thread

        def fill(i: int) -> None:
            if rows[i] in absent:
                features[i] = np.nan
            else:
                features[i] = self._read_part(rows[i], part)

        for _ in in_order(fill, range(len(rows)), threads):
            pass
        return features

    @property
    def has_embedding(self) -> bool:
        """Whether the store was made with ``--embedding``.

        Raises:
            StoreError: the metadata of the array is damaged.
        """
        return self._embedding_channels is not None

    def embedding(self, rows: int | str | Rows) -> Floats:
        """Read one vector per image: [D] float32 of one row, or [n, D] of several.

        It is what the backbone's own classifier would take, or in stores of ``--space head`` the output of its head.
        A store has it if it was made with ``--embedding``. A shard's rows are one request.

        Args:
            rows: as for `read`.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: rows have no features.
            StoreError: the store has no embeddings, or is damaged.
        """
        if (channels := self._embedding_channels) is None:
            raise StoreError(f"{self.uri} has no embeddings: it was made without --embedding")
        several = self._are_several(rows)
        numbers = self.checked_rows(rows if several else [rows]).tolist()  # type: ignore[arg-type, list-item]
        try:
            found = read_embeddings(self._objects, numbers, self.layout.shard_rows, channels)
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri}: the object {error} is missing; {REPAIR}") from error
        except ValueError as error:
            raise StoreError(f"{self.uri}: {error}; {REPAIR}") from error
        return found if several else found[0]

    @staticmethod
    def _are_several(rows: object) -> bool:
        return isinstance(rows, slice | Iterable) and not isinstance(rows, str | bytes) and getattr(rows, "ndim", 1) > 0

    def sample(self, row_or_key: int | str, points_xy: npt.ArrayLike, *, coordinates: str = "features") -> Floats:
        """Sample features at points, bilinearly between pixel centres: [points, k] float32.

        One point takes almost as long as the whole row, because an image is stored as one chunk: pass all points of a
        row in one call.

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
        values, step = self.read_values(row_or_key)
        if coordinates == "image":
            geometry = self.geometry(row_or_key)
            points = points * geometry.scale[::-1] + geometry.shift[::-1]
        return sample_bilinearly(values, points, step)

    def align(
        self,
        array: npt.ArrayLike,
        row_or_key: int | str,
        to: Literal["features", "image"] = "features",
        *,
        interpolation: Literal["nearest", "linear"] | None = None,
        fill: float | None = None,
        channels: Literal["first", "last"] | None = None,
    ) -> npt.NDArray[Any]:
        """Resample a mask or image to the grid of a row's features, or from there to the original image.

        Args:
            array: mask or image: [height, width], [height, width, channels] or [channels, height, width]. Its size is
                that of the original as displayed (after EXIF rotation), or with ``to="image"`` that of the features.
            row_or_key: the row.
            to: the target grid.
            interpolation: ``"nearest"`` keeps values: int64 for integers, bool for booleans, float32 for floats.
                ``"linear"`` averages over the area of a target pixel along axes that shrink, and interpolates
                linearly along axes that grow: float32. None: ``"nearest"`` for booleans and for [height, width]
                integers, ``"linear"`` for others.
            fill: value of target pixels without a source: padding in the features, or what was cropped from the
                image. None: −1 for integers, False for booleans, NaN for floats.
            channels: where the channels are; None: where the shape tells.

        Returns:
            The array on the other grid, its channels where they were.

        Raises:
            KeyError, IndexError, MissingFeatures, StoreError: as `geometry`.
            TypeError: the array is not real numbers or booleans.
            ValueError: its size is not that of the grid, or an option is unknown.
        """
        geometry = self.geometry(row_or_key)
        return align(array, geometry, to, interpolation=interpolation, fill=fill, channels=channels)

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

    def similarity(self, row_or_key: int | str, vectors: npt.ArrayLike) -> Floats:
        """Cosine similarity of a row's pixels with vectors of the backbone's channels, such as text embeddings.

        It is that of the reconstructed channels (`reconstruct`): with the mean of the backbone's features, and without
        the variance that PCA dropped. It is computed in components, without reconstructing C channels.

        Args:
            row_or_key: the row.
            vectors: [C], or several [Q, C]; of any length but 0. For texts, the store must be in their space: made with
                ``--space head`` of the image encoder that belongs to their text encoder.

        Returns:
            [H, W] float32, or [Q, H, W]; −1 … 1, 0 where all channels are 0, NaN where the features are not finite.

        Raises:
            KeyError, IndexError, MissingFeatures, StoreError: as ``read``.
            TypeError: the vectors are not real numbers, or as `row_of`.
            ValueError: the vectors do not have C channels, are not finite, or have the length 0.
        """
        directions = Directions.of(vectors_of(vectors, len(self.mean)), self.components, self.mean)
        values, step = self.read_values(row_or_key)
        found = directions.cosines(values.reshape(len(values), -1), step).reshape(-1, *values.shape[1:])
        return found if np.ndim(vectors) == 2 else found[0]


_READ_AHEAD = 4


def _shape(part: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = part
    return rows.stop - rows.start, columns.stop - columns.start

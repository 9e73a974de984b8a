"""Features of single rows, kept as codes; colours, components and segments of them."""

import io
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from densefeat.errors import StoreError
from densefeat.page.cache import ByteCache
from densefeat.similarity import Directions, blocks, products, squared_lengths
from densefeat.store import FeatureStore

__all__ = ["Features", "Seen", "component_picture", "encoded", "segments"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

_SCALE_IMAGES = 24
_SCALE_STRIDE = 4
_PERCENTILES = (1, 99)
_BLUE, _GREY, _ORANGE = (np.array(c, np.float32) for c in ((33, 102, 172), (247, 247, 247), (217, 95, 2)))


@dataclass(frozen=True)
class Seen:
    """The codes of one image.

    Attributes:
        codes: [k, H·W] as stored, int8 or float16.
        step: [k] float32, to multiply codes with.
        inverse_norms: [H·W] float32, 1 / length of each pixel's feature; 0 in padding and where the feature is 0.
        shape: (H, W).
    """

    codes: npt.NDArray[Any]
    step: Floats
    inverse_norms: Floats
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.inverse_norms.nbytes

    def at(self, box: tuple[int, int, int, int]) -> Floats:
        """The mean of the normalised features in a box (y0, x0, y1, x1), of length 1 (or 0): [k] float32."""
        y0, x0, y1, x1 = box
        codes = self.codes.reshape(-1, *self.shape)[:, y0:y1, x0:x1].astype(np.float32)
        return _unit(self.step * (codes * self.inverse_norms.reshape(self.shape)[y0:y1, x0:x1]).sum(axis=(1, 2)))

    def cosines(self, query: Floats) -> Floats:
        """Cosine similarity of each pixel with ``query`` ([k] of length 1): [H·W] float32, −1 … 1, 0 in padding."""
        return np.asarray(products((self.step * query)[None], self.codes)[0] * self.inverse_norms)

    def normalised(self, grid: tuple[int, int]) -> Floats:
        """Mean directions on a coarser grid: [h·w, k] float32, each of length 1 (or 0)."""
        unit = self.codes.astype(np.float32) * self.inverse_norms
        unit = unit.reshape(-1, *self.shape)
        for axis, (fine, coarse) in enumerate(zip(self.shape, grid, strict=True), 1):
            unit = np.add.reduceat(unit, np.arange(coarse) * fine // coarse, axis=axis)
        return _unit((unit * self.step[:, None, None]).reshape(len(self.step), -1).T)


class Features:
    """Reads rows, and keeps their codes.

    Args:
        store: the store.
        before: of the same store when fewer rows were done; its codes and scale are taken over.
        max_bytes: of all codes kept.
    """

    def __init__(self, store: FeatureStore, before: "Features | None" = None, max_bytes: int = 512 << 20) -> None:
        self.store = store
        self._seen: ByteCache[Seen] = before._seen if before else ByteCache(max_bytes, lambda seen: seen.nbytes)
        self._scale_lock = threading.Lock()
        self._scale: tuple[Floats, Floats] | None = before._scale if before else None

    @cached_property
    def ok_rows(self) -> npt.NDArray[np.int64]:
        """Rows that have features."""
        return np.flatnonzero(self.store.index["chunk_offset"].is_valid().to_numpy())

    def seen(self, row: int) -> Seen:
        """The codes of a row.

        Raises:
            MissingFeatures, MissingPackage, StoreError, OSError: as for ``FeatureStore.read_values``.
        """
        return self._seen.get(row, lambda: self._read(row))

    def _read(self, row: int) -> Seen:
        stored, step = self.store.read_values(row)
        shape = (stored.shape[1], stored.shape[2])
        if step is None:
            step = np.ones(len(stored), np.float32)
        codes = stored.reshape(len(stored), -1)
        squares = squared_lengths(codes, step)
        inverse = np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
        return Seen(codes, step, inverse * self._valid(row, shape), shape)

    def compared(self, row: int, directions: Directions) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Cosine similarity of a row's pixels with vectors, and where it is finite and no padding: [Q, H·W], [H·W].

        Raises:
            MissingFeatures, StoreError, OSError: as for ``FeatureStore.read_codes``.
        """
        seen = self.seen(row)
        cosines = directions.cosines(seen.codes, seen.step)
        return cosines, (self._valid(row, seen.shape) > 0) & np.isfinite(cosines).all(axis=0)

    def _valid(self, row: int, shape: tuple[int, int]) -> Floats:
        """[H·W] float32: 1 in the valid box of a row, 0 in padding."""
        valid = np.ones(shape, np.float32)
        if "valid_box" in self.store.index.column_names and (box := self.store.index["valid_box"][row].as_py()):
            valid[:] = 0
            valid[box[0] : box[2], box[1] : box[3]] = 1
        return valid.reshape(-1)

    def spread(self, count: int) -> list[int]:
        """At most ``count`` rows with features, evenly spread over the store."""
        rows = self.ok_rows
        return [int(row) for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]]

    def colours(self, row: int) -> Pixels:
        """The first three components as red, green, blue, on one scale for the whole store: [H, W, 3]."""
        seen = self.seen(row)
        low, high = self.scale()
        values = _first_three(_values(seen, slice(0, 3)))
        return _bytes((values - low[:, None]) / (high - low)[:, None]).T.reshape(*seen.shape, 3)

    def scale(self) -> tuple[Floats, Floats]:
        """Lowest and highest value of the three components, [3] each, from rows spread over the store."""
        with self._scale_lock:
            if self._scale is None:
                parts = list(self._parts_of_scale())
                low, high = np.percentile(np.concatenate(parts, axis=1), _PERCENTILES, axis=1).astype(np.float32)
                self._scale = low, np.maximum(high, low + np.finfo(np.float32).eps)
            return self._scale

    def _parts_of_scale(self) -> Iterator[Floats]:
        """Values of rows spread over the store, [3, pixels] each. Damaged rows are left out, unless all are."""
        rows = self.spread(_SCALE_IMAGES)
        damaged = 0
        for row in rows:
            try:
                values = self.store.read(row)[:3, ::_SCALE_STRIDE, ::_SCALE_STRIDE]
            except StoreError as error:
                damaged += 1
                if damaged == len(rows):
                    raise
                logger.warning("row %d is left out of the scale of colours: %s", row, error)
            else:
                yield _first_three(values.reshape(len(values), -1))


def component_picture(seen: Seen, component: int, deviation: float) -> Pixels:
    """One component from blue (−2.5 ``deviation``) over white (0) to orange: [H, W, 3]."""
    value = np.clip(_values(seen, slice(component, component + 1))[0] / (2.5 * deviation), -1, 1)[:, None]
    towards = np.where(value < 0, _BLUE, _ORANGE)
    picture = (_GREY + (towards - _GREY) * np.abs(value)).round().astype(np.uint8)
    return np.asarray(picture.reshape(*seen.shape, 3))


def segments(seen: Seen, count: int, rounds: int = 12) -> npt.NDArray[np.uint8]:
    """Spherical k-means of the pixels' directions, the same at each call: labels [H, W], 0 … ``count`` − 1."""
    step = max(1, int(np.sqrt(seen.codes.shape[1] / 3000)))
    few = np.arange(seen.codes.shape[1]).reshape(seen.shape)[step // 2 :: step, step // 2 :: step].reshape(-1)
    points = (_values(seen, slice(None), few) * seen.inverse_norms[few]).T
    centres = _spread_centres(points, count)
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(axis=1)
        sums = np.stack([points[nearest == one].sum(axis=0) for one in range(len(centres))])
        centres = np.where(np.any(sums, axis=1, keepdims=True), _unit(sums), centres)
    labels = np.empty(seen.codes.shape[1], np.uint8)
    for pixels in blocks(len(labels)):
        labels[pixels] = ((centres * seen.step) @ seen.codes[:, pixels].astype(np.float32)).argmax(axis=0)
    return labels.reshape(seen.shape)


def encoded(picture: Pixels | Image.Image, kind: str = "PNG") -> bytes:
    """Encode a picture as PNG or JPEG."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {"quality": 90}))
    return buffer.getvalue()


def _spread_centres(points: Floats, count: int) -> Floats:
    """k-means++ with a fixed seed."""
    random = np.random.default_rng(0)
    chosen = [int(random.integers(len(points)))]
    distance = 1 - points @ points[chosen[0]]
    for _ in range(count - 1):
        weights = np.maximum(distance, 0).astype(np.float64)
        total = weights.sum()
        chosen.append(int(random.choice(len(points), p=weights / total if total > 0 else None)))
        distance = np.minimum(distance, 1 - points @ points[chosen[-1]])
    return points[chosen]


def _values(seen: Seen, components: slice, pixels: Any = slice(None)) -> Floats:
    return np.asarray(seen.codes[components, pixels].astype(np.float32) * seen.step[components, None])


def _first_three(values: Floats) -> Floats:
    """Three rows of [k, pixels]: of two components the second twice, a single one three times."""
    return values[{1: [0, 0, 0], 2: [0, 1, 1]}.get(len(values), [0, 1, 2])]


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _bytes(values: Floats) -> Pixels:
    return np.asarray((np.clip(values, 0, 1) * 255).round(), dtype=np.uint8)


def segment_colours(labels: npt.NDArray[np.uint8], colours: Pixels) -> Pixels:
    """Each segment in the mean colour of its pixels: [H, W, 3]."""
    counts = np.maximum(np.bincount(labels.reshape(-1)), 1)
    means: Sequence[Any] = [
        np.bincount(labels.reshape(-1), weights=colours[..., channel].reshape(-1)) / counts for channel in range(3)
    ]
    palette: Pixels = np.stack(means, axis=1).round().astype(np.uint8)
    return np.asarray(palette[labels])

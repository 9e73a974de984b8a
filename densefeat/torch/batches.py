"""Batches of images, allocated at once and filled by threads."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from densefeat.rows.chunks import Chunk
from densefeat.store import FeatureStore

__all__ = ["Images", "Scratch"]

_TORCH = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "uint8": torch.uint8}

Boxes = Callable[[int], Sequence[int]]


class Scratch:
    """Decodes images, each thread into the same array again: pages of new arrays cost a fifth of decoding."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._own = threading.local()

    def values(self, row: int, chunk: Chunk) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Values [k, H, W] and their step, as ``FeatureStore.read_values``, until this thread decodes the next.

        Raises:
            StoreError: the chunk is damaged.
        """
        if self._store.compact is not None:
            return self._store.values(row, chunk)
        if not hasattr(self._own, "codes"):
            self._own.codes = np.empty(self._store.shape, self._store.layout.dtype)
        codes: npt.NDArray[Any] = self._own.codes
        return self._store.decode(row, chunk, codes), self._store.step


class Images:
    """How images of a store become a batch [n, k, h, w], float32 or as stored, whole or cropped.

    As stored, images of a compact store are what its last step takes: codes, and perhaps ``guidance`` [n, 3, H, W].

    Args:
        store: the store.
        dequantize: float32 instead of stored codes.
        size: (h, w) of an image in the batch; None: the whole.
        box: (y0, x0, y1, x1) of a row's crop, of that size. None: no crops.

    Raises:
        ValueError: crops of what a compact store has are asked for: they exist only after its last step.
    """

    def __init__(
        self, store: FeatureStore, dequantize: bool, size: tuple[int, int] | None = None, box: Boxes | None = None
    ) -> None:
        self._as_stored = not dequantize
        if self._as_stored and box is not None and store.compact is not None:
            raise ValueError("crops of a compact store need dequantize=True: they are made after its last step")
        k, height, width = store.layout.image_shape if self._as_stored else store.shape
        self._store, self._box = store, box
        self._shape = (k, *(size or (height, width)))
        self._guidance = store.compact.get("guidance") if self._as_stored and store.compact else None
        self._stored = np.dtype(store.layout.dtype)
        self._dtype = np.dtype(np.float32) if dequantize else self._stored
        self._scratch = Scratch(store)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        """A batch of these rows, its features not filled."""
        features = _empty((len(rows), *self._shape), self._dtype)
        keys = self._store.lookup["key"]
        batch = {
            "features": features,
            "row": torch.from_numpy(rows.copy()),
            "key": [keys[row].as_py() for row in rows.tolist()],
            "label": torch.from_numpy(self._store.labels[rows]),
        }
        if self._guidance is not None:
            batch["guidance"] = _empty((len(rows), 3, *self._guidance), np.dtype(np.uint8))
        if self._box is not None:
            batch["box"] = torch.tensor([list(self._box(row)) for row in rows.tolist()], dtype=torch.int64)
        return batch

    def fill(self, batch: dict[str, Any], place: int, row: int, chunk: Chunk) -> None:
        """Decode a row's chunk into its place in a batch.

        Raises:
            StoreError: the chunk is damaged.
        """
        into = batch["features"][place].numpy()
        if chunk.guidance is not None and self._guidance is not None:
            batch["guidance"][place].numpy()[...] = self._store.decode_guidance(row, chunk.guidance).transpose(2, 0, 1)
        whole = into.shape == self._store.layout.image_shape and (self._as_stored or self._store.compact is None)
        if into.dtype == self._stored and whole:
            self._store.decode(row, chunk, into)
            return
        codes, step = self._scratch.values(row, chunk)
        if self._box is not None:
            y0, x0, y1, x1 = batch["box"][place].tolist()
            codes = codes[:, y0:y1, x0:x1]
        if step is None or self._as_stored:
            into[...] = codes
        else:
            np.multiply(codes, step[:, None, None], out=into)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    """An array to be filled. In a worker it is in shared memory, to which it would else be copied when it is sent."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype))  # in huge pages where there are: torch's are small
    nbytes = int(np.prod(shape)) * dtype.itemsize
    features = torch.empty(0, dtype=_TORCH[dtype.name])
    # As torch's default_collate does it.
    return features.set_(torch.UntypedStorage._new_shared(nbytes), 0, shape, _strides(shape))  # type: ignore[no-untyped-call]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))

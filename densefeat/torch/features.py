"""A PyTorch dataset of images with their dense features."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from densefeat.arguments import whole_number
from densefeat.store import FeatureStore


class TorchFeatures(Dataset[Any]):
    """Map-style dataset of the rows that have features.

    Each sample is a dict:

    - ``features``: [k, H, W] float32 tensor; with ``dequantize=False`` int8 or float16, as stored
    - ``row``: int, the row of the store
    - ``key``: str
    - ``label``: int, −1 if unknown

    A ``DataLoader`` makes batches of them: ``features`` [batch, k, H, W], ``row`` and ``label`` [batch] int64 tensors,
    ``key`` a list of str. Failed and pending rows are left out: ``len(dataset)`` counts the others. Works with ``fork``
    and ``spawn`` workers: each process opens the store itself, and pickles are small.

    Args:
        store: a ``FeatureStore``, or its location (``str`` or ``Path``).
        transform: applied to each sample in the worker.
        dequantize: False returns the stored codes (int8 or float16) instead of float32: a quarter (int8) or half
            (float16) of the bytes from worker to device. Multiply int8 codes by ``dataset.step`` there.

    Attributes:
        rows: [len] int64 tensor, the rows in use.

    Raises:
        StoreError: there is no store, or its index is damaged; when reading an item: its row is damaged.
    """

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        transform: Callable[[dict[str, Any]], Any] | None = None,
        *,
        dequantize: bool = True,
    ) -> None:
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.transform = transform
        self.dequantize = dequantize
        # Arrays, not lists: forked workers share the pages of arrays; reference counts would copy those of lists.
        self.rows = torch.from_numpy(self.store.rows_with_features.copy())
        self._labels = torch.from_numpy(self.store.labels.copy())

    @property
    def step(self) -> torch.Tensor | None:
        """[k] float32 for int8 stores, None for float16."""
        return None if self.store.step is None else torch.from_numpy(self.store.step)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        row = int(self.rows[whole_number(i, "an item of the dataset")])
        features = self.store.read(row) if self.dequantize else self.store.read_codes(row).copy()
        sample = {
            "features": torch.from_numpy(features),
            "row": row,
            "key": self.store.index["key"][row].as_py(),
            "label": int(self._labels[row]),
        }
        return sample if self.transform is None else self.transform(sample)

"""A PyTorch dataset over a feature store."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from densefeat.arguments import whole_number
from densefeat.store import FeatureStore


class TorchFeatures(Dataset[Any]):
    """Map-style dataset of the rows that have features.

    Safe with ``fork`` and ``spawn`` workers: a store handle is opened anew in each process, and pickles small.

    Args:
        store: a ``FeatureStore``, or where it is (``str`` or ``Path``).
        transform: applied to each sample in the worker.
        dequantize: False gives the stored codes (int8 or float16) instead of float32: a quarter of the bytes between
            worker and device; multiply by ``dataset.step`` there.

    Each sample is a dict: ``features`` [k, H, W] tensor, ``row`` int, ``key`` str, ``label`` int (−1 if unknown).
    Rows that failed are left out: ``len(dataset)`` counts the others, ``dataset.rows`` ([len] int64) lists them.

    Raises:
        StoreError: there is no store, or its index is damaged; of an item: its row is.
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
        index = self.store.index
        usable = (index["chunk_offset"].is_valid()).to_numpy()
        # Arrays, not lists: forked workers share their pages, where reference counts would copy them.
        self.rows = torch.from_numpy(usable.nonzero()[0])
        self._labels = torch.from_numpy(index["label"].fill_null(-1).to_numpy().copy())

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

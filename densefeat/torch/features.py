"""A PyTorch dataset of images with their dense features."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from densefeat.arguments import whole_number
from densefeat.storage.parallel import in_order
from densefeat.store import FeatureStore
from densefeat.torch.batches import Images
from densefeat.torch.epochs import check_least


class TorchFeatures(Dataset[Any]):
    """Map-style dataset of the rows that have features.

    Each sample is a dict:

    - ``features``: [k, H, W] float32 tensor; with ``dequantize=False`` int8 or float16, as stored
    - ``row``: int, the row of the store
    - ``key``: str
    - ``label``: int, −1 if unknown
    - ``guidance``: [3, H, W] uint8 tensor; only with ``dequantize=False`` from a compact store that has such images

    A ``DataLoader`` makes batches of them: ``features`` [batch, k, H, W], ``row`` and ``label`` [batch] int64 tensors,
    ``key`` a list of str. It asks for a batch at once, which ``threads`` read and decode into one tensor. Failed and
    pending rows are left out: ``len(dataset)`` counts the others. Works with ``fork`` and ``spawn`` workers: each
    process opens the store itself, and pickles are small.

    Random images of a batch are a request each. ``StreamingFeatures`` reads epochs with larger requests.

    Args:
        store: a ``FeatureStore``, or its location (``str`` or ``Path``).
        transform: applied to each sample in the worker.
        dequantize: False returns the stored codes (int8 or float16) instead of float32: a quarter (int8) or half
            (float16) of the bytes from worker to device. Multiply int8 codes by ``dataset.step`` there.
        threads: number of images of a batch that a process reads at a time.

    Attributes:
        rows: [len] int64 tensor, the rows in use.

    Raises:
        StoreError: there is no store, or its index is damaged; when reading an item: its row is damaged.
        ValueError: ``threads`` is less than 1.
    """

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        transform: Callable[[dict[str, Any]], Any] | None = None,
        *,
        dequantize: bool = True,
        threads: int = 8,
    ) -> None:
        check_least({"threads": (threads, 1)})
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.transform = transform
        self.dequantize = dequantize
        self.threads = threads
        # Arrays, not lists: forked workers share the pages of arrays; reference counts would copy those of lists.
        self.rows = torch.from_numpy(self.store.rows_with_features.copy())

    @property
    def step(self) -> torch.Tensor | None:
        """[k] float32 for int8 stores, None for float16."""
        return None if self.store.step is None else torch.tensor(self.store.step)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, items: Sequence[int]) -> list[Any]:
        """Samples of these items, whose features are parts of one tensor."""
        if not len(items):
            return []
        rows = self.rows[[whole_number(i, "an item of the dataset") for i in items]].numpy()
        images = Images(self.store, self.dequantize)
        batch = images.batch(rows)

        def fill(place: int) -> None:
            row = int(rows[place])
            (chunk,) = self.store.read_chunks([row])
            images.fill(batch, place, row, chunk)

        for _ in in_order(fill, range(len(rows)), min(self.threads, len(rows))):
            pass
        values = zip(batch["features"], rows.tolist(), batch["key"], batch["label"].tolist(), strict=True)
        samples = [_Sample(zip(("features", "row", "key", "label"), sample, strict=True)) for sample in values]
        if "guidance" in batch:
            for sample, guidance in zip(samples, batch["guidance"], strict=True):
                sample["guidance"] = guidance
        return samples if self.transform is None else [self.transform(sample) for sample in samples]


class _Sample(dict[str, Any]):
    """A sample of a batch, which torch's ``default_collate`` puts together again without a copy."""


def _collate(samples: Sequence[_Sample], *, collate_fn_map: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        whole = _adjacent(values)
        batch[name] = default_collate(values) if whole is None else whole
    return batch


def _adjacent(values: Sequence[Any]) -> torch.Tensor | None:
    """[n, …]: tensors that follow each other in one memory, as one; None if they do not."""
    first = values[0]
    if not isinstance(first, torch.Tensor) or first.dim() == 0 or not first.is_contiguous():
        return None
    for place, value in enumerate(values):
        is_next = (
            value.shape == first.shape
            and value.dtype == first.dtype
            and value.is_contiguous()
            and value.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and value.storage_offset() == first.storage_offset() + place * first.numel()
        )
        if not is_next:
            return None
    return torch.as_strided(first, (len(values), *first.shape), (first.numel(), *first.stride()))


default_collate_fn_map[_Sample] = _collate

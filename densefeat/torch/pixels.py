"""A PyTorch dataset of random pixels and their labels, for linear probes."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from densefeat import layout
from densefeat.align import MaskFolder
from densefeat.arguments import whole_number
from densefeat.storage.parallel import in_order
from densefeat.store import FeatureStore

Masks = Callable[[str], npt.ArrayLike]
Pixels = dict[str, npt.NDArray[Any]]
_IMAGES_MIXED = 32  # batches are drawn from the pixels of this many images
_SHOWN = 3


class PixelFeatures(IterableDataset[dict[str, torch.Tensor]]):
    """Batches of random pixels with their labels from class masks, for linear probes and other per-pixel training.

    Each sample is a batch, a dict of tensors, in which n is ``batch_size`` or, in a worker's last batch, less:

    - ``features``: [n, k] float32
    - ``label``: [n] int64, the class in the mask
    - ``row``: [n] int64, the row of the store
    - ``yx``: [n, 2] int64, the pixel (y, x) of the features

    Every image is read once in an epoch, only the chosen pixels are converted to float32, and a batch has pixels of up
    to 32 images. This requires an iterable dataset: in a map-style dataset of pixels, each pixel would fetch and decode
    a whole image. Pass ``batch_size=None`` to the loader, because samples are batches already::

        dataset = PixelFeatures(store, "masks/", ignore_index=255)
        loader = DataLoader(dataset, batch_size=None, num_workers=2)
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader:
                loss = cross_entropy(head(batch["features"]), batch["label"])

    The pixels of an epoch depend on ``seed``, the epoch and the row only. With the same number of workers, batches are
    the same too. Workers share the images among themselves. For several training processes, pass each its own ``rows``.

    Args:
        store: a ``FeatureStore``, or its location (``str`` or ``Path``).
        masks: folder or URI of PNG files named by key (see ``MaskFolder``), or a function from a key to its mask: an
            integer array [height, width] of the size of the original as displayed. It must be picklable for ``spawn``
            workers, and thread-safe.
        pixels: number of pixels per image and epoch, without repetition; all labelled ones if an image has fewer.
        batch_size: number of pixels per batch.
        rows: rows or keys to use. None: all rows with features.
        ignore_index: pixels with this label are never chosen.
        balanced: choose equally many pixels of every class in an image, or all of a class that has fewer. False:
            choose uniformly.
        seed: at least 0.
        threads: number of images that a process reads at a time.

    Attributes:
        rows: [images] int64, the rows in use.

    Raises:
        KeyError, IndexError, TypeError: ``rows`` has an unknown row.
        MissingFeatures: some of ``rows`` have no features; its attribute ``rows`` has their numbers.
        FileNotFoundError: the folder lacks masks of some rows.
        ValueError: an argument is out of range; while reading, a mask is not integers [height, width] of the size of
            its image.
        StoreError: there is no store, or it is damaged.
    """

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        masks: Masks | str | os.PathLike[str],
        *,
        pixels: int = 1000,
        batch_size: int = 4096,
        rows: Iterable[int | str] | None = None,
        ignore_index: int | None = None,
        balanced: bool = False,
        seed: int = 0,
        threads: int = 2,
    ) -> None:
        for name, value, least in (
            ("pixels", pixels, 1), ("batch_size", batch_size, 1), ("threads", threads, 1), ("seed", seed, 0)
        ):  # fmt: skip
            if whole_number(value, name) < least:
                raise ValueError(f"{name} must be at least {least}: got {value}")
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.masks: Masks = masks if callable(masks) else MaskFolder(masks)
        self.pixels, self.batch_size, self.seed, self.threads = pixels, batch_size, seed, threads
        self.ignore_index, self.balanced = ignore_index, balanced
        self.rows = self.store.rows_with_features if rows is None else self.store.checked_rows(rows)
        if isinstance(self.masks, MaskFolder):
            self._check_masks(self.masks)
        # In shared memory: workers that a loader keeps between epochs see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose other pixels in another order; call it before each epoch, as for ``DistributedSampler``.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        if whole_number(epoch, "epoch") < 0:
            raise ValueError(f"epoch must be at least 0: got {epoch}")
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        epoch = int(self._epoch)
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = np.random.default_rng([self.seed, epoch]).permutation(self.rows)[part::parts]
        order = np.random.default_rng([self.seed, epoch, part, parts])
        images = in_order(lambda row: self._chosen(int(row), epoch), rows, self.threads)
        for batch in _batches(_mixed(images, order), self.batch_size):
            yield {name: torch.from_numpy(values) for name, values in batch.items()}

    def _check_masks(self, masks: MaskFolder) -> None:
        keys = [self.store.index["key"][row].as_py() for row in self.rows.tolist()]
        if missing := masks.missing(keys):
            shown = ", ".join(map(repr, missing[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise FileNotFoundError(
                f"{len(missing)} of {len(keys)} rows have no mask: {shown}{more}; add the masks, or pass the rows that "
                "have one as rows"
            )

    def _chosen(self, row: int, epoch: int) -> Pixels:
        """The pixels of one image."""
        key = self.store.index["key"][row].as_py()
        mask = np.asarray(self.masks(key))
        if mask.dtype.kind not in "biu" or mask.ndim != 2:
            raise ValueError(f"the mask of {key!r} must be integers [height, width]: got {mask.dtype} {mask.shape}")
        try:
            labels = self.store.align(mask.astype(np.int64), row)
        except ValueError as error:
            raise ValueError(f"the mask of {key!r} does not fit its image: {error}") from error
        y0, x0, y1, x1 = self.store.geometry(row).valid_box
        usable = np.zeros(labels.shape, dtype=bool)
        usable[y0:y1, x0:x1] = True
        if self.ignore_index is not None:
            usable &= labels != self.ignore_index
        rng = np.random.default_rng([self.seed, epoch, row])
        chosen = self._choose(np.flatnonzero(usable), labels.reshape(-1), rng)
        codes = self.store.read_codes(row).reshape(self.store.layout.components, -1)[:, chosen]
        return {
            "features": np.ascontiguousarray(layout.dequantize(codes, self.store.step).T),
            "label": labels.reshape(-1)[chosen],
            "row": np.full(len(chosen), row),
            "yx": np.stack(np.divmod(chosen, labels.shape[1]), axis=1),
        }

    def _choose(
        self, usable: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        if not self.balanced:
            return rng.choice(usable, min(self.pixels, len(usable)), replace=False)
        usable = rng.permutation(usable)
        _, classes, counts = np.unique(labels[usable], return_inverse=True, return_counts=True)
        left, quotas = self.pixels, np.zeros(len(counts), dtype=np.int64)
        for done, number in enumerate(np.argsort(counts, kind="stable")):  # what small classes lack, large ones give
            quotas[number] = min(counts[number], left // (len(counts) - done))
            left -= quotas[number]
        return np.concatenate([usable[classes == number][:quota] for number, quota in enumerate(quotas)] or [usable])


def _mixed(images: Iterator[Pixels], rng: np.random.Generator) -> Iterator[Pixels]:
    """The pixels of every few images, shuffled together."""
    group: list[Pixels] = []
    for image in images:
        group.append(image)
        if len(group) == _IMAGES_MIXED:
            yield _shuffled(group, rng)
            group = []
    if group:
        yield _shuffled(group, rng)


def _shuffled(group: list[Pixels], rng: np.random.Generator) -> Pixels:
    joined = _joined(group)
    order = rng.permutation(len(joined["row"]))
    return {name: values[order] for name, values in joined.items()}


def _joined(parts: list[Pixels]) -> Pixels:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batches(groups: Iterator[Pixels], size: int) -> Iterator[Pixels]:
    """Batches of ``size`` pixels; the last may have fewer."""
    rest: list[Pixels] = []
    for group in groups:
        pixels = _joined([*rest, group])
        whole = len(pixels["row"]) // size * size
        for start in range(0, whole, size):
            yield {name: values[start : start + size] for name, values in pixels.items()}
        rest = [{name: values[whole:] for name, values in pixels.items()}]
    if rest and len(rest[0]["row"]):
        yield rest[0]

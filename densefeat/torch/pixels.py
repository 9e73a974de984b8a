"""A PyTorch dataset of random pixels and their labels, for linear probes."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import astuple
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from densefeat import layout
from densefeat.align import MaskFolder
from densefeat.arguments import whole_number
from densefeat.rows.chunks import Chunk
from densefeat.store import FeatureStore
from densefeat.torch.batches import Scratch
from densefeat.torch.epochs import Batch, Epochs, check_least
from densefeat.torch.plan import Plan, Reader, piece_of_rows, plan
from densefeat.torch.read_ahead import ReadAhead

Masks = Callable[[str], npt.ArrayLike]
Pixels = dict[str, npt.NDArray[Any]]
_IMAGES_MIXED = 32  # batches are drawn from the pixels of this many images
_SHOWN = 3


class PixelFeatures(Epochs):
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
    the same too. Ranks and workers share the images among themselves, each image to one of them. ``state_dict`` and
    ``load_state_dict`` resume in mid-epoch, with torchdata's ``StatefulDataLoader`` or without workers.

    Args:
        store: a ``FeatureStore``, or its location (``str`` or ``Path``).
        masks: folder or URI of PNG files named by key (see ``MaskFolder``), or a function from a key to its mask: an
            integer array [height, width] of the size of the original as displayed. It must be picklable for ``spawn``
            workers, and thread-safe.
        pixels: number of pixels per image and epoch, without repetition; all labelled ones if an image has fewer.
        batch_size: number of pixels per batch.
        rows: rows or keys to use, each once. None: all rows with features.
        ignore_index: pixels with this label are never chosen.
        balanced: choose equally many pixels of every class in an image, or all of a class that has fewer. False:
            choose uniformly.
        seed: at least 0.
        buffer_bytes: encoded images that a process holds for shuffling.
        request_bytes: about how much one request reads.
        uneven: how many batches ranks have, if there are several; images that have fewer than ``pixels`` labelled ones
            make the difference. ``"pad"``: all as many, of ``batch_size`` pixels; a worker that has no more begins its
            pixels again. ``"keep"``: as many as there are, each pixel once; ranks may have different numbers.
        threads: number of requests, and of images decoded, that a process does at a time.
        rank: of this training process; with ``world_size``.
        world_size: number of training processes. None, as ``rank``: from ``torch.distributed`` if it is initialized
            when iteration begins, else from the environment variables RANK and WORLD_SIZE, which torchrun sets, else
            one process.

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

    _START: ClassVar[dict[str, int]] = {"batches": 0, "image": 0, "pixel": 0}

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
        buffer_bytes: int = 256 << 20,
        request_bytes: int = 8 << 20,
        uneven: Literal["pad", "keep"] = "pad",
        threads: int = 4,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_least({"pixels": (pixels, 1), "batch_size": (batch_size, 1), "threads": (threads, 1)})
        check_least({"buffer_bytes": (buffer_bytes, 0)})
        if uneven not in ("pad", "keep"):
            raise ValueError(f'uneven must be "pad" or "keep": got {uneven!r}')
        super().__init__(store, rows, seed, request_bytes, rank, world_size)
        self.masks: Masks = masks if callable(masks) else MaskFolder(masks)
        self.pixels, self.batch_size, self.threads = int(pixels), int(batch_size), threads
        self.ignore_index = None if ignore_index is None else whole_number(ignore_index, "ignore_index")
        self.balanced, self.buffer_bytes, self.uneven = bool(balanced), int(buffer_bytes), uneven
        if isinstance(self.masks, MaskFolder):
            self._check_masks(self.masks)

    def _options(self) -> dict[str, Any]:
        names = ("pixels", "batch_size", "buffer_bytes", "uneven", "ignore_index", "balanced")
        return {**super()._options(), **{name: getattr(self, name) for name in names}}

    def _batches(self, epoch: int, reader: Reader, position: dict[str, int]) -> Iterator[tuple[dict[str, int], Batch]]:
        start, images = piece_of_rows(len(self.rows), reader)
        batches = self._padded_batches(reader, images)
        rows = plan(self._runs, reader, (start, images), (self.seed, epoch), self.buffer_bytes)
        groups = self._groups(rows, position["image"], (self.seed, epoch, *astuple(reader)), repeat=batches is not None)
        number = position["batches"]
        for reached, batch in _cut(groups, self.batch_size, position["pixel"]):
            if number == batches:
                return
            number += 1
            yield {**reached, "batches": number}, {name: torch.from_numpy(values) for name, values in batch.items()}

    def _padded_batches(self, reader: Reader, images: int) -> int | None:
        """Number of batches of every worker, if they have to be the same on all ranks."""
        if reader.world_size == 1 or self.uneven == "keep":
            return None
        if images == 0:
            raise ValueError(
                f"{len(self.rows)} images are fewer than {reader.world_size} ranks with {reader.workers} workers each: "
                'use fewer, or uneven="keep"'
            )
        of_a_rank = math.ceil(len(self.rows) / reader.world_size)
        of_a_worker = math.ceil(of_a_rank / reader.workers)
        of_an_image = min(self.pixels, self.store.shape[1] * self.store.shape[2])
        return math.ceil(of_a_worker * of_an_image / self.batch_size)

    def _groups(self, rows: Plan, first: int, seed: tuple[int, ...], *, repeat: bool) -> Iterator[Pixels]:
        """The pixels of every few images, shuffled together, from image ``first`` on.

        ``group`` [n] is the number of the first image of the group, ``place`` [n] the number of the pixel in it.
        """
        images, found = len(rows.rows), 0
        while True:
            start = first % images if images else 0
            for pixels in self._images(rows.after(start), seed[1]):
                found += len(pixels["row"])
                order = np.random.default_rng([*seed, first]).permutation(len(pixels["row"]))
                shuffled = {name: values[order] for name, values in pixels.items()}
                yield {**shuffled, "group": np.full(len(order), first), "place": np.arange(len(order))}
                first += min(_IMAGES_MIXED, images - first % images)
            if not repeat:
                return
            if start == 0 and found == 0:
                raise ValueError(f"none of {images} images has a pixel with a label")

    def _images(self, rows: Plan, epoch: int) -> Iterator[Pixels]:
        """The pixels of every few images, joined."""
        scratch = Scratch(self.store)
        ahead: deque[Future[Pixels]] = deque()
        group: list[Pixels] = []
        left = len(rows.rows)
        with ReadAhead(self.store, rows, self.threads) as reads:
            while left or ahead:
                while left and len(ahead) <= self.threads:
                    ahead.append(reads.submit(partial(self._chosen, scratch, epoch)))
                    left -= 1
                group.append(ahead.popleft().result())
                if len(group) == _IMAGES_MIXED or not (left or ahead):
                    yield _joined(group)
                    group = []

    def _check_masks(self, masks: MaskFolder) -> None:
        keys = [self.store.lookup["key"][row].as_py() for row in self.rows.tolist()]
        if missing := masks.missing(keys):
            shown = ", ".join(map(repr, missing[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise FileNotFoundError(
                f"{len(missing)} of {len(keys)} rows have no mask: {shown}{more}; add the masks, or pass the rows that "
                "have one as rows"
            )

    def _chosen(self, scratch: Scratch, epoch: int, row: int, chunk: Chunk) -> Pixels:
        """The pixels of one image."""
        key = self.store.lookup["key"][row].as_py()
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
        values, step = scratch.values(row, chunk)
        values = values.reshape(len(values), -1)[:, chosen]
        return {
            "features": np.ascontiguousarray(layout.dequantize(values, step).T),
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


def _joined(parts: list[Pixels]) -> Pixels:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _cut(groups: Iterator[Pixels], size: int, skip: int) -> Iterator[tuple[dict[str, int], Pixels]]:
    """Batches of ``size`` pixels, the last perhaps of fewer, without the first ``skip``; each with the position after.

    The position is the group and place of the pixel that follows, or would follow in the last group.
    """
    rest: list[Pixels] = []
    for group in groups:
        pixels = _joined([*rest, {name: values[skip:] for name, values in group.items()}])
        skip = 0
        whole = len(pixels["row"]) // size * size
        for start in range(0, whole, size):
            yield _batch(pixels, start, start + size)
        rest = [{name: values[whole:] for name, values in pixels.items()}]
    if rest and len(rest[0]["row"]):
        yield _batch(rest[0], 0, len(rest[0]["row"]))


def _batch(pixels: Pixels, start: int, stop: int) -> tuple[dict[str, int], Pixels]:
    group, place = pixels["group"], pixels["place"]
    last = stop == len(group)
    position = {"image": int(group[stop - last]), "pixel": int(place[stop - last]) + last}
    return position, {name: values[start:stop] for name, values in pixels.items() if name not in ("group", "place")}

"""Training batches: which images each step uses, in an order determined by the seed alone, and their pixels."""

import functools
import hashlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.images.batches import BatchLoader
from pipeline.images.decoding.decode import Decoded, Geometry
from pipeline.reporting.seconds import StageSeconds
from schemas.configuration import SourceKind
from schemas.train_options import TrainConfig

__all__ = ["Draw", "ImageTable", "TrainingOrder", "first_usable", "key_hash", "training_batches"]

logger = logging.getLogger(__name__)

_STEPS_LISTED = 512  # steps whose references are taken from the table at a time
_SUBSTITUTES = 16  # replacements tried in one batch
_ORDER, _SUBSTITUTE, _STEP = range(3)  # uses of random numbers, each with a separate stream


class ImageTable(NamedTuple):
    """References to images, and how they are stored.

    Attributes:
        references: table with the schema ``schemas.index.REFERENCES``.
        kind: ``Source.kind``.
        image_column: ``Source.image_column``.
    """

    references: pa.Table
    kind: SourceKind
    image_column: str | None

    def loader(self, config: TrainConfig, batch_size: int, threads: int, scale: float = 1) -> BatchLoader:
        """Create a loader that decodes the images to ``scale`` times --size."""
        height, width = (round(scale * side) for side in config.size_px)
        return BatchLoader(
            Geometry((height, width), config.fit, (height, width)),
            batch_size,
            source_kind=self.kind,
            image_column=self.image_column,
            max_pixels=config.max_pixels,
            min_side=config.min_side,
            threads=threads,
        )


class Draw:
    """The random numbers of one step on one worker. They depend only on seed, step and rank."""

    def __init__(self, seed: int, step: int, rank: int) -> None:
        self.numpy = np.random.default_rng([_STEP, seed, step, rank])
        # On the CPU, so that a GPU trains on the same views.
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(2**63)))


class TrainingOrder:
    """The rows of each step: every epoch is a permutation of the dataset, split among the workers in batches.

    Args:
        rows: number of rows of the dataset.
        batch_size: rows per worker and step.
        workers: number of workers.
        seed: seed of the permutations.
    """

    def __init__(self, rows: int, batch_size: int, workers: int, seed: int) -> None:
        self._rows, self._batch_size, self._workers, self._seed = rows, batch_size, workers, seed
        self._epoch = functools.lru_cache(2)(self._permutation)

    def batch(self, step: int, rank: int) -> list[int]:
        """Rows of a worker's batch."""
        first = (step * self._workers + rank) * self._batch_size
        places = (divmod(position, self._rows) for position in range(first, first + self._batch_size))
        return [int(self._epoch(epoch)[place]) for epoch, place in places]

    def substitute(self, step: int, rank: int, attempt: int) -> int:
        """A replacement for a row whose image cannot be used."""
        rng = np.random.default_rng([_SUBSTITUTE, self._seed, step, rank, attempt])
        return int(rng.integers(self._rows))

    def _permutation(self, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.random.default_rng([_ORDER, self._seed, epoch]).permutation(self._rows)


def training_batches(
    references: pa.Table, loader: BatchLoader, order: TrainingOrder, rank: int, steps: range
) -> Iterator[tuple[list[str], Tensor]]:
    """Keys and pixels (uint8 [B, 3, H, W], on the CPU) of the batch of each step, decoded ahead of the consumer.

    An image that cannot be used is replaced, reproducibly, by another one of the dataset, and logged.

    Args:
        references: the dataset.
        loader: loader with the order's batch size.
        order: the rows of each step.
        rank: rank of this worker.
        steps: steps to yield.

    Raises:
        JobError: `_SUBSTITUTES` replacements of one image cannot be used either.
    """
    logged: set[str] = set()
    for first in range(steps.start, steps.stop, _STEPS_LISTED):
        listed = range(first, min(first + _STEPS_LISTED, steps.stop))
        table = references.take([row for step in listed for row in order.batch(step, rank)])
        keys = table["key"].to_pylist()
        for step, batch in zip(listed, loader.batches(table, StageSeconds()), strict=True):
            start = (step - first) * loader.batch_size
            names, pixels, attempt = keys[start : start + loader.batch_size], batch.pixels, 0
            for place, image in enumerate(batch.decoded):
                tried = 0
                while not isinstance(image, Decoded):
                    if names[place] not in logged:
                        logger.warning("%s cannot be used and is replaced: %s", names[place], image)
                        logged.add(names[place])
                    if tried == _SUBSTITUTES:
                        raise JobError(
                            f"{tried} images in a row cannot be used; the last one is {names[place]}: {image}"
                        )
                    other = references.take([order.substitute(step, rank, attempt)])
                    tried, attempt = tried + 1, attempt + 1
                    (single,) = loader.batches(other, StageSeconds())
                    names[place], pixels[place], image = other["key"][0].as_py(), single.pixels[0], single.decoded[0]
            yield names, pixels


def first_usable(
    references: pa.Table, loader: BatchLoader, count: int, *, tell: bool = True
) -> tuple[list[str], Tensor]:
    """Keys and pixels of the first ``count`` images that can be decoded: uint8 [count, 3, H, W].

    Args:
        references: the dataset.
        loader: loader with any batch size.
        count: number of images.
        tell: whether to log images that cannot be decoded.

    Raises:
        JobError: fewer images can be decoded.
    """
    keys, kept, reason = references["key"].to_pylist(), [], ""
    for number, batch in enumerate(loader.batches(references, StageSeconds())):
        for place, image in enumerate(batch.decoded):
            key = keys[number * loader.batch_size + place]
            if isinstance(image, Decoded):
                kept.append((key, batch.pixels[place]))
            elif len(kept) < count:
                reason = f"; {key} cannot: {image}"
                if tell:
                    logger.warning("%s cannot be used and is excluded from the measurements: %s", key, image)
        if len(kept) >= count:
            names, pixels = zip(*kept[:count], strict=True)
            return list(names), torch.stack(pixels)
    raise JobError(
        f"held-out views: {len(kept)} of {len(keys)} images can be used, expected --val-count {count}{reason}. Give "
        "more images (--val-images, --val-share), or a lower --val-count"
    )


def key_hash(key: str) -> float:
    """Hash of a key, in [0, 1), for a reproducible split of a dataset."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48

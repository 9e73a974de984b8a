"""Sample a dataset in the order of a fixed hash until enough images are usable.

A hash rather than a stride, because datasets can be periodic (a depth map before each photograph, an icon after it):
a stride with the same period would pick only one kind.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.images.batches import Batch
from pipeline.images.decoding.decode import Decoded

__all__ = ["FixedTree", "Part", "next_wave", "sample_rows", "usable_images"]

# Images tried per image wanted, before the sample is left smaller than requested. A dataset with fewer usable images
# exceeds any sensible --max-failed-share, and reading all of it would take hours.
_MOST_TRIED = 16


class Mergeable(Protocol):
    """Sums over images that can be merged in any grouping, up to rounding."""

    def merged(self, other: Self) -> Self:
        """Return the sum of both."""
        ...


Sums = TypeVar("Sums", bound=Mergeable)


@dataclass(frozen=True)
class Part(Generic[Sums]):
    """The result of a task over some images of a sample.

    Attributes:
        sums: over the usable images.
        images: number of usable images.
        first_error: error of the first unusable image, if any.
    """

    sums: Sums
    images: int
    first_error: str | None

    def merged(self, other: "Part[Sums]") -> "Part[Sums]":
        """Merge with ``other``, which comes after this part."""
        first_error = self.first_error or other.first_error
        return Part(self.sums.merged(other.sums), self.images + other.images, first_error)


@dataclass(frozen=True)
class Gathered:
    """Samples of a fit, not merged yet: `Part` also stands for none."""

    samples: tuple[Any, ...]

    def merged(self, other: "Gathered") -> "Gathered":
        """Samples of both."""
        return Gathered(self.samples + other.samples)


class FixedTree(Generic[Sums]):
    """Merges N parts in a fixed binary tree, so the result is bitwise the same for any order of arrival.

    Neighbours are merged as soon as both have arrived, so that a late part leaves only O(log N) others waiting. Kept
    until the end, the moments of ImageNet (384 to 768 channels, 40,000 tasks) would take 47 to 190 GB.

    Args:
        parts: N, at least 1.
    """

    def __init__(self, parts: int) -> None:
        self._widths = [parts]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._nodes: dict[tuple[int, int], Part[Sums] | None] = {}

    @property
    def waiting(self) -> int:
        """Number of merged parts waiting for a neighbour."""
        return len(self._nodes)

    def add(self, position: int, part: Part[Sums] | None) -> None:
        """Add the part at ``position``, 0 … N − 1, each once; None: there is nothing of it."""
        for level, width in enumerate(self._widths):
            neighbour = position ^ 1
            if neighbour < width:
                if (level, neighbour) not in self._nodes:
                    self._nodes[level, position] = part
                    return
                other = self._nodes.pop((level, neighbour))
                if part is None or other is None:
                    part = other if part is None else part
                else:
                    part = part.merged(other) if position < neighbour else other.merged(part)
            elif width == 1:
                self._nodes[level, 0] = part
                return
            position //= 2  # a part without a neighbour moves up unchanged

    @property
    def root(self) -> Part[Sums] | None:
        """The merged result, once all parts were added; None if there is nothing of any."""
        return self._nodes[len(self._widths) - 1, 0]


def sample_rows(rows: int, count: int, first: int = 0) -> list[int]:
    """Rows at positions ``first`` to ``first + count`` (exclusive) in the order of a fixed hash, sorted by row number.

    Sorted, because neighbours in a tar or a Parquet file are read together.
    """
    # SplitMix64's finaliser (Steele, Lea, Flood 2014) of the row number: a bijection, so no two rows tie.
    mixed = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: npt.NDArray[np.intp] = np.argsort(mixed ^ (mixed >> np.uint64(31)))
    chosen: list[int] = np.sort(order[first : first + count]).tolist()
    return chosen


def next_wave(rows: int, wanted: int, tried: int, usable: int) -> list[int]:
    """Rows to try next; none if enough images are usable or the limit of tries is reached.

    Args:
        rows: number of rows in the dataset.
        wanted: number of usable images wanted; 0, or more than there are rows, means all rows once.
        tried: number of rows tried so far.
        usable: number of usable images among them.
    """
    wanted = min(wanted, rows) or rows
    most = min(rows, _MOST_TRIED * wanted)
    if usable >= wanted or tried >= most:
        return []
    share = max(usable, 1) / tried if tried else 1.0
    return sample_rows(rows, min(math.ceil((wanted - usable) / share), most - tried), tried)


def usable_images(
    references: pa.Table, count: int, batches: Callable[[pa.Table], Iterable[Batch]]
) -> tuple[Tensor, str | None]:
    """Decode the first ``count`` usable images of the sample in this process.

    Args:
        references: of the dataset.
        count: number of images wanted.
        batches: decodes references.

    Returns:
        uint8 [at most count, 3, H, W] ([0, 3, 0, 0] if no image is usable), and the error of the first unusable image,
        if any.
    """
    usable: list[Tensor] = []
    first_error: str | None = None
    tried = 0
    while rows := next_wave(references.num_rows, count, tried, len(usable)):
        tried += len(rows)
        for batch in batches(references.take(rows)):
            for pixels, decoded in zip(batch.pixels, batch.decoded, strict=True):
                if isinstance(decoded, Decoded):
                    usable.append(pixels)
                else:
                    first_error = first_error or str(decoded)
    return torch.stack(usable[:count]) if usable else torch.empty(0, 3, 0, 0, dtype=torch.uint8), first_error

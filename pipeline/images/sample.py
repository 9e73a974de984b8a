"""A sample of a dataset, spread by a fixed hash, that goes on until enough of its images are usable.

By a hash and not at a stride: datasets have a period (a depth map before each photograph, an icon after it), and a
stride that shares it meets only the one or the other.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.images.batches import Batch
from pipeline.images.decoding.decode import Decoded

__all__ = ["FixedTree", "Part", "next_wave", "sample_rows", "usable_images"]

# Images tried for each one wanted before a sample stays smaller than asked for. A dataset with fewer usable images
# exceeds any sensible --max-failed-share; reading all of it first would take hours.
_MOST_TRIED = 16


class Mergeable(Protocol):
    """Sums over images that add up in any grouping, up to rounding."""

    def merged(self, other: Self) -> Self:
        """Both together."""
        ...


Sums = TypeVar("Sums", bound=Mergeable)


@dataclass(frozen=True)
class Part(Generic[Sums]):
    """The result of a task over some images of a sample.

    Attributes:
        sums: over its usable images.
        images: number of usable images.
        first_error: of the first image that was not usable, if any.
    """

    sums: Sums
    images: int
    first_error: str | None

    def merged(self, other: "Part[Sums]") -> "Part[Sums]":
        """Both together; ``other`` comes after this one."""
        first_error = self.first_error or other.first_error
        return Part(self.sums.merged(other.sums), self.images + other.images, first_error)


class FixedTree(Generic[Sums]):
    """Merges N parts in one binary tree, whatever their order of arrival: always the same bits.

    Neighbours are merged as soon as both are there, so that a part that is late leaves O(log N) others waiting for
    it. Kept until the end, the moments of ImageNet (384 to 768 channels, 40,000 tasks) would take 47 to 190 GB.

    Args:
        parts: N, at least 1.
    """

    def __init__(self, parts: int) -> None:
        self._widths = [parts]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._nodes: dict[tuple[int, int], Part[Sums]] = {}

    @property
    def waiting(self) -> int:
        """Number of merged parts that wait for a neighbour."""
        return len(self._nodes)

    def add(self, position: int, part: Part[Sums]) -> None:
        """Add the part at ``position``, 0 … N − 1, each once."""
        for level, width in enumerate(self._widths):
            neighbour = position ^ 1
            if neighbour < width:
                other = self._nodes.pop((level, neighbour), None)
                if other is None:
                    self._nodes[level, position] = part
                    return
                part = part.merged(other) if position < neighbour else other.merged(part)
            elif width == 1:
                self._nodes[level, 0] = part
                return
            position //= 2  # the odd one out goes up as it is

    @property
    def root(self) -> Part[Sums]:
        """All parts together, when all were added."""
        return self._nodes[len(self._widths) - 1, 0]


def sample_rows(rows: int, count: int, first: int = 0) -> list[int]:
    """Rows number ``first`` to ``first + count`` of a dataset in the order of a fixed hash, ascending.

    Ascending, because neighbours in a tar or a Parquet file are read together.
    """
    # SplitMix64's finaliser (Steele, Lea, Flood 2014) of the row number: a bijection, so no two rows tie.
    mixed = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: npt.NDArray[np.intp] = np.argsort(mixed ^ (mixed >> np.uint64(31)))
    chosen: list[int] = np.sort(order[first : first + count]).tolist()
    return chosen


def next_wave(rows: int, wanted: int, tried: int, usable: int) -> list[int]:
    """Rows to try next, none when enough images are usable or there is no sense in going on.

    Args:
        rows: of the dataset.
        wanted: usable images; 0 or more than there are rows: all rows, once.
        tried: rows so far.
        usable: usable images among them.
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
    """Decoded pixels of the first ``count`` usable images of the sample, for who computes in this process.

    Args:
        references: of the dataset.
        count: images wanted.
        batches: decodes.

    Returns:
        [at most count, 3, H, W] uint8, and the error of the first image that was not usable, if any.
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

"""The task that reads and decodes images on another node, and what it sends.

This module imports little, so that a task can say soon that it has a place: torch alone takes seconds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

if TYPE_CHECKING:
    from pipeline.errors import ImageError
    from pipeline.images.batches import Batch, BatchLoader
    from pipeline.images.decoding.decode import Decoded

__all__ = ["SentBatch", "decode_rows"]


class SentBatch(NamedTuple):
    """A batch on its way to a worker.

    Attributes:
        pixels: uint8 [B, 3, H, W].
        decoded: as in `Batch`, but images have no pixels of their own.
        seconds: what reading and decoding took by stage, since the task began.
    """

    pixels: npt.NDArray[np.uint8]
    decoded: "list[Decoded | ImageError]"
    seconds: dict[str, float]

    def batch(self) -> "Batch":
        """The batch, in memory of its own: Ray's object store is for what is on its way."""
        import torch

        from pipeline.errors import ImageError
        from pipeline.images.batches import Batch

        pixels = self.pixels.copy()
        rows = [image if isinstance(image, ImageError) else replace(image, pixels=pixels[i])
                for i, image in enumerate(self.decoded)]  # fmt: skip
        return Batch(torch.from_numpy(pixels), rows)


def decode_rows(
    make: "list[ray.ObjectRef[Callable[[], BatchLoader]]]", references: pa.Table, crashed: Mapping[int, str]
) -> Iterator[SentBatch | None]:
    """Yield None once the task has a place, then the rows of ``references`` in batches.

    Args:
        make: reference of the function that builds the loader; in a list, so that Ray does not fetch it before.
        references: as for `BatchLoader.batches`.
        crashed: as for `BatchLoader.batches`.

    Raises:
        Exception: as for `BatchLoader.batches`.
    """
    yield None
    import torch

    from pipeline.errors import ImageError
    from pipeline.reporting.seconds import StageSeconds

    torch.set_num_threads(1)  # the process has one CPU
    none = np.empty((3, 0, 0), np.uint8)
    loader, seconds = ray.get(make[0])(), StageSeconds()
    try:
        for batch in loader.batches(references, seconds, crashed):
            rows = [image if isinstance(image, ImageError) else replace(image, pixels=none) for image in batch.decoded]
            yield SentBatch(batch.pixels.numpy(), rows, seconds.total())
    finally:
        loader.stop.set()  # reads that are left after an error

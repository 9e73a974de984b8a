"""The backbone's features of many views of some images: the data that a pooling model is fitted on.

All channels of all views are many gigabytes for a large backbone. They are written to a temporary file, from which the
bias is fitted a few channels at a time; what settings are chosen on are k components, in memory.
"""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.pca import Basis, Moments, fit
from pipeline.io.storage import temporary_folder
from pipeline.reporting.progress import ProgressLine
from pipeline.upsamplers.multiview.views import held_out_views, solver_views
from pipeline.views.features import JitterMatrices, project, view_features

__all__ = ["ViewSample", "sampled_views"]


@dataclass(frozen=True, eq=False)
class ViewSample:
    """Features of the views of N images; of each image the first are for solving, the last held out.

    Attributes:
        images: [N, 3, H, W] uint8, on the CPU like all of it.
        features: [N, views + held out, C, h, w] float32, in a file.
        low: [N, views + held out, k, h, w] float32: the same in components.
        views: for solving.
        basis: of the components.
    """

    images: Tensor
    features: npt.NDArray[np.float32]
    low: Tensor
    views: int
    basis: Basis

    def channels(self, image: int, some: slice) -> Tensor:
        """Some channels of an image's views for solving: [views, channels, h, w]."""
        return torch.from_numpy(np.array(self.features[image, : self.views, some]))


@contextmanager
def sampled_views(
    backbone: Backbone, images: Tensor, *, views: int, held_out: int, components: int
) -> Iterator[ViewSample]:
    """Run the backbone on all views; images whose features are not finite, or all the same, are left out.

    Args:
        backbone: on the device to compute on.
        images: [N, 3, H, W] uint8, of the backbone's size.
        views: for solving.
        held_out: not for solving.
        components: at most so many; fewer where the features span fewer.

    Raises:
        JobError: the features do not vary, or do not fit on the disk.
    """
    device = backbone.get_buffer("mean").device
    jitters = solver_views(backbone.size, views) + held_out_views(backbone.size, held_out)
    matrices = JitterMatrices.of(jitters, device)
    shape = (len(images), len(jitters), backbone.num_chs, *backbone.grid)
    with temporary_folder("densefeat-views-") as folder:
        file = folder / "features"
        _take_space(file, 4 * math.prod(shape))
        spool: npt.NDArray[np.float32] = np.memmap(file, np.float32, "r+", shape=shape)
        moments, kept = Moments.none(backbone.num_chs), list[int]()
        line = ProgressLine("features of the views", len(images), "images")
        for n, image in enumerate(images):
            seen = view_features(backbone, image[None].to(device), matrices, None)[0]
            if seen.isfinite().all() and seen.var((0, 2, 3)).sum() > 0:
                spool[len(kept)] = seen.cpu().numpy()
                moments = moments.merged(Moments.of(seen, torch.ones_like(seen[:, 0], dtype=torch.bool)))
                kept.append(n)
            line.advance()
        basis = fit(moments, components, at_most=True)
        low = [project(torch.from_numpy(np.array(spool[n])), *basis.tensors) for n in range(len(kept))]
        yield ViewSample(images[kept], spool[: len(kept)], torch.stack(low), views, basis)


def _take_space(file: Path, needed: int) -> None:
    """Make a file of so many bytes that are its own: writing to memory ends the process where the disk is full.

    Raises:
        JobError: there are not so many.
    """
    free = shutil.disk_usage(file.parent).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with file.open("wb") as opened:
            if hasattr(os, "posix_fallocate"):  # a quota, or others who fill the disk meanwhile
                os.posix_fallocate(opened.fileno(), 0, needed)
            else:
                opened.truncate(needed)
    except OSError as error:
        raise JobError(
            f"the features of all views take {needed / 1e9:,.1f} GB in {tempfile.gettempdir()}, where "
            f"{free / 1e9:,.1f} GB are free: set TMPDIR to a folder with more room, or take fewer --fit-images or "
            f"--views ({error.strerror})"
        ) from error

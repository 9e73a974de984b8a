"""The backbone's features of many views of sampled images: the data that a pooling model is fitted on.

For a large backbone, all channels of all views take many gigabytes. They are written to a temporary file, from which
the bias is fitted a few channels at a time. Settings are chosen on k components, which are kept in memory.
"""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.pca import Moments, fit
from pipeline.io.storage import temporary_folder
from pipeline.reporting.progress import ProgressLine
from pipeline.upsamplers.images import one_colour
from pipeline.upsamplers.multiview.fit import improved_bias
from pipeline.upsamplers.multiview.pooling import FitSettings
from pipeline.upsamplers.multiview.trials import Outcome, Trial, ViewSample
from pipeline.upsamplers.multiview.views import ViewOrder, held_out_views, solver_views
from pipeline.views.features import JitterMatrices, project, view_features

__all__ = ["SpooledViews", "full_bias", "sampled_views"]

RunOn = Callable[[ViewSample, Sequence[Trial]], list[Outcome]]

_CHANNELS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class SpooledViews:
    """A sample of views in components, and in all channels.

    Attributes:
        sample: in components.
        features: [N, views + held out, C, h, w] float32, memory-mapped from a file.
    """

    sample: ViewSample
    features: npt.NDArray[np.float32]

    def channels(self, chosen: slice) -> ViewSample:
        """The sample in some channels instead of components, without held-out views."""
        views = self.sample.views
        return ViewSample(self.sample.images, torch.from_numpy(np.array(self.features[:, :views, chosen])), views)


@contextmanager
def sampled_views(
    backbone: Backbone, images: Tensor, *, views: int, order: ViewOrder, held_out: int, components: int
) -> Iterator[SpooledViews]:
    """Run the backbone on all views, skipping images of one colour, or whose features are not finite or do not vary.

    Args:
        backbone: on the device to compute on.
        images: [N, 3, H, W] uint8, of the backbone's size.
        views: number of views for solving.
        order: of the views for solving.
        held_out: number of held-out views.
        components: maximum number of components; fewer if the features span fewer dimensions.

    Raises:
        JobError: the features do not vary, or do not fit on the disk.
    """
    device = backbone.get_buffer("mean").device
    jitters = solver_views(backbone.size, views, order) + held_out_views(backbone.size, held_out)
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
            if seen.isfinite().all() and seen.var((0, 2, 3)).sum() > 0 and not one_colour(image[None]).any():
                spool[len(kept)] = seen.cpu().numpy()
                moments = moments.merged(Moments.of(seen, torch.ones_like(seen[:, 0], dtype=torch.bool)))
                kept.append(n)
            line.advance()
        basis = fit(moments, components, at_most=True)
        low = [project(torch.from_numpy(np.array(spool[n])), *basis.tensors) for n in range(len(kept))]
        yield SpooledViews(ViewSample(images[kept], torch.stack(low), views), spool[: len(kept)])


def full_bias(
    spooled: SpooledViews, settings: FitSettings, alternations: int, images: Sequence[int], run: RunOn
) -> Tensor:
    """Fit the bias in all channels [C, h, w], with as many alternations as were kept in components.

    Channels are independent problems, so this is the same fit in another basis. A residual in components cannot be
    mapped back, because it lacks whatever the components leave out.

    Args:
        spooled: the sample.
        settings: of the fit.
        alternations: number of improvements.
        images: those to fit it on.
        run: runs trials on a sample.
    """
    num_chs = spooled.features.shape[2]
    bias = torch.zeros(num_chs, *spooled.features.shape[3:])
    line = ProgressLine("bias in all channels", -(-num_chs // _CHANNELS_AT_ONCE) * alternations, "passes")
    for first in range(0, num_chs, _CHANNELS_AT_ONCE) if alternations else ():
        channels = slice(first, min(first + _CHANNELS_AT_ONCE, num_chs))
        sample = spooled.channels(channels)
        for _ in range(alternations):
            bias[channels] = improved_bias(bias[channels], settings, images, partial(run, sample))
            line.advance()
    return bias


def _take_space(file: Path, needed: int) -> None:
    """Create a file with ``needed`` bytes allocated: on a full disk, writing to mapped memory kills the process.

    Raises:
        JobError: the disk does not have enough free space.
    """
    free = shutil.disk_usage(file.parent).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with file.open("wb") as opened:
            if hasattr(os, "posix_fallocate"):  # also detects quotas and a disk that fills up meanwhile
                os.posix_fallocate(opened.fileno(), 0, needed)
            else:
                opened.truncate(needed)
    except OSError as error:
        raise JobError(
            f"the features of all views take {needed / 1e9:,.1f} GB in {tempfile.gettempdir()}, where "
            f"{free / 1e9:,.1f} GB are free: set TMPDIR to a folder with more space, or use fewer --fit-images or "
            f"--views ({error.strerror})"
        ) from error

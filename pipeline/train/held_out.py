"""The error on held-out views: how well high-res features predict the backbone's features of unseen views."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.train.world import World
from pipeline.views.downsample import mean_matrix
from pipeline.views.jitter import Jitter, apply_matrices, sample_jitter, view_images

__all__ = ["HeldOutViews", "Upsample", "ViewError", "rendered_size"]

# Independent of --seed: trainings with the same images, size, padding and zoom use the same views.
_SEED = 20_240_315
# Features whose variance is below this share of their mean square are constant up to rounding.
_CONSTANT = 1e-10

Upsample = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class ViewError:
    """Difference between predicted and actual features of views.

    Attributes:
        relative: sum of squared differences as a share of the features' own variance: 0 is perfect, 1 is as good as
            always predicting their mean.
        cosine: mean over positions of the cosine between the two.
    """

    relative: float
    cosine: float


class HeldOutViews:
    """Images and views reserved for measurements.

    High-res features of the image are computed as in the main job, transformed to the view, and averaged over each of
    its cells: a fixed downsampler, identical for every upsampler and tuned to none.

    Args:
        images: uint8 [N, 3, H, W] on the CPU.
        views: number of views per image.
        max_pad_px: as in `sample_jitter`.
        max_zoom: as in `sample_jitter`.
    """

    def __init__(self, images: Tensor, *, views: int, max_pad_px: int, max_zoom: float) -> None:
        self._images = images
        size = (images.shape[2], images.shape[3])
        self._jitters = []
        for image in range(len(images)):
            rng = np.random.default_rng([_SEED, image])
            drawn = [sample_jitter(rng, size, max_pad_px=max_pad_px, max_zoom=max_zoom) for _ in range(views)]
            self._jitters.append(drawn)

    @torch.no_grad()
    def errors(self, backbone: Backbone, upsamplers: dict[str, Upsample], world: World) -> dict[str, ViewError]:
        """Measure upsamplers, by name, on one backbone; the images are split among the world's processes.

        Args:
            backbone: backbone, on the world's device.
            upsamplers: functions of features [1, C, h, w], an image [1, 3, H, W] uint8 and a size (height, width) that
                return [1, C, height, width].
            world: this process; its device is used.

        Raises:
            JobError: the features are not finite, or constant, so that no error can be measured.
        """
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in upsamplers}
        moments = torch.zeros(2, backbone.num_chs, dtype=torch.float64)
        places = 0
        for number in range(world.rank, len(self._images), world.size):
            image, jitters = self._images[number : number + 1].to(world.device), self._jitters[number]
            targets = backbone(view_images(image.expand(len(jitters), -1, -1, -1), jitters))  # [V, C, h, w]
            low = backbone(image)
            for name, upsample in upsamplers.items():
                high = upsample(low, image, rendered_size(backbone))
                predicted = torch.cat([_seen(high, jitter, backbone.grid) for jitter in jitters])
                cosine = torch.cosine_similarity(predicted, targets, dim=1).sum()
                sums[name] += torch.stack([(predicted - targets).square().sum(), cosine]).double().cpu()
            by_channel = targets.cpu().double().transpose(0, 1).flatten(1)
            moments += torch.stack([by_channel.sum(1), by_channel.square().sum(1)])
            places += by_channel.shape[1]
        count = float(world.total(torch.tensor(places, dtype=torch.float64)))
        total, squares = world.total(moments).cpu()
        variance = _variance(backbone, total, squares, count)
        shares = {name: world.total(both).tolist() for name, both in sums.items()}
        return {name: ViewError(error / variance, cosine / count) for name, (error, cosine) in shares.items()}


def rendered_size(backbone: Backbone) -> tuple[int, int]:
    """(height, width) at which features are compared: whole cells, even if a ConvNet rounds its grid up."""
    return backbone.grid[0] * backbone.reduction, backbone.grid[1] * backbone.reduction


def _variance(backbone: Backbone, total: Tensor, squares: Tensor, count: float) -> float:
    """Sum over channels of squared deviations from the mean, from sums of values and of squares [C].

    Raises:
        JobError: it is zero (up to rounding) or not finite.
    """
    subject = f"{backbone.label}: its features of the images to measure held-out views on"
    if not squares.isfinite().all():
        raise JobError(f"{subject} contain NaN or infinity: choose another layer, or check its weights")
    variance = float((squares - total.square() / count).sum())
    if variance <= _CONSTANT * float(squares.sum()):
        raise JobError(f"{subject} are the same everywhere: choose another layer or weights")
    return variance


def _seen(high: Tensor, jitter: Jitter, grid: tuple[int, int]) -> Tensor:
    """Transform high-res features [1, C, H, W] to a view and average over its cells: [1, C, h, w]."""
    sides = zip(grid, high.shape[2:], jitter.matrices((high.shape[2], high.shape[3])), strict=True)
    rows, columns = ((mean_matrix(cells, length) @ matrix).to(high) for cells, length, matrix in sides)
    return apply_matrices(high, rows[None], columns[None])

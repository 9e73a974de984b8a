"""The error on held-out views: how well high-res features tell what the backbone sees in views nobody trained on."""

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

# Not a job's --seed: the views are the same for every training with the same images, size, padding and zoom.
_SEED = 20_240_315
# Variance as a share of the mean square below which features are the same everywhere, but for rounding.
_CONSTANT = 1e-10

Upsample = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class ViewError:
    """What is left between predicted and actual features of views.

    Attributes:
        relative: sum of squared differences as a share of the features' own variance: 0 is perfect, 1 is as good as
            always saying their mean.
        cosine: mean cosine of the angle between the two, over places.
    """

    relative: float
    cosine: float


class HeldOutViews:
    """Images, and views of them, that are used for nothing else.

    High-res features of the image are made as the main job makes them, brought into the view, and averaged over each
    of its cells: a fixed downsampler, the same for every upsampler and none's own.

    Args:
        images: uint8 [N, 3, H, W] on the CPU.
        views: of each image.
        max_pad_px: as `sample_jitter`.
        max_zoom: as `sample_jitter`.
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
        """Measure upsamplers on one backbone, by name; the images are shared among the world's processes.

        Args:
            backbone: on the world's device.
            upsamplers: [1, C, h, w] features, [1, 3, H, W] uint8 image, (height, width) -> [1, C, height, width].
            world: on whose device to compute.

        Raises:
            JobError: the features are not finite, or the same everywhere: nothing can be measured on them.
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
    """(height, width) in which features are compared: whole cells, also where a ConvNet rounds its grid up."""
    return backbone.grid[0] * backbone.reduction, backbone.grid[1] * backbone.reduction


def _variance(backbone: Backbone, total: Tensor, squares: Tensor, count: float) -> float:
    """Sum over channels of the squared differences from their means, by sums of values and of squares [C].

    Raises:
        JobError: it is zero or not finite.
    """
    who = f"{backbone.name} at layer {backbone.layer}: its features of the images to measure held-out views on"
    if not squares.isfinite().all():
        raise JobError(f"{who} contain NaN or infinity: choose another layer, or check its weights")
    variance = float((squares - total.square() / count).sum())
    if variance <= _CONSTANT * float(squares.sum()):
        raise JobError(f"{who} are the same everywhere: choose another layer or weights")
    return variance


def _seen(high: Tensor, jitter: Jitter, grid: tuple[int, int]) -> Tensor:
    """High-res features [1, C, H, W] in a view, averaged over its cells: [1, C, h, w]."""
    sides = zip(grid, high.shape[2:], jitter.matrices((high.shape[2], high.shape[3])), strict=True)
    rows, columns = ((mean_matrix(cells, length) @ matrix).to(high) for cells, length, matrix in sides)
    return apply_matrices(high, rows[None], columns[None])

"""The features that ``--upsampler multiview`` solves for, as targets of training."""

import logging
import math

import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.pca import Moments, fit
from pipeline.train.objectives.base import FeatureSample
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.fitting import fitted_on
from pipeline.upsamplers.multiview.upsampler import MultiviewUpsampler
from pipeline.views.features import project
from schemas.upsamplers import MultiviewOptions

__all__ = ["Solutions"]

logger = logging.getLogger(__name__)

_COMPONENTS = 64  # fewer if the backbone has fewer channels
_HOPELESS = 32  # images without a solution, if none has one


class Solutions:
    """Multiview, fitted to a sample of the training images, in principal components of the backbone's features.

    Args:
        backbone: on the device.
        sample: of its features.

    Attributes:
        values: number of values of what `solve` returns for an image.

    Raises:
        JobError: the features of the sampled images are the same everywhere, or each image has one colour.
    """

    def __init__(self, backbone: Backbone, sample: FeatureSample) -> None:
        device = backbone.get_buffer("mean").device
        if sample.features.var((0, 2, 3)).sum() == 0:
            raise JobError(f"{backbone.label}: its features of the sampled training images are the same everywhere")
        usable = torch.ones_like(sample.features[:, 0], dtype=torch.bool)
        basis = fit(Moments.of(sample.features, usable), _COMPONENTS, at_most=True).tensors
        mean, components = (tensor.float().to(device) for tensor in basis)
        upsampler = build_upsampler(MultiviewUpsampler.name, None, backbone, MultiviewOptions())
        assert isinstance(upsampler, MultiviewUpsampler)
        fitting = upsampler.fitting()
        assert fitting is not None
        seen = fitting.sample(sample.images[: fitting.images].to(device), mean, components)
        if seen is None:
            raise JobError(
                f"{backbone.label}: multiview can use none of the sampled training images: each has one colour, or "
                "views whose features do not vary"
            )
        self._backbone, self._upsampler = backbone, upsampler.fitted(fitted_on(device, fitting, seen))
        self._basis = mean, components
        self._with = self._without = 0  # images with a solution, and without
        self._projected = self._upsampler.with_basis(mean, components).to(device)
        grids = backbone.grid, self._upsampler.grid_before_last_step(backbone.grid)
        self.values = len(components) * sum(math.prod(grid) for grid in grids)

    def solve(self, images: Tensor) -> list[Tensor]:
        """The backbone's features without the positional bias [B, k, h, w]; the solutions, NaN where there is none.

        Args:
            images: [B, 3, H, W] uint8, of the backbone's size.

        Raises:
            JobError: no image so far has a solution, and there were many.
        """
        features = self._backbone(images)
        low = project(features, *self._basis) - self._projected.get_buffer("bias")
        solved, failures = self._projected.before_last_step(features, images, self._backbone.size)
        for failure in failures.values():
            logger.warning("an image is left out of training on %s: %s", self._backbone.label, failure)
        self._without += len(failures)
        self._with += len(images) - len(failures)
        if self._with == 0 and self._without >= _HOPELESS:
            raise JobError(
                f"{self._backbone.label}: multiview has no solution for any of {self._without} images; the last: "
                f"{next(iter(failures.values()))}"
            )
        return [low, solved.float()]

    def finish(self, solved: Tensor, images: Tensor) -> Tensor:
        """Solutions at the resolution of the images: [B, k, H, W]."""
        finished: Tensor = self._upsampler.finish(solved, images, self._backbone.size)
        return finished

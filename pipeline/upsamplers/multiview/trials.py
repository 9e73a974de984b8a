"""Trials of settings of the multiview solver: solve for one image of a sample, and look at what is left over.

A fit (`pipeline.upsamplers.multiview.fit`) consists of many trials. They do not depend on each other, so that the
workers of a job can share them.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.multiview import ViewMatrices, solve
from pipeline.upsamplers.multiview.pooling import FitSettings
from pipeline.upsamplers.multiview.views import (
    ViewOrder,
    held_out_views,
    solver_grid,
    solver_views,
    start_at,
    view_operators,
)

__all__ = ["Outcome", "Trial", "ViewSample", "relative_error", "run_trial"]


@dataclass(frozen=True, eq=False)
class ViewSample:
    """Features of views of N images, on the CPU. The first views of each image are for solving, the rest held out.

    Attributes:
        images: [N, 3, H, W] uint8.
        low: [N, views + held out, k, h, w] float32, in components.
        views: number of views for solving.
    """

    images: Tensor
    low: Tensor
    views: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def held_out(self) -> int:
        """Number of held-out views."""
        return self.low.shape[1] - self.views

    def merged(self, other: "ViewSample") -> "ViewSample":
        """This sample, then the images of another one."""
        return ViewSample(
            torch.cat([self.images, other.images]), torch.cat([self.low, other.low]), max(self.views, other.views)
        )

    def first(self, count: int) -> "ViewSample":
        """The first images of the sample."""
        return ViewSample(self.images[:count], self.low[:count], self.views)


@dataclass(frozen=True, eq=False)
class Trial:
    """Settings to try on one image.

    Attributes:
        image: its position in the sample.
        settings: of the solver.
        bias: [k, h, w], subtracted from the features of all views.
        wanted: the error of the solution on held-out views, that of the solver's start, or the residual.
    """

    image: int
    settings: FitSettings
    bias: Tensor
    wanted: Literal["error", "error of start", "residual"]


class Outcome(NamedTuple):
    """Result of a trial.

    Attributes:
        error: ``|A X + b - Y|² / |Y - mean Y|²`` on held-out views, the mean per channel; NaN if not wanted.
        residual: what the solution leaves over of the views' features, bias included, averaged over views: [k, h, w];
            None if not wanted.
    """

    error: float
    residual: Tensor | None


def run_trial(sample: ViewSample, trial: Trial, device: torch.device) -> Outcome:
    """Solve for the image of a trial on a device."""
    settings = trial.settings
    H, W, h, w = *sample.images.shape[2:], *sample.low.shape[3:]
    size, low = (H, W), (h, w)
    grid = solver_grid(size, settings.stride_px)
    place = (low, grid, settings.sigma_px, device)
    fitted = _operators(size, settings.views, settings.order, None, *place)
    seen = sample.low[trial.image].to(device)
    bias = trial.bias.to(device)
    targets = seen[: sample.views] - bias
    high = start_at(targets[:1], grid)
    if trial.wanted != "error of start":
        image = sample.images[trial.image : trial.image + 1].to(device).float() / 255
        high = solve(
            targets[None],
            fitted,
            F.adaptive_avg_pool2d(image, grid),
            high,
            regularisation=settings.regularisation,
            iterations=settings.iterations,
            colour_sigma=settings.colour_sigma,
        ).features
    if trial.wanted == "residual":
        return Outcome(float("nan"), (seen[: sample.views] - fitted.project(high)[0]).mean(0).cpu())
    held_out = _operators(size, settings.views, settings.order, sample.held_out, *place)
    return Outcome(relative_error(held_out.project(high)[0] + bias, seen[sample.views :]), None)


def relative_error(predicted: Tensor, seen: Tensor) -> float:
    """Squared error of views [V, k, h, w] of an image, as a share of the squared deviation from the channels' means."""
    spread = (seen - seen.mean((0, 2, 3), keepdim=True)).square().sum()
    return float((predicted - seen).square().sum() / spread)


@functools.lru_cache(32)
def _operators(
    size: tuple[int, int],
    views: int,
    order: ViewOrder,
    held_out: int | None,
    low: tuple[int, int],
    grid: tuple[int, int],
    sigma_px: float,
    device: torch.device,
) -> ViewMatrices:
    jitters = solver_views(size, views, order) if held_out is None else held_out_views(size, held_out)
    return view_operators(jitters, low, grid, sigma_px).to(device)

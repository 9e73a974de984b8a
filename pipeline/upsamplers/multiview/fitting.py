"""Fit a pooling model in a job's own preparation: on its sample of images, in its components, on all its workers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.features.backbone import Backbone
from pipeline.upsamplers.fitting import UpsamplerFit
from pipeline.upsamplers.images import one_colour
from pipeline.upsamplers.multiview.fit import Run, fit_pooling
from pipeline.upsamplers.multiview.pooling import FitSettings
from pipeline.upsamplers.multiview.trials import Outcome, Trial, ViewSample, run_trial
from pipeline.upsamplers.multiview.views import held_out_views, solver_views
from pipeline.views.features import JitterMatrices, view_features

__all__ = ["DEFAULT_STRIDE_PX", "DEFAULT_VIEWS", "FITTED_SETTINGS", "FIT_IMAGES", "HELD_OUT_VIEWS", "PoolingFitting"]

DEFAULT_VIEWS = 9
DEFAULT_STRIDE_PX = 4  # joint bilateral upsampling does the rest; 2 takes four times as long and is not better
FIT_IMAGES = 24  # with fewer than 18 for the bias, it was worse
HELD_OUT_VIEWS = 12
FITTED_SETTINGS = ("sigma_px", "regularisation", "iterations")  # those that a fit chooses, unless they are given


class PoolingFitting:
    """The fit of a pooling model, as `pipeline.upsamplers.fitting.Fitting`.

    Args:
        backbone: whose features are upsampled.
        settings: where the fit begins.
        given: settings that it must not change.
    """

    images = FIT_IMAGES

    def __init__(self, backbone: Backbone, settings: FitSettings, given: Mapping[str, Any]) -> None:
        self._backbone, self._settings, self._given = backbone, settings, given

    def sample(self, images: Tensor, mean: Tensor, components: Tensor) -> ViewSample | None:
        """Run the backbone on all views of images; None if none can be used.

        An image is left out if its features are not finite or do not vary, or if it has one colour, as in the job.
        """
        size, views = self._backbone.size, self._settings.views
        jitters = solver_views(size, views, self._settings.order) + held_out_views(size, HELD_OUT_VIEWS)
        matrices = JitterMatrices.of(jitters, images.device)
        low = view_features(self._backbone, images, matrices, (mean, components))
        usable = low.isfinite().flatten(1).all(1) & (low.var((1, 3, 4)).sum(1) > 0) & ~one_colour(images)
        return ViewSample(images[usable].cpu(), low[usable].cpu(), views) if usable.any() else None

    def trial(self, sample: ViewSample, trial: Trial, device: torch.device) -> Outcome:
        """Run a trial."""
        return run_trial(sample, trial, device)

    def fit(self, sample: ViewSample, run: Run) -> UpsamplerFit:
        """Choose settings and fit the bias."""
        fit = fit_pooling(len(sample), sample.low.shape[2:], self._settings, self._backbone.reduction, run, self._given)
        return self._as_stored(fit.settings, fit.bias, fit.describe())

    def usual(self, components: int) -> UpsamplerFit:
        """Settings near the best for most backbones, and no bias."""
        return self._as_stored(replace(self._settings, **self._given), torch.zeros(components, *self._backbone.grid))

    @staticmethod
    def _as_stored(settings: FitSettings, bias: Tensor, described: str = "") -> UpsamplerFit:
        chosen = {name: getattr(settings, name) for name in FITTED_SETTINGS}
        return UpsamplerFit(chosen, {"bias": bias.numpy().astype(np.float32)}, described)

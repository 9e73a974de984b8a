"""Multiview upsampling: high-res features consistent with the backbone's features of many views of the image."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from kernels.dispatch import Kind
from kernels.multiview import Solution, ViewMatrices, explain, smooth, solve
from kernels.quantization import Encoding
from pipeline.errors import ImageError, JobError
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.checks import check_images, checked_basis
from pipeline.upsamplers.fitting import Fitting, UpsamplerFit
from pipeline.upsamplers.images import one_colour, one_colour_error
from pipeline.upsamplers.interface import Facts, Projected, Stored, Upsampler, with_nonfinite
from pipeline.upsamplers.jbu import JBU, NARROW, WIDE
from pipeline.upsamplers.multiview.fit import usual_settings
from pipeline.upsamplers.multiview.fitting import (
    DEFAULT_STRIDE_PX,
    DEFAULT_VIEWS,
    FIT_IMAGES,
    FITTED_SETTINGS,
    PoolingFitting,
)
from pipeline.upsamplers.multiview.pooling import FitSettings, PoolingModel
from pipeline.upsamplers.multiview.views import MOST_VIEWS, solver_grid, solver_views, start_at, view_operators
from pipeline.views.features import JitterMatrices, project, view_features
from schemas.upsamplers import MultiviewOptions

__all__ = ["WIDE_FINISH", "MultiviewUpsampler"]

# The last step with wide kernels: those of jbu without its first stage, as the solver's grid is finer than the
# backbone's. Chosen by linear probes with EfficientNet-Lite0 and ViT-Ti/16; with that stage, they gained less.
WIDE_FINISH = WIDE[1:]
_LEAST_VARIANCE = 1e-10  # of features over positions and views, as a share of their mean square


class MultiviewUpsampler(Upsampler):
    """FeatUp's objective (arXiv 2403.10516, multi-view consistency) as a linear least-squares problem.

    The backbone runs on V jittered views of each image. It is modelled as Gaussian pooling of high-res features plus a
    positional bias. All views together then determine features on the solver's grid. These are smoothed within the
    image's regions, and training-free JBU upsamples them to the output's size.

    The result is the solution without the bias, which does not depend on the image and so carries no information about
    it. Subtracting it before bilinear interpolation improved a linear probe with ViT-S/14 (mIoU .245 to .268 on 30
    photos of COCO), and made no notable difference with Lite0 (.226, .223).

    Args:
        backbone: whose features are upsampled; shared, not copied.
        settings: of the solver. Without a pooling model they are where the fit begins.
        pooling: model of that backbone; None: a job fits one to its images (`fitting`).
        given: options that no fit may change.
        finish: the last step, from the solver's grid to the output.
    """

    name = "multiview"
    facts = Facts(
        weights="optional",
        channels="any; with weights, those of the backbone that they were fitted on",
        scale="any",
        guidance="the image, and the backbone's features of jittered views of it",
        pca="exact: the views' features are projected batch by batch",
        weights_from="jobs/fit_pooling.py fits them; without weights, the job fits a model to its images",
    )

    def __init__(
        self,
        backbone: Backbone,
        settings: FitSettings,
        pooling: PoolingModel | None,
        given: Mapping[str, Any] = MappingProxyType({}),
        finish: JBU | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.settings = backbone, settings
        self._given, self._pooling = dict(given), pooling
        self._fitted: UpsamplerFit | None = None
        self.finish = finish or JBU()

    @classmethod
    @override
    def from_options(cls, options: MultiviewOptions, weights: str | None, backbone: Backbone) -> "MultiviewUpsampler":
        """Build the upsampler; weights are a file written by ``jobs/fit_pooling.py``."""
        if options.views is not None and options.views > MOST_VIEWS:
            raise JobError(f"--views: got {options.views}, expected at most {MOST_VIEWS}: later views are held out")
        given = {name: value for name, value in vars(options).items() if value is not None}
        finish = JBU(settings=WIDE_FINISH if given.pop("jbu_kernels", None) == "wide" else NARROW)
        if weights is None:
            settings = usual_settings(backbone.reduction, options.views or DEFAULT_VIEWS, DEFAULT_STRIDE_PX)
            fixed = {name: value for name, value in given.items() if name in FITTED_SETTINGS}
            return cls(backbone, replace(settings, **given), None, fixed, finish)
        pooling = PoolingModel.read(weights)
        pooling.check(backbone, weights)
        return cls(backbone, replace(pooling.settings, **given), pooling, finish=finish)

    @override
    def identity(self) -> dict[str, object]:
        finish = {"finish": self.finish.identity()}
        if self._pooling is not None:
            return {"name": self.name, "weights": self._pooling.digest, **self.settings.identity(), **finish}
        asked = {name: value for name, value in self.settings.identity().items() if name not in FITTED_SETTINGS}
        return {"name": self.name, "fitted_on_images": FIT_IMAGES, **asked, **self._given, **finish}

    @override
    def fitting(self) -> Fitting | None:
        return PoolingFitting(self.backbone, self.settings, self._given) if self._pooling is None else None

    @override
    def fitted(self, fit: UpsamplerFit) -> "MultiviewUpsampler":
        settings = replace(self.settings, **fit.settings)
        upsampler = MultiviewUpsampler(self.backbone, settings, None, self._given, self.finish)
        upsampler._fitted = fit
        return upsampler

    @override
    def check_grid(self, channels: int, grid: tuple[int, int]) -> None:
        if self._pooling is not None:
            super().check_grid(channels, grid)

    @override
    def last_step(self) -> dict[str, object] | None:
        return self.finish.last_step()

    @override
    def grid_before_last_step(self, grid: tuple[int, int]) -> tuple[int, int]:
        return solver_grid(self.backbone.size, self.settings.stride_px)

    @override
    def explain(self, device: torch.device) -> str:
        solver = explain(Kind(device, torch.float32)).chosen
        names = {"cpu": "numba and matrix products", "batched": "torch, groups of images"}
        return f"{names.get(solver, 'torch')}; then {self.finish.explain(device)}"

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
        mean, components = checked_basis(mean, components)
        device = self.backbone.get_buffer("mean").device
        return _MultiviewProjected(self, mean.float().to(device), components.float().to(device), self._bias(components))

    def _bias(self, components: Tensor) -> Tensor:
        """The positional bias in components [k, C] float64: [k, h, w] float32."""
        if self._pooling is not None:
            bias = self._pooling.bias_on(self.backbone.grid)
            if components.shape[1] != len(bias):
                raise ValueError(f"mean: got {components.shape[1]} channels, need the weights' {len(bias)}")
            return torch.einsum("chw,kc->khw", bias.to(components), components).float()
        if self._fitted is None:
            raise ValueError("multiview: got no weights, need a fit to the images (Upsampler.fitting) or weights")
        bias = torch.from_numpy(np.array(self._fitted.arrays["bias"]))
        if bias.shape != (len(components), *self.backbone.grid):
            raise ValueError(
                f"components: got {len(components)} on a grid of {self.backbone.grid}, need those of the fit, "
                f"{tuple(bias.shape)}"
            )
        return bias


class _SolverViews:
    """The matrices of the solver's views, cached per device."""

    def __init__(self, backbone: Backbone, settings: FitSettings) -> None:
        self.grid = solver_grid(backbone.size, settings.stride_px)
        self._jitters = solver_views(backbone.size, settings.views, settings.order)
        self._operators = view_operators(self._jitters, backbone.grid, self.grid, settings.sigma_px)
        self._on: dict[torch.device, tuple[JitterMatrices, ViewMatrices]] = {}

    def on(self, device: torch.device) -> tuple[JitterMatrices, ViewMatrices]:
        """Matrices of all views except the first, which is the image itself; and the operators of all views."""
        if device not in self._on:
            self._on[device] = JitterMatrices.of(self._jitters[1:], device), self._operators.to(device)
        return self._on[device]


class _MultiviewProjected(Projected):
    def __init__(self, upsampler: MultiviewUpsampler, mean: Tensor, components: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.views = _SolverViews(upsampler.backbone, upsampler.settings)
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("bias", bias.to(mean.device))

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        solved, _ = self._solved(features, images, size)
        high: Tensor = self.upsampler.finish(solved, images, size)
        return high.float()

    @override
    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        solved, failures = self._solved(features, images, size)
        return with_nonfinite(self.upsampler.finish.encode(solved, images, size, encoding), failures)

    @override
    def before_last_step(
        self, features: Tensor, images: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, dict[int, ImageError]]:
        return self._solved(features, images, size)

    def _solved(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, dict[int, ImageError]]:
        """Solve for features on the solver's grid [B, k, H', W'], NaN for failed images; also return the failures."""
        check_images(features, images, size)
        backbone, settings = self.upsampler.backbone, self.upsampler.settings
        if tuple(images.shape[2:]) != backbone.size:
            raise ValueError(f"images: got {tuple(images.shape[2:])} pixels, need the backbone's {backbone.size}")
        grid = self.views.grid
        failures = dict.fromkeys(one_colour(images).nonzero().flatten().tolist(), one_colour_error())
        jitters, operators = self.views.on(features.device)
        projection = self.get_buffer("mean"), self.get_buffer("components")
        own = project(features, *projection)[:, None]
        targets = torch.cat([own, view_features(backbone, images, jitters, projection)], 1)
        failures = _unfit(targets) | failures
        targets -= self.get_buffer("bias")
        guidance = F.adaptive_avg_pool2d(images.float() / 255, grid)
        solution = solve(
            targets,
            operators,
            guidance,
            start_at(targets[:, 0], grid),
            regularisation=settings.regularisation,
            iterations=settings.iterations,
            colour_sigma=settings.colour_sigma,
        )
        failures = _unsolved(solution) | failures
        features = solution.features
        if settings.smoothing:
            smoothed = smooth(features, guidance, strength=settings.smoothing, colour_sigma=settings.colour_sigma)
            features = smoothed.features
        for image in failures:
            features[image] = torch.nan
        # On a GPU in float16, like other upsamplers: as precise as the stored values at half the bytes.
        return features.half() if features.is_cuda else features, failures


def _unfit(targets: Tensor) -> dict[int, ImageError]:
    """Images of targets [B, V, k, h, w] with constant or non-finite features."""
    seen = targets.transpose(1, 2).flatten(2)  # [B, k, V h w]
    variance, square = seen.var(2, correction=0).sum(1), seen.square().mean(2).sum(1)
    nonfinite = ~seen.isfinite().all(2).all(1)
    failures = _errors(variance <= _LEAST_VARIANCE * square, "constant", "its features are the same everywhere")
    return failures | _errors(nonfinite, "nonfinite", "the features of its views contain NaN or infinity")


def _unsolved(solution: Solution) -> dict[int, ImageError]:
    """Images whose fit failed."""
    finite = solution.features.flatten(1).isfinite().all(1) & solution.final.isfinite().to(solution.features.device)
    worse = finite & (solution.final > solution.initial * (1 + 1e-6)).to(finite.device)
    failures = _errors(~finite, "nonfinite", "the solution of its fit contains NaN or infinity")
    before, after = solution.initial.tolist(), solution.final.tolist()
    for i in worse.nonzero().flatten().tolist():
        failures[i] = ImageError("diverged", f"its fit got worse, from {before[i]:.3g} to {after[i]:.3g}")
    return failures


def _errors(which: Tensor, status: str, message: str) -> dict[int, ImageError]:
    return {i: ImageError(status, message) for i in which.nonzero().flatten().tolist()}

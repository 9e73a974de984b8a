"""Fit the pooling model of a backbone, which the multiview solver needs, on views of a sample of images.

All settings are evaluated by the error on held-out views of images that the bias was not fitted on:
``|A X + b - Y|² / |Y - mean Y|²``, with the mean per channel over views and positions, averaged over images.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.multiview import ViewMatrices, solve
from pipeline.reporting.progress import ProgressLine
from pipeline.upsamplers.multiview.pooling import FitSettings
from pipeline.upsamplers.multiview.sample import ViewSample
from pipeline.upsamplers.multiview.upsampler import start_at
from pipeline.upsamplers.multiview.views import held_out_views, solver_grid, solver_views, view_operators

__all__ = ["Fit", "choose", "fit_pooling"]

logger = logging.getLogger(__name__)

# Standard deviations of the Gaussian to try, in cells; refined once. Best for ViT-S/14: .21, for Lite0: .31.
_SIGMAS = (0.12, 0.2, 0.32, 0.5)
_SIGMA_IMAGES = 6  # for fitting a bias while sigma is chosen, when its accuracy matters little
_FIRST_REGULARISATION, _FIRST_ITERATIONS = 0.3, 8  # while fitting the pooling: near the best on held-out views
_MOST_ALTERNATIONS = 6
_WORTHWHILE = 0.005  # stop after an alternation that reduces the error by a smaller share than this
_REGULARISATIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_ITERATIONS = (4, 8, 12)
# Choose the smoothest solution that is nearly as good. Held-out views are hardly sensitive to borders: with ten times
# the λ that is best on them, the error was 8 to 15% higher but a linear probe improved (mIoU .265 -> .282 with
# ViT-S/14, .223 -> .237 with Lite0, 30 photos; λ was chosen on the same photos, so the gain is overstated).
_ERROR_ALLOWED = 1.1
_ITERATIONS_ALLOWED = 1.01
_CHANNELS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Fit:
    """Result of `fit_pooling`.

    Attributes:
        bias: [C, h, w] float32.
        settings: the chosen settings.
        account: held-out errors of all settings tried, JSON-serialisable.
    """

    bias: Tensor
    settings: FitSettings
    account: dict[str, Any]


def fit_pooling(sample: ViewSample, cell_px: int, stride_px: int, device: torch.device) -> Fit:
    """Fit the pooling's width, the bias, then regularisation and iterations.

    Args:
        sample: at least 4 images; settings are chosen on every fourth, the bias is fitted on the others.
        cell_px: side of a cell of the backbone's features, in pixels of the image.
        stride_px: side of a cell of the solver's grid, in pixels of the image.
        device: where to compute.
    """
    judge = [n for n in range(len(sample.images)) if n % 4 == 3]
    others = [n for n in range(len(sample.images)) if n % 4 != 3]
    settings = FitSettings(
        sigma_px=_SIGMAS[1] * cell_px,
        views=sample.views,
        stride_px=stride_px,
        regularisation=_FIRST_REGULARISATION,
        iterations=_FIRST_ITERATIONS,
    )
    settings, sigmas = _fit_sigma(sample, settings, cell_px, others[:_SIGMA_IMAGES], judge, device)
    problem = _Problem(sample, settings, device)
    bias, alternations = _fit_bias(problem, others, judge)
    full = _full_bias(problem, others, len(alternations) - 1)
    curve = _curve(problem, bias, judge)
    settings = replace(settings, **choose(curve))
    account = {
        "bias_images": len(others),
        "judging_images": len(judge),
        "components": sample.low.shape[2],
        "held_out_error": {
            "bilinear": round(problem.error_of_start(torch.zeros_like(bias), judge), 4),
            "bilinear_and_bias": round(problem.error_of_start(bias, judge), 4),
            "by_sigma_px": sigmas,
            "by_alternation": alternations,
            "by_regularisation_and_iterations": curve,
        },
    }
    return Fit(full, settings, account)


def choose(curve: Sequence[tuple[float, int, float]]) -> dict[str, Any]:
    """Choose the strongest regularisation with an error at most a tenth above the best, and its fewest iterations.

    Args:
        curve: (regularisation, iterations, held-out error) of all settings tried.

    Returns:
        "regularisation" and "iterations".
    """
    best = min(error for *_, error in curve)
    strongest = max(regularisation for regularisation, _, error in curve if error <= _ERROR_ALLOWED * best)
    own = [(iterations, error) for regularisation, iterations, error in curve if regularisation == strongest]
    enough = _ITERATIONS_ALLOWED * min(error for _, error in own)
    return {"regularisation": strongest, "iterations": min(n for n, error in own if error <= enough)}


class _Problem:
    """The sample under one set of settings."""

    def __init__(self, sample: ViewSample, settings: FitSettings, device: torch.device) -> None:
        self.sample, self.settings, self.device = sample, settings, device
        size = (sample.images.shape[2], sample.images.shape[3])
        low = (sample.low.shape[3], sample.low.shape[4])
        self.grid = solver_grid(size, settings.stride_px)

        def operators(jitters: Any) -> ViewMatrices:
            return view_operators(jitters, low, self.grid, settings.sigma_px).to(device)

        self.fitted = operators(solver_views(size, settings.views))
        self.held_out = operators(held_out_views(size, sample.low.shape[1] - sample.views))

    def solved(self, image: int, targets: Tensor, regularisation: float, iterations: int) -> Tensor:
        """Solve for one image, given targets [V, k, h, w] of its views: [1, k, H, W]."""
        guidance = F.adaptive_avg_pool2d(self.sample.images[image : image + 1].to(self.device).float() / 255, self.grid)
        start = start_at(targets[:1], self.grid)
        return solve(
            targets[None],
            self.fitted,
            guidance,
            start,
            regularisation=regularisation,
            iterations=iterations,
            colour_sigma=self.settings.colour_sigma,
        ).features

    def mean_residual(self, image: int, targets: Tensor, bias: Tensor) -> Tensor:
        """Residual of the solution for targets [V, k, h, w], averaged over views: [k, h, w]."""
        solved = self.solved(image, targets - bias, self.settings.regularisation, self.settings.iterations)
        return (targets - self.fitted.project(solved)[0]).mean(0)

    def error(self, bias: Tensor, images: Sequence[int], regularisation: float, iterations: int) -> float:
        """Held-out error in components with a bias [k, h, w], averaged over images."""
        errors = []
        for image in images:
            targets = self.sample.low[image, : self.sample.views].to(self.device) - bias
            errors.append(self._judged(image, self.solved(image, targets, regularisation, iterations), bias))
        return sum(errors) / len(errors)

    def error_of_start(self, bias: Tensor, images: Sequence[int]) -> float:
        """Held-out error of the solver's start: bilinear interpolation of the features minus the bias."""
        low = self.sample.low
        starts = [start_at(low[image, :1].to(self.device) - bias, self.grid) for image in images]
        errors = [self._judged(image, start, bias) for image, start in zip(images, starts, strict=True)]
        return sum(errors) / len(errors)

    def _judged(self, image: int, solved: Tensor, bias: Tensor) -> float:
        seen = self.sample.low[image, self.sample.views :].to(self.device)
        spread = (seen - seen.mean((0, 2, 3), keepdim=True)).square().sum()
        return float((self.held_out.project(solved)[0] + bias - seen).square().sum() / spread)


def _fit_sigma(
    sample: ViewSample, settings: FitSettings, cell_px: int, images: list[int], judge: list[int], device: torch.device
) -> tuple[FitSettings, dict[str, float]]:
    """Return the settings with the best of the widths tried, and the error of each; each gets a bias of its own."""
    errors: dict[float, float] = {}
    line = ProgressLine("pooling", len(_SIGMAS) + 2, "widths")

    def evaluate(sigma_px: float) -> None:
        problem = _Problem(sample, replace(settings, sigma_px=sigma_px), device)
        bias = _alternate(problem, images, _zero_bias(sample, device))
        errors[sigma_px] = problem.error(bias, judge, settings.regularisation, settings.iterations)
        line.advance()

    for share in _SIGMAS:
        evaluate(share * cell_px)
    best = min(errors, key=errors.__getitem__)
    step = (_SIGMAS[1] / _SIGMAS[0]) ** 0.5  # neighbouring widths differ by about the square of this factor
    for refined in (best / step, best * step):
        evaluate(refined)
    best = min(errors, key=errors.__getitem__)
    logger.info("pooling: a Gaussian of %.2f pixels, held-out error %.4f", best, errors[best])
    rounded = {f"{sigma_px:.2f}": round(error, 4) for sigma_px, error in sorted(errors.items())}
    return replace(settings, sigma_px=best), rounded


def _zero_bias(sample: ViewSample, device: torch.device) -> Tensor:
    return torch.zeros(sample.low.shape[2:], device=device)


def _alternate(problem: _Problem, images: list[int], bias: Tensor) -> Tensor:
    """Improved bias [k, h, w]: the mean residual of the views, after solving with the given bias."""
    low, views = problem.sample.low, problem.sample.views
    total = torch.zeros_like(bias)
    for image in images:
        total += problem.mean_residual(image, low[image, :views].to(problem.device), bias)
    return _centred(total / len(images))


def _centred(bias: Tensor) -> Tensor:
    """Subtract the mean over positions: views preserve constants, so it belongs to the features."""
    return bias - bias.mean((1, 2), keepdim=True)


def _fit_bias(problem: _Problem, images: list[int], judge: list[int]) -> tuple[Tensor, list[float]]:
    """Return the bias in components, and the held-out error after 0, 1, … alternations, up to the one kept."""
    settings = problem.settings
    bias = _zero_bias(problem.sample, problem.device)
    errors = [problem.error(bias, judge, settings.regularisation, settings.iterations)]
    for number in range(_MOST_ALTERNATIONS):
        better = _alternate(problem, images, bias)
        error = problem.error(better, judge, settings.regularisation, settings.iterations)
        if error >= errors[-1]:
            break
        bias = better
        errors.append(error)
        logger.info("bias: held-out error %.4f after alternation %d, %.4f without", error, number + 1, errors[0])
        if errors[-1] > (1 - _WORTHWHILE) * errors[-2]:
            break
    return bias, [round(error, 4) for error in errors]


def _full_bias(problem: _Problem, images: list[int], alternations: int) -> Tensor:
    """Fit the bias in all channels [C, h, w], with as many alternations as were kept in components.

    Channels are independent problems, so this is the same fit in another basis. A residual in components cannot be
    mapped back, because it lacks whatever the components leave out.
    """
    sample = problem.sample
    num_chs = sample.features.shape[2]
    bias = torch.zeros(num_chs, *sample.low.shape[3:])
    line = ProgressLine("bias in all channels", -(-num_chs // _CHANNELS_AT_ONCE) * alternations, "passes")
    for first in range(0, num_chs, _CHANNELS_AT_ONCE):
        channels = slice(first, min(first + _CHANNELS_AT_ONCE, num_chs))
        block = bias[channels].to(problem.device)
        for _ in range(alternations):
            residuals = (
                problem.mean_residual(image, sample.channels(image, channels).to(problem.device), block)
                for image in images
            )
            block = _centred(torch.stack(list(residuals)).mean(0))
            line.advance()
        bias[channels] = block.cpu()
    return bias


def _curve(problem: _Problem, bias: Tensor, judge: list[int]) -> list[tuple[float, int, float]]:
    """Evaluate all combinations: (regularisation, iterations, held-out error) of each."""
    curve = []
    line = ProgressLine("regularisation", len(_REGULARISATIONS) * len(_ITERATIONS), "settings")
    for regularisation in _REGULARISATIONS:
        for iterations in _ITERATIONS:
            error = problem.error(bias, judge, regularisation, iterations)
            curve.append((regularisation, iterations, round(error, 4)))
            line.advance()
    return curve

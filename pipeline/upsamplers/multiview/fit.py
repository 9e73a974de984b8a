"""Fit what the multiview solver needs to know of a backbone, on the views of a sample of images.

Everything is judged by the error on held-out views of images that the bias was not fitted on:
``|A X + b - Y|² / |Y - mean Y|²``, the mean of each channel over views and positions, averaged over images.
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

# Deviations of the Gaussian to try, as shares of a cell; refined once. ViT-S/14 had its best at .21, Lite0 at .31.
_SIGMAS = (0.12, 0.2, 0.32, 0.5)
_SIGMA_IMAGES = 6  # to fit a bias on while sigma is chosen: it then matters little how good that is
_FIRST_REGULARISATION, _FIRST_ITERATIONS = 0.3, 8  # while the pooling is fitted: near the best on held-out views
_MOST_ALTERNATIONS = 6
_WORTHWHILE = 0.005  # an alternation that improves the error by a smaller share is the last
_REGULARISATIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_ITERATIONS = (4, 8, 12)
# The smoothest solution that is nearly as good. Held-out views hardly see borders: with ten times the λ that is best on
# them the error was 8 to 15 % higher, and a linear probe better (mIoU .265 -> .282 with ViT-S/14, .223 -> .237 with
# Lite0, 30 photos; the λ was chosen on these same photos, so that the gain is flattered).
_ERROR_ALLOWED = 1.1
_ITERATIONS_ALLOWED = 1.01
_CHANNELS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Fit:
    """What came of it.

    Attributes:
        bias: [C, h, w] float32.
        settings: chosen.
        account: held-out errors of all that was tried, JSON-able.
    """

    bias: Tensor
    settings: FitSettings
    account: dict[str, Any]


def fit_pooling(sample: ViewSample, cell_px: int, stride_px: int, device: torch.device) -> Fit:
    """Fit the pooling's width, the bias, then regularisation and iterations.

    Args:
        sample: of at least 4 images; every fourth chooses the settings, the bias is fitted on the others.
        cell_px: pixels of the image in a cell of the backbone's features.
        stride_px: pixels in a cell of the solver's grid.
        device: to compute on.
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
    """The strongest regularisation that errs at most a tenth more than the best, and the fewest iterations for it.

    Args:
        curve: (regularisation, iterations, held-out error) of all that was tried.

    Returns:
        "regularisation" and "iterations".
    """
    best = min(error for *_, error in curve)
    strongest = max(regularisation for regularisation, _, error in curve if error <= _ERROR_ALLOWED * best)
    own = [(iterations, error) for regularisation, iterations, error in curve if regularisation == strongest]
    enough = _ITERATIONS_ALLOWED * min(error for _, error in own)
    return {"regularisation": strongest, "iterations": min(n for n, error in own if error <= enough)}


class _Problem:
    """The sample with one set of settings."""

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
        """Solve for targets [V, k, h, w] of an image: [1, k, H, W]."""
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
        """What the solution leaves of targets [V, k, h, w], averaged over views: [k, h, w]."""
        solved = self.solved(image, targets - bias, self.settings.regularisation, self.settings.iterations)
        return (targets - self.fitted.project(solved)[0]).mean(0)

    def error(self, bias: Tensor, images: Sequence[int], regularisation: float, iterations: int) -> float:
        """The held-out error in components, with a bias [k, h, w]."""
        errors = []
        for image in images:
            targets = self.sample.low[image, : self.sample.views].to(self.device) - bias
            errors.append(self._judged(image, self.solved(image, targets, regularisation, iterations), bias))
        return sum(errors) / len(errors)

    def error_of_start(self, bias: Tensor, images: Sequence[int]) -> float:
        """That of what the solver starts from: bilinear interpolation, of features less the bias."""
        low = self.sample.low
        starts = [start_at(low[image, :1].to(self.device) - bias, self.grid) for image in images]
        errors = [self._judged(image, start, bias) for image, start in zip(images, starts, strict=True)]
        return sum(errors) / len(errors)

    def _judged(self, image: int, solved: Tensor, bias: Tensor) -> float:
        seen = self.sample.low[image, self.sample.views :].to(self.device)
        spread = (seen - seen.mean((0, 2, 3), keepdim=True)).square().sum()
        return float((self.held_out.project(solved)[0] + bias - seen).square().sum() / spread)


def _fit_sigma(
    sample: ViewSample, settings: FitSettings, cell_px: int, some: list[int], judge: list[int], device: torch.device
) -> tuple[FitSettings, dict[str, float]]:
    """The settings with the best deviation of those tried, and the error of each; a bias is fitted to each as well."""
    errors: dict[float, float] = {}
    line = ProgressLine("pooling", len(_SIGMAS) + 2, "widths")

    def tried(sigma_px: float) -> None:
        problem = _Problem(sample, replace(settings, sigma_px=sigma_px), device)
        bias = _alternate(problem, some, _zero_bias(sample, device))
        errors[sigma_px] = problem.error(bias, judge, settings.regularisation, settings.iterations)
        line.advance()

    for share in _SIGMAS:
        tried(share * cell_px)
    best = min(errors, key=errors.__getitem__)
    step = (_SIGMAS[1] / _SIGMAS[0]) ** 0.5  # neighbours are about this factor squared away
    for refined in (best / step, best * step):
        tried(refined)
    best = min(errors, key=errors.__getitem__)
    logger.info("pooling: a Gaussian of %.2f pixels, held-out error %.4f", best, errors[best])
    rounded = {f"{sigma_px:.2f}": round(error, 4) for sigma_px, error in sorted(errors.items())}
    return replace(settings, sigma_px=best), rounded


def _zero_bias(sample: ViewSample, device: torch.device) -> Tensor:
    return torch.zeros(sample.low.shape[2:], device=device)


def _alternate(problem: _Problem, images: list[int], bias: Tensor) -> Tensor:
    """A better bias [k, h, w]: what the solutions with the last one leave of the views, averaged."""
    low, views = problem.sample.low, problem.sample.views
    total = torch.zeros_like(bias)
    for image in images:
        total += problem.mean_residual(image, low[image, :views].to(problem.device), bias)
    return _centred(total / len(images))


def _centred(bias: Tensor) -> Tensor:
    """The mean over positions belongs to the features: a constant is seen as itself."""
    return bias - bias.mean((1, 2), keepdim=True)


def _fit_bias(problem: _Problem, images: list[int], judge: list[int]) -> tuple[Tensor, list[float]]:
    """The bias in components, and the held-out error after 0, 1, … alternations, the last being the one kept."""
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
    """The bias in all channels [C, h, w]: as many alternations as were worth it in components.

    Each channel is a problem of its own, so it is the same fit in another basis; a residual in components could not
    be turned back, as it knows nothing of what the components leave out.
    """
    sample = problem.sample
    num_chs = sample.features.shape[2]
    bias = torch.zeros(num_chs, *sample.low.shape[3:])
    line = ProgressLine("bias in all channels", -(-num_chs // _CHANNELS_AT_ONCE) * alternations, "passes")
    for first in range(0, num_chs, _CHANNELS_AT_ONCE):
        some = slice(first, min(first + _CHANNELS_AT_ONCE, num_chs))
        block = bias[some].to(problem.device)
        for _ in range(alternations):
            residuals = (
                problem.mean_residual(image, sample.channels(image, some).to(problem.device), block) for image in images
            )
            block = _centred(torch.stack(list(residuals)).mean(0))
            line.advance()
        bias[some] = block.cpu()
    return bias


def _curve(problem: _Problem, bias: Tensor, judge: list[int]) -> list[tuple[float, int, float]]:
    """(regularisation, iterations, held-out error)."""
    curve = []
    line = ProgressLine("regularisation", len(_REGULARISATIONS) * len(_ITERATIONS), "settings")
    for regularisation in _REGULARISATIONS:
        for iterations in _ITERATIONS:
            error = problem.error(bias, judge, regularisation, iterations)
            curve.append((regularisation, iterations, round(error, 4)))
            line.advance()
    return curve

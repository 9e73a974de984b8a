"""Fit what the multiview solver must know of a backbone, on views of a sample of images.

The model of the backbone is Gaussian pooling plus a positional bias. Its width, the bias, then regularisation and
iterations are chosen by the error on held-out views (`pipeline.upsamplers.multiview.trials`), of images that the bias
was not fitted on. The search runs in rounds of trials that do not depend on each other.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pipeline.upsamplers.multiview.pooling import FitSettings
from pipeline.upsamplers.multiview.trials import Outcome, Trial

__all__ = ["Fit", "Run", "choose", "fit_pooling", "improved_bias", "usual_settings"]

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[Trial]], list[Outcome]]
"""Runs trials, in any order and anywhere; returns their outcomes in the order of the trials."""

# Standard deviations of the Gaussian to try, as shares of a cell; refined once. Best: .21 (ViT-S/14), .26 (Lite0).
_SIGMAS = (0.12, 0.2, 0.32, 0.5)
_SIGMA_IMAGES = 6  # for fitting a bias while sigma is chosen, when its accuracy matters little
_USUAL_SIGMA, _USUAL_REGULARISATION, _USUAL_ITERATIONS = _SIGMAS[1], 0.3, 8  # near the best on held-out views
# Not fitted, because held-out views know nothing of borders: they are explained less well, but a linear probe improves.
# With strengths of 0, 10 and 30, on 100 photographs of COCO: mIoU .203, .223, .230 (EfficientNet-Lite0), .241, .244,
# .247 (ViT-S/14), .351, .363, .366 (ViT-Ti/16); error on held-out views .336, .440, .508; .297, .319, .337; .454, .501,
# .532.
_USUAL_SMOOTHING = 10.0
_FEWEST_IMAGES = 8  # for a bias: of fewer images, it would be what they have in common
_MOST_ALTERNATIONS = 6
_WORTHWHILE = 0.005  # stop after an alternation that reduces the error by a smaller share than this
_REGULARISATIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_ITERATIONS = (4, 8, 12)
# Choose the smoothest solution that is nearly as good. Held-out views are hardly sensitive to borders: with ten times
# the λ that is best on them, the error was 8 to 15% higher but a linear probe improved (mIoU .265 -> .282 with
# ViT-S/14, .223 -> .237 with Lite0, 30 photos; λ was chosen on the same photos, so the gain is overstated).
_ERROR_ALLOWED = 1.1
_ITERATIONS_ALLOWED = 1.01


@dataclass(frozen=True, eq=False)
class Fit:
    """Result of `fit_pooling`.

    Attributes:
        bias: [k, h, w] float32, zero mean over positions.
        alternations: how often it was improved; 0: it is zero.
        bias_images: images that it was fitted on.
        settings: the chosen settings.
        account: held-out errors of all settings tried, JSON-serialisable.
    """

    bias: Tensor
    alternations: int
    bias_images: Sequence[int]
    settings: FitSettings
    account: dict[str, Any]

    @property
    def errors(self) -> tuple[float, float]:
        """Errors on held-out views of bilinear interpolation, and with the chosen settings."""
        tried = self.account["held_out_error"]
        curve = {(r, n): error for r, n, error in tried["by_regularisation_and_iterations"]}
        return tried["bilinear"], curve[self.settings.regularisation, self.settings.iterations]

    def describe(self) -> str:
        """One line for the log."""
        bilinear, error = self.errors
        settings = self.settings
        return (
            f"a Gaussian of {settings.sigma_px:.2f} pixels, regularisation {settings.regularisation:g}, "
            f"{settings.iterations} iterations, {'no bias' if not self.alternations else 'a positional bias'}; on "
            f"held-out views its error is {error / bilinear:.2f} of that of bilinear interpolation"
        )


def usual_settings(cell_px: int, views: int, stride_px: int) -> FitSettings:
    """Settings to begin with, for a backbone with cells of ``cell_px`` pixels."""
    return FitSettings(
        sigma_px=_USUAL_SIGMA * cell_px,
        views=views,
        stride_px=stride_px,
        regularisation=_USUAL_REGULARISATION,
        iterations=_USUAL_ITERATIONS,
        order="chosen",
        smoothing=_USUAL_SMOOTHING,
    )


def fit_pooling(
    images: int,
    shape: tuple[int, ...],
    settings: FitSettings,
    cell_px: int,
    run: Run,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Fit:
    """Fit the pooling's width, the bias, then regularisation and iterations.

    Args:
        images: number of images in the sample. Settings are chosen on every fourth, the bias is fitted on the others;
            with fewer than 8, settings are chosen on all, and the bias is zero.
        shape: (k, h, w) of the features of a view.
        settings: to begin with (`usual_settings`); its views, order, stride and colour scale are kept.
        cell_px: side of a cell of the backbone's features, in pixels of the image.
        run: runs the trials.
        given: settings that the fit must not change; only a regularisation is not kept anyway.
    """
    rounds = _Rounds(images, torch.zeros(shape), run)
    settings, sigmas = _fit_sigma(rounds, settings, cell_px)
    bias, alternations = _fit_bias(rounds, settings)
    regularisations = [given["regularisation"]] if "regularisation" in given else _REGULARISATIONS
    curve = _curve(rounds, settings, bias, regularisations)
    chosen = replace(settings, **choose(curve))
    (plain, with_bias) = rounds.errors([(settings, rounds.zero), (settings, bias)], "error of start")
    account = {
        "bias_images": len(rounds.others),
        "judging_images": len(rounds.judges),
        "components": shape[0],
        "held_out_error": {
            "bilinear": round(plain, 4),
            "bilinear_and_bias": round(with_bias, 4),
            "by_sigma_px": sigmas,
            "by_alternation": alternations,
            "by_regularisation_and_iterations": curve,
        },
    }
    return Fit(bias, len(alternations) - 1, rounds.others, chosen, account)


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


class _Rounds:
    """Rounds of trials on the sample's images.

    Attributes:
        judges: images on which settings are chosen.
        others: images on which a bias is fitted.
        zero: a bias of zero.
    """

    def __init__(self, images: int, zero: Tensor, run: Run) -> None:
        enough = images >= _FEWEST_IMAGES
        self.judges = [n for n in range(images) if n % 4 == 3 or not enough]
        self.others = [n for n in range(images) if n % 4 != 3 and enough]
        self.zero, self._run = zero, run

    def errors(self, tried: Sequence[tuple[FitSettings, Tensor]], wanted: str = "error") -> list[float]:
        """The mean error over the judges of each combination of settings and bias."""
        outcomes = self._outcomes(tried, self.judges, wanted)
        return [sum(outcome.error for outcome in of_one) / len(of_one) for of_one in outcomes]

    def improved(self, tried: Sequence[tuple[FitSettings, Tensor]], images: Sequence[int]) -> list[Tensor]:
        """The bias that the solutions with each combination leave over, averaged over images."""
        return [_mean_residual(of_one) for of_one in self._outcomes(tried, images, "residual")]

    def _outcomes(
        self, tried: Sequence[tuple[FitSettings, Tensor]], images: Sequence[int], wanted: Any
    ) -> list[list[Outcome]]:
        outcomes = self._run([Trial(image, *one, wanted) for one in tried for image in images])
        return [outcomes[first : first + len(images)] for first in range(0, len(outcomes), len(images))]


def improved_bias(bias: Tensor, settings: FitSettings, images: Sequence[int], run: Run) -> Tensor:
    """The bias [k, h, w] that the solutions with a bias leave over, averaged over images."""
    return _mean_residual(run([Trial(image, settings, bias, "residual") for image in images]))


def _mean_residual(outcomes: Sequence[Outcome]) -> Tensor:
    residuals = [outcome.residual for outcome in outcomes if outcome.residual is not None]
    bias = torch.stack(residuals).mean(0)
    return bias - bias.mean((1, 2), keepdim=True)  # views preserve constants, so the mean belongs to the features


def _fit_sigma(rounds: _Rounds, settings: FitSettings, cell_px: int) -> tuple[FitSettings, dict[str, float]]:
    """Return the settings with the best of the widths tried, and the error of each; each gets a bias of its own."""
    errors: dict[float, float] = {}

    def evaluate(widths: Sequence[float]) -> float:
        tried = [(replace(settings, sigma_px=width), rounds.zero) for width in widths]
        if images := rounds.others[:_SIGMA_IMAGES]:
            biases = rounds.improved(tried, images)
            tried = [(one, bias) for (one, _), bias in zip(tried, biases, strict=True)]
        errors.update(zip(widths, rounds.errors(tried), strict=True))
        return min(errors, key=errors.__getitem__)

    best = evaluate([share * cell_px for share in _SIGMAS])
    step = (_SIGMAS[1] / _SIGMAS[0]) ** 0.5  # neighbouring widths differ by about the square of this factor
    best = evaluate([best / step, best * step])
    logger.debug("pooling: a Gaussian of %.2f pixels, held-out error %.4f", best, errors[best])
    rounded = {f"{sigma_px:.2f}": round(error, 4) for sigma_px, error in sorted(errors.items())}
    return replace(settings, sigma_px=best), rounded


def _fit_bias(rounds: _Rounds, settings: FitSettings) -> tuple[Tensor, list[float]]:
    """Return the bias, and the held-out error after 0, 1, … alternations, up to the one kept."""
    bias = rounds.zero
    errors = rounds.errors([(settings, bias)])
    for number in range(_MOST_ALTERNATIONS if rounds.others else 0):
        (better,) = rounds.improved([(settings, bias)], rounds.others)
        (error,) = rounds.errors([(settings, better)])
        if error >= errors[-1]:
            break
        bias = better
        errors.append(error)
        logger.debug("bias: held-out error %.4f after alternation %d, %.4f without", error, number + 1, errors[0])
        if errors[-1] > (1 - _WORTHWHILE) * errors[-2]:
            break
    return bias, [round(error, 4) for error in errors]


def _curve(
    rounds: _Rounds, settings: FitSettings, bias: Tensor, regularisations: Sequence[float]
) -> list[tuple[float, int, float]]:
    """Evaluate all combinations: (regularisation, iterations, held-out error) of each."""
    tried = [(regularisation, iterations) for regularisation in regularisations for iterations in _ITERATIONS]
    errors = rounds.errors([(replace(settings, regularisation=r, iterations=n), bias) for r, n in tried])
    return [(*one, round(error, 4)) for one, error in zip(tried, errors, strict=True)]

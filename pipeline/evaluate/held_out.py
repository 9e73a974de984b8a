"""Consistency with views of an image that no upsampler has seen. It needs no labels.

The multi-view consistency that FeatUp trains for (Fu et al., ICLR 2024), as a measure: high-resolution features of an
image, transformed as a view of it and pooled as the backbone pools, should be the backbone's features of this view. The
pooling is a Gaussian that is fitted to the backbone (`pipeline.upsamplers.multiview`), with a positional bias for those
upsamplers that leave it out of their features. The figure is the squared error on 20 views, as a share of the variance
of their features; 1 is as good as their mean.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.multiview import ViewMatrices
from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.originals import backbone_of, check_weights, read_photo
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.probe import share
from pipeline.evaluate.report.pictures import of_cells, photograph
from pipeline.evaluate.task import Figure, Outcome, Panel
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.fitting import fitted_on
from pipeline.upsamplers.multiview.upsampler import MultiviewUpsampler
from pipeline.upsamplers.multiview.views import held_out_views, view_operators
from pipeline.views.features import JitterMatrices, view_features
from schemas.configuration import differences
from schemas.evaluate_options import EvaluateConfig
from schemas.upsamplers import MultiviewOptions

__all__ = ["check", "evaluate", "squared_errors"]

logger = logging.getLogger(__name__)

VIEWS = 20
_ERROR_SHOWN = 1.0  # of the brightest colour in pictures


@dataclass(frozen=True, eq=False)
class _Judge:
    """Evaluates features of an image on views of it, in the components of the baseline.

    Attributes:
        baseline: whose backbone, size and basis are used.
        backbone: of all sides.
        matrices: of the views.
        operators: from features at the image's resolution to those of the views.
        bias: [k, h, w], positional bias of the backbone's features.
    """

    baseline: Side
    backbone: Backbone
    matrices: JitterMatrices
    operators: ViewMatrices
    bias: Tensor

    @property
    def _basis(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.baseline.store.mean), torch.from_numpy(self.baseline.components)

    def seen(self, key: str) -> Tensor:
        """The backbone's features of the views of an image: [V, k, h, w]."""
        photo = torch.from_numpy(read_photo(self.baseline.store, self.baseline.store.row_of(key)))
        return view_features(self.backbone, photo[None], self.matrices, self._basis)[0]

    def predicted(self, side: Side, key: str) -> Tensor:
        """The features of the views as the side's high-resolution features predict them: [V, k, h, w]."""
        mean, basis = self._basis
        across = basis @ torch.from_numpy(side.components).T
        shift = basis @ (torch.from_numpy(side.store.mean) - mean)
        high = torch.einsum("kj,jhw->khw", across, side.read(key)) + shift[:, None, None]
        views = self.operators.project(high[None])[0]
        return views + self.bias if _without_bias(side) else views


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse sides of different backbones or sizes, and a baseline without the weights of its backbone.

    Raises:
        JobError: as described.
    """
    baseline = sides[0]
    for side in sides:
        ours, theirs = baseline.configuration, side.configuration
        pairs = {
            "backbone": (ours.backbone, theirs.backbone),
            "fit": (ours.geometry.fit, theirs.geometry.fit),
            "resolution of the features": (ours.geometry.size, theirs.geometry.output_size),
        }
        for name, (expected, got) in pairs.items():
            if found := differences({name: expected}, {name: got}, sides=(baseline.name, side.name)):
                raise JobError(
                    f"--features: sides differ in {'; '.join(found)}. Held-out views need one backbone, and features "
                    "at the resolution of the baseline's images"
                )
    check_weights([baseline], config.weights)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: the weights are not those that made a store, or an image cannot be read.
    """
    baseline = comparison.sides[0]
    keys = spread(comparison.keys, config.limit)
    with torch.inference_mode():
        judge = _judge(comparison, keys, config.weights)
        errors: dict[str, list[Tensor]] = {side.name: [] for side in comparison.sides}
        for key in keys:
            seen = judge.seen(key)
            for side in comparison.sides:
                errors[side.name].append(squared_errors(judge.predicted(side, key), seen))
    counts = {side: torch.stack(own)[None] for side, own in errors.items()}

    def draw(unit: int) -> list[Panel]:
        key = keys[unit]
        panels = [photograph(comparison, key, comparison.grid(key))]
        with torch.inference_mode():
            seen = judge.seen(key)
            variance = (seen - seen.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
            for side in comparison.sides:
                error = (judge.predicted(side, key)[0] - seen[0]).square().sum(0) / variance
                panels.append(of_cells(side.name, error, _ERROR_SHOWN))
        return panels

    return Outcome(
        protocol=(
            f"Squared error on {VIEWS} views of each of {len(keys)} images that no upsampler has seen, as a share of "
            "the variance of the backbone's features of these views (multi-view consistency: Fu et al., FeatUp, ICLR "
            f"2024), in {len(baseline.components)} components. Pictures: the error on the first view."
        ),
        unit="image",
        units=keys,
        figures=[Figure("error on held-out views", counts, share, higher_is_better=False)],
        draw=draw,
    )


def squared_errors(predicted: Tensor, seen: Tensor) -> Tensor:
    """Error of an image, as a share of the variance of its features [V, k, h, w], and 1: [2] float64.

    0 and 0 if its features do not vary.
    """
    error = (predicted - seen).square().sum().double()
    variance = (seen - seen.mean((0, 2, 3), keepdim=True)).square().sum().double()
    if not variance:
        return torch.zeros(2, dtype=torch.float64)
    return torch.stack([error / variance, torch.ones((), dtype=torch.float64)])


def _without_bias(side: Side) -> bool:
    """Whether a side's features leave out the positional bias."""
    return bool(side.store.attributes["configuration"]["upsampler"]["name"] == MultiviewUpsampler.name)


def _judge(comparison: Comparison, evaluated: Sequence[str], weights: str | None) -> _Judge:
    """Build the judge, and fit the pooling of the backbone to images, others than those evaluated if there are enough.

    Raises:
        JobError: the weights are others, or the images cannot be used.
    """
    baseline = comparison.sides[0]
    backbone = backbone_of(baseline, weights)
    fitting = build_upsampler("multiview", None, backbone, MultiviewOptions()).fitting()
    assert fitting is not None
    own = set(evaluated)
    others = [key for key in comparison.keys if key not in own]
    if len(others) >= fitting.images:
        keys = spread(others, fitting.images)
    else:
        keys = spread(comparison.keys, fitting.images)
        comparison.notes.append(
            f"the backbone's pooling and bias are fitted to {counted(len(keys), 'image')}, some of them evaluated, "
            f"which favours multiview a little; with a --limit that leaves {fitting.images} others, to these"
        )
    logger.info("fitting the backbone's pooling to %d images", len(keys))
    basis = torch.from_numpy(baseline.store.mean), torch.from_numpy(baseline.components)
    photos = (torch.from_numpy(read_photo(baseline.store, baseline.store.row_of(key)))[None] for key in keys)
    samples = [sample for photo in photos if (sample := fitting.sample(photo, *basis)) is not None]
    if not samples:
        raise JobError(
            f"held-out views: the features of none of {counted(len(keys), 'image')} vary; compare other images"
        )
    sample = functools.reduce(lambda one, other: one.merged(other), samples)
    fit = fitted_on(torch.device("cpu"), fitting, sample)
    jitters = held_out_views(backbone.size, VIEWS)
    operators = view_operators(jitters, backbone.grid, backbone.size, fit.settings["sigma_px"])
    matrices = JitterMatrices.of(jitters, torch.device("cpu"))
    return _Judge(baseline, backbone, matrices, operators, torch.from_numpy(fit.arrays["bias"]))

"""Monocular depth with a linear probe.

Frozen features and one linear layer per pixel, as in the linear probe of DINOv2 (Oquab et al., TMLR 2024, section 7.4),
and its figures: the root of the mean squared error in metres, and δ1, the share of the pixels with max(predicted /
true, true / predicted) < 1.25 (Eigen et al., NeurIPS 2014). The layer is a plain least-squares regression of metres, in
closed form. It is not the classifier of 256 depth bins of AdaBins and DINOv2 (Bhat et al., CVPR 2021), nor has it the
class token as input, so that the figures are not comparable with theirs.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluate import probe
from pipeline.evaluate.data.comparison import Comparison, counted
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.labels import DepthFolder, check_split, labelled_split
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.report.pictures import photograph, ramp_colours
from pipeline.evaluate.task import Figure, Outcome, Panel
from schemas.evaluate_options import EvaluateConfig

__all__ = ["check", "delta1", "depth_counts", "evaluate", "rmse"]

_RATIO = 1.25


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse labels that are not there, and integers without a scale, judged by the first image of each part.

    Raises:
        JobError: as described.
    """
    depths = _depths(config)
    for key in check_split(depths.files, keys, config):
        with contextlib.suppress(ValueError):  # a damaged file leaves out its image
            depths(key)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: there are too few images or labels.
    """
    depths = _depths(config)
    parts = labelled_split(comparison, depths, lambda _, depth: bool(np.isfinite(depth).any()), config)
    draws = probe.Draws(config.runs, len(parts.train), max(1, config.pixels // len(parts.train)), config.seed)

    def truth_on(grid: Grid, key: str) -> Tensor:
        return torch.from_numpy(grid.nearest(depths(key)))

    probes, counts = {}, {}
    for side in comparison.sides:
        chosen = probe.training_pixels(comparison, side, parts.train, truth_on, draws)
        probes[side.name] = [probe.fit_regression(x, y) for x, y in chosen]
        counts[side.name] = _evaluated(comparison, side, parts.val, depths, probes[side.name], config.depth_range)

    def draw(unit: int) -> list[Panel]:
        key = parts.val[unit]
        grid = comparison.grid(key)
        truth = grid.nearest(depths(key))
        low, high = np.nanmin(truth), np.nanmax(truth)
        panels = [
            photograph(comparison, key, grid),
            Panel(f"{low:.1f} to {high:.1f} m", ramp_colours(truth, low, high)),
        ]
        for side in comparison.sides:
            predicted = probes[side.name][0](comparison.pixels(side, key, grid))[:, 0].view(grid.shape)
            panels.append(Panel(side.name, ramp_colours(predicted.double().numpy(), low, high)))
        return panels

    return Outcome(
        protocol=(
            "Linear regression of metres in closed form, on "
            f"{draws.places.shape[2]:,} pixels of each of {counted(len(parts.train), 'image')}, evaluated on all "
            f"pixels with a depth of {config.depth_range[0]:g} to {config.depth_range[1]:g} m of {len(parts.val)} "
            f"others. Predictions are limited to this range. {config.runs} runs, each with images and pixels drawn "
            f"with replacement. Split: {parts.described}. RMSE (metres) and δ1 (Eigen et al., NeurIPS 2014) over all "
            "pixels."
        ),
        unit="image",
        units=parts.val,
        figures=[Figure("RMSE", counts, rmse, higher_is_better=False), Figure("δ1", counts, delta1)],
        draw=draw,
    )


def rmse(counts: Tensor) -> Tensor:
    """Root of the mean squared error, of `depth_counts` [N, 3]: [N]."""
    return (counts[:, 0] / counts[:, 2]).sqrt()


def delta1(counts: Tensor) -> Tensor:
    """Share of the pixels within a factor of 1.25, of `depth_counts` [N, 3]: [N]."""
    return counts[:, 1] / counts[:, 2]


def depth_counts(predicted: Tensor, truth: Tensor) -> Tensor:
    """Sum of squared errors, pixels within a factor of 1.25, and pixels, of positive depths [n]: [3] float64."""
    ratio = torch.maximum(predicted / truth, truth / predicted)
    error = (predicted - truth).square().sum()
    return torch.stack([error, (ratio < _RATIO).sum().double(), torch.tensor(float(len(truth)), dtype=torch.float64)])


def _depths(config: EvaluateConfig) -> DepthFolder:
    return DepthFolder(str(config.labels), config.depth_scale, config.depth_range)


def _evaluated(
    comparison: Comparison,
    side: Side,
    keys: Sequence[str],
    depths: DepthFolder,
    regressions: Sequence[probe.Linear],
    limits: tuple[float, float],
) -> Tensor:
    """`depth_counts` of each run and image: [R, P, 3]."""
    counts = []
    for key in keys:
        grid = comparison.grid(key)
        truth = torch.from_numpy(grid.nearest(depths(key))).flatten()
        known = truth.isfinite()
        pixels = comparison.pixels(side, key, grid)[known]
        predicted = (regression(pixels)[:, 0].double().clamp(*limits) for regression in regressions)
        counts.append(torch.stack([depth_counts(one, truth[known]) for one in predicted]))
    return torch.stack(counts, 1)

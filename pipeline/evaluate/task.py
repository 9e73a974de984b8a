"""A task, and its result: figures that can be resampled by image, and how to draw an image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.evaluate.bootstrap import Metric
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.sides import PlannedSide
from schemas.evaluate_options import EvaluateConfig

__all__ = ["Figure", "Outcome", "Panel", "Task"]


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure of all sides.

    Attributes:
        name: e.g. "mean IoU".
        counts: for each side [R, P, …]: counts of R runs on P units, summed over units before ``metric`` is taken.
            Finite: zeros of a unit that has nothing to count.
        metric: from summed counts [N, …] to values [N].
        higher_is_better: whether a greater value is better.
        digits: after the decimal point.
    """

    name: str
    counts: Mapping[str, Tensor]
    metric: Metric
    higher_is_better: bool = True
    digits: int = 3

    def of_units(self, side: str) -> Tensor:
        """Value of each unit alone, mean over the runs: [P] float64, NaN where it is undefined."""
        counts = self.counts[side].double()
        return torch.stack([self.metric(counts[:, unit]).nanmean() for unit in range(counts.shape[1])])


@dataclass(frozen=True)
class Panel:
    """A picture: uint8 [H, W, 3], and its caption."""

    caption: str
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of a task.

    Attributes:
        protocol: what was measured, in a few sentences, with the paper.
        unit: what the intervals resample, e.g. "image".
        units: their names.
        figures: the first is the main one.
        draw: pictures of a unit, given by its number; the last ones are those of the sides, in their order.
        details: further results for report.json.
        legend: colours of the pictures, (red, green, blue), by what they stand for.
    """

    protocol: str
    unit: str
    units: Sequence[str]
    figures: Sequence[Figure]
    draw: Callable[[int], list[Panel]]
    details: Mapping[str, object] = field(default_factory=dict)
    legend: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        check: refuses a request with a JobError before any features are computed, given the options, the sides, and
            the keys of the images that all sides will have.
        evaluate: runs the task.
    """

    check: Callable[[EvaluateConfig, Sequence[PlannedSide], Sequence[str]], None]
    evaluate: Callable[[Comparison, EvaluateConfig], Outcome]

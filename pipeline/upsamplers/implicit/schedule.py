"""The fitting schedule of implicit networks: which views, how many steps, and when to stop.

Published numbers are those of FeatUp (arXiv 2403.10516, appendix and published configuration).
"""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from pipeline.upsamplers.implicit.loss import PUBLISHED_WEIGHTS, LossWeights
from pipeline.views.jitter import Jitter, sample_jitter

__all__ = ["DEFAULT", "FAITHFUL", "Schedule", "sample_views"]


@dataclass(frozen=True)
class Schedule:
    """How networks are fitted.

    Attributes:
        views: number of views fitted per image.
        held_out: number of views not fitted, used to decide when to stop.
        steps: maximum number of steps.
        views_per_step: number of views drawn at random for each step.
        learning_rate: of NAdam. With four times the published rate, the error on held-out views rose again after 150
            steps and never fell below .6; with the published rate it reached .5 in 400 (one photo, ViT-S/14, k = 64).
        check_every: steps between checks on the held-out views.
        patience: checks without improvement after which an image's fit stops and its best network is kept. None runs
            all steps and keeps the last network, as published.
        weights: weights of the priors.
        max_pad_px: padding of the views, as in `sample_jitter`; reduced for smaller images.
        max_zoom: likewise, more than 1.
        cell_px: side of the downsampler's cells; None: as published for the backbone's stride.
        seed: seed of all random numbers.

    Raises:
        ValueError: a number is out of range.
    """

    views: int = 100
    held_out: int = 10
    steps: int = 400
    views_per_step: int = 10
    learning_rate: float = 2e-3
    check_every: int = 25
    patience: int | None = 3
    weights: LossWeights = PUBLISHED_WEIGHTS
    max_pad_px: int = 30
    max_zoom: float = 1.8
    cell_px: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("views", "held_out", "steps", "views_per_step", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")
        if not self.max_zoom > 1:  # at whole pixels there are so few views that the held-out ones could be all
            raise ValueError(f"max_zoom: got {self.max_zoom}, need more than 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: got {self.patience}, need at least 1, or None")

    @classmethod
    def asked_for(cls, *, views: int | None, steps: int | None) -> "Schedule":
        """The default schedule with the given numbers; FeatUp's schedule if both are its published ones."""
        if (views, steps) == (FAITHFUL.views, FAITHFUL.steps):
            return FAITHFUL
        return cls(views=DEFAULT.views if views is None else views, steps=DEFAULT.steps if steps is None else steps)

    def cell(self, stride_px: int) -> int:
        """Side of a cell in pixels for the backbone's stride: published for 8, 14 and 16, else the rule for 16."""
        if self.cell_px is not None:
            return self.cell_px
        return {8: 8, 14: 29}.get(stride_px, 2 * stride_px - 3)

    def identity(self) -> dict[str, object]:
        """Everything that features depend on, JSON-serialisable, for the configuration hash."""
        return dataclasses.asdict(self)


DEFAULT = Schedule()
FAITHFUL = Schedule(views=3000, steps=1200, check_every=100, patience=None)


def sample_views(schedule: Schedule, size: tuple[int, int]) -> tuple[list[Jitter], list[Jitter]]:
    """Draw the views of images of ``size`` (H, W) in pixels: the views to fit, and the held-out views.

    Held-out views do not depend on the number of fitted views, and are not among them.
    """
    rng = np.random.default_rng([schedule.seed, 1])
    pad = min(schedule.max_pad_px, min(size) - 1)
    drawn = (sample_jitter(rng, size, max_pad_px=pad, max_zoom=schedule.max_zoom) for _ in itertools.count())
    held = list(itertools.islice(drawn, schedule.held_out))
    # About one view in thousands, at whole pixels, repeats; enlarged views never do, so this terminates.
    others = (view for view in drawn if view not in held)
    return list(itertools.islice(others, schedule.views)), held

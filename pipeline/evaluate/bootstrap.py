"""95% intervals of a figure, and of its paired difference to a baseline, from runs evaluated photo by photo."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 4000
_DRAWN_AT_ONCE = 1 << 22  # photographs of all resamples
Metric = Callable[[Tensor], Tensor]  # summed counts [..., *] -> values [...]


@dataclass(frozen=True)
class Estimate:
    """A figure over all runs and photographs, and the interval that holds 95% of its resampled values.

    NaN if it is undefined: no photograph has any of what it counts.
    """

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def row(self) -> dict[str, float | None]:
        """The estimate for JSON, which has no NaN."""
        return {name: None if math.isnan(value) else round(value, 5) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Estimate":
        """Invert `row`."""
        return cls(*(math.nan if row[name] is None else row[name] for name in ("mean", "low", "high")))


def paired(counts: Mapping[str, Tensor], metric: Metric, baseline: str) -> dict[str, tuple[Estimate, Estimate]]:
    """Estimate ``metric`` for each side, and its difference to the side ``baseline``.

    Every resample draws one run, and photographs with replacement; the draws are the same for all sides, so that the
    difficulty of photographs and of training sets cancels in the difference. Resamples for which the figure is
    undefined, because no photograph drawn has any of what it counts, are left out.

    Args:
        counts: for each side [R, P, …]: counts of R runs on P photographs, summed before ``metric`` is taken.
        metric: from summed counts [N, …] to values [N].
        baseline: name of a side.
    """
    runs, photos = counts[baseline].shape[:2]
    generator = torch.Generator().manual_seed(0)
    precise = {side: count.double() for side, count in counts.items()}
    whole = {side: metric(count.sum(1)).nanmean() for side, count in precise.items()}
    parts: dict[str, list[Tensor]] = {side: [] for side in counts}
    of_resamples = torch.randint(runs, (RESAMPLES,), generator=generator)
    for run in torch.split(of_resamples, max(1, _DRAWN_AT_ONCE // photos)):
        drawn = torch.randint(photos, (len(run), photos), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
        for side, count in precise.items():
            parts[side].append(metric(_summed(count, run, times)))
    resampled = {side: torch.cat(own) for side, own in parts.items()}
    return {
        side: (
            _estimate(whole[side], resampled[side]),
            _estimate(whole[side] - whole[baseline], resampled[side] - resampled[baseline]),
        )
        for side in counts
    }


def _summed(counts: Tensor, run: Tensor, times: Tensor) -> Tensor:
    """Counts [R, P, …] of the drawn run, each photograph as often as it was drawn: [N, …]."""
    total = counts.new_zeros(len(run), counts[0, 0].numel())
    for number in range(len(counts)):
        total[run == number] = times[run == number] @ counts[number].flatten(1)
    return total.view(len(run), *counts.shape[2:])


def _estimate(value: Tensor, resampled: Tensor) -> Estimate:
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(value), low, high)

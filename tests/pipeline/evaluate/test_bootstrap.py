"""Intervals of paired figures, compared with their known distributions."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.evaluate import bootstrap
from pipeline.evaluate.bootstrap import Estimate, paired


def share(counts: Tensor) -> Tensor:
    """Hits divided by trials: [N, 2] -> [N]."""
    return counts[:, 0] / counts[:, 1]


def tries(hits: Tensor, trials: int) -> Tensor:
    return torch.stack([hits, torch.full_like(hits, trials)], -1)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    photos, trials = 400, 100
    hits = torch.randint(0, trials + 1, (1, photos), generator=torch.Generator().manual_seed(1))
    estimate, difference = paired({"base": tries(hits, trials)}, share, "base")["base"]
    values = hits[0].double() / trials
    assert estimate.mean == pytest.approx(float(values.mean()))
    assert estimate.half_width == pytest.approx(1.96 * float(values.std()) / math.sqrt(photos), rel=0.05)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_what_is_common_to_both_sides_cancels() -> None:
    """Photographs of very different difficulty, and one side better by the same amount on each."""
    base = torch.randint(0, 90, (3, 50), generator=torch.Generator().manual_seed(2))
    found = paired({"base": tries(base, 100), "better": tries(base + 5, 100)}, share, "base")
    value, difference = found["better"]
    assert value.half_width > 0.05
    assert difference.mean == pytest.approx(0.05)
    assert difference.half_width == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("at_once", [1, 50 * 7, 50 * 4000])
def test_the_memory_of_the_draws_changes_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = torch.randint(0, 90, (3, 50), generator=torch.Generator().manual_seed(4))
    sides = {"a": tries(hits, 100), "b": tries(hits.flip(1), 100)}
    whole = paired(sides, share, "a")
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", at_once)
    assert paired(sides, share, "a") == whole


def test_differences_between_runs_widen_the_interval() -> None:
    same = torch.full((8, 50), 50)
    apart = same + torch.arange(8)[:, None] * 5 - 17
    narrow, wide = (paired({"base": tries(hits, 100)}, share, "base")["base"][0] for hits in (same, apart))
    assert narrow.half_width == pytest.approx(0, abs=1e-9)
    assert wide.half_width == pytest.approx(0.175, abs=0.005)


@pytest.mark.parametrize("with_any", [1, 3, 20])
def test_photographs_with_nothing_to_count_do_not_undo_the_interval(with_any: int) -> None:
    """Of 20 photographs only some have borders, say: a resample may draw none of them."""
    trials = torch.zeros(1, 20, dtype=torch.int64)
    trials[0, :with_any] = 10
    counts = torch.stack([trials // 2, trials], -1)
    value, difference = paired({"base": counts, "other": counts}, share, "base")["other"]
    assert (value.mean, value.low, value.high) == (0.5, 0.5, 0.5)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_a_figure_of_nothing_is_null() -> None:
    value, _ = paired({"base": torch.zeros(1, 20, 2)}, share, "base")["base"]
    assert value.row() == {"mean": None, "low": None, "high": None}
    assert math.isnan(Estimate.of(value.row()).mean)


def test_noise_alone_is_within_the_interval() -> None:
    """Of 100 comparisons of equals about 5 are called different; 15 would be very unlikely."""
    generator = torch.Generator().manual_seed(3)
    wrong = 0
    for _ in range(100):
        sides = torch.randint(0, 101, (2, 1, 60), generator=generator)
        _, difference = paired({"a": tries(sides[0], 100), "b": tries(sides[1], 100)}, share, "a")["b"]
        wrong += difference.low > 0 or difference.high < 0
    assert 1 <= wrong <= 14

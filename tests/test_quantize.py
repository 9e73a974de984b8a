import numpy as np
import pytest
import torch

from pipeline.quantize import quantize, steps


def test_error_is_at_most_half_a_step() -> None:
    x = (
        torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5.0, 2, 1, 0.1])[:, None, None]
    )
    step = torch.from_numpy(steps(x.square().mean((0, 2, 3)).double().numpy(), 0.1))
    codes, finite, clipped = quantize(x, step)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert finite.all()
    assert clipped == 0
    assert ((codes * step[:, None, None] - x).abs() <= step[:, None, None] * 0.5001).all()


def test_components_share_an_error_floor() -> None:
    rms = np.sqrt(101.0001 / 3)
    # The first is coarser than the floor by its own range, the others are at it.
    assert np.allclose(steps(np.array([100.0, 1.0, 0.0001]), floor=0.05), [8 * 10 / 127, 0.05 * rms, 0.05 * rms])
    assert np.allclose(steps(np.array([100.0, 1.0, 0.0001]), floor=0.25), [0.25 * rms] * 3)
    assert np.allclose(steps(np.array([4.0, 1.0]), floor=0), [8 * 2 / 127, 8 / 127])
    assert (steps(np.zeros(3), 0.1) > 0).all()


def test_outliers_are_clipped_and_counted() -> None:
    x = torch.zeros(1, 2, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = 1e6, -1e6
    codes, finite, clipped = quantize(x, torch.ones(2))
    assert clipped == 2
    assert finite.all()
    assert (codes.min(), codes.max()) == (-127, 127)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [None, torch.full((2,), 0.1)])
def test_one_bad_image_is_found_and_spoils_no_other(bad: float, step: torch.Tensor | None) -> None:
    x = torch.randn(3, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    clean, _, _ = quantize(x, step)
    x[1, 0, 2, 3] = 1e4  # also clipped, which does not count where the image fails
    x[1, 0, 12, 3] = bad
    codes, finite, clipped = quantize(x, step)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(codes[[0, 2]], clean[[0, 2]])
    assert clipped == 0


def test_beyond_float16_is_not_finite() -> None:
    x = torch.ones(2, 1, 2, 2)
    x[1] = 1e6
    assert quantize(x, None)[1].tolist() == [True, False]

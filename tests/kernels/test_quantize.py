from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels.quantization import Codes, Quantization, quantized
from kernels.quantize import quantize, steps, to_float16


def test_error_is_at_most_half_a_step() -> None:
    x = (
        torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5.0, 2, 1, 0.1])[:, None, None]
    )
    step = torch.from_numpy(steps(x.square().mean((0, 2, 3)).double().numpy(), 0.1))
    offset = torch.tensor([0.0, 1, -2, 0.01])
    codes, not_finite, clipped = quantize(x - offset[:, None, None], Quantization(step, offset))
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert not_finite.tolist() == clipped.tolist() == [0, 0, 0]
    assert ((codes * step[:, None, None] - x).abs() <= step[:, None, None] * 0.5001).all()


def test_components_share_an_error_floor() -> None:
    rms = np.sqrt(101.0001 / 3)
    # The first is coarser than the floor by its own range, the others are at it.
    assert np.allclose(steps(np.array([100.0, 1.0, 0.0001]), floor=0.05), [8 * 10 / 127, 0.05 * rms, 0.05 * rms])
    assert np.allclose(steps(np.array([100.0, 1.0, 0.0001]), floor=0.25), [0.25 * rms] * 3)
    assert np.allclose(steps(np.array([4.0, 1.0]), floor=0), [8 * 2 / 127, 8 / 127])
    assert (steps(np.zeros(3), 0.1) > 0).all()


def test_outliers_are_clipped_and_counted() -> None:
    x = torch.zeros(2, 2, 3, 3)
    x[1, 0, 0, 0], x[1, 1, 1, 1] = 1e6, -1e6
    codes, not_finite, clipped = quantize(x, UNIT)
    assert clipped.tolist() == [0, 2]
    assert not_finite.tolist() == [0, 0]
    assert (codes.min(), codes.max()) == (-127, 127)


UNIT = Quantization(torch.ones(2), torch.zeros(2))


def as_float16(x: torch.Tensor, quantization: Quantization) -> Codes:
    return to_float16(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("store", [quantize, as_float16])
def test_one_bad_image_is_found_and_spoils_no_other(bad: float, store: Callable[..., Codes]) -> None:
    x = torch.randn(3, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    clean = store(x, UNIT).codes
    x[1, 0, 12, 3] = bad
    codes, not_finite, clipped = store(x, UNIT)
    assert not_finite.tolist() == [0, 1, 0]
    assert torch.equal(codes[[0, 2]], clean[[0, 2]])
    assert clipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_codes_are_the_definition(memory_format: torch.memory_format) -> None:
    x = 60 * torch.randn(2, 5, 19, 11, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 2, 9, 1] = torch.nan, torch.inf, 0.5
    quantization = Quantization(torch.rand(5) + 0.5, torch.randn(5))
    codes = quantize(x.contiguous(memory_format=memory_format), quantization)
    for actual, expected in zip(codes, quantized(x, quantization), strict=True):
        assert torch.equal(actual, expected)


def test_beyond_float16_is_not_finite() -> None:
    x = torch.ones(2, 1, 2, 2)
    x[1] = 1e6
    assert to_float16(x).not_finite.tolist() == [0, 4]

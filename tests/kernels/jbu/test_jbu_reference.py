"""The definition of joint bilateral upsampling, against what its words say, pixel by pixel."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from kernels.jbu import adaptive_conv_upsample2x, bilateral_kernel, learned_kernel
from kernels.jbu import reference as jbu_reference
from kernels.jbu.bicubic import WEIGHTS, first_source_pixel
from tests.helpers.jbu import random_kernel, random_stage


def cubic(x):
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_bicubic2x(source):
    """source [h, w] -> [2h, 2w], pixel by pixel."""
    h, w = source.shape
    high = torch.zeros(2 * h, 2 * w, dtype=source.dtype)
    for Y, X in np.ndindex(2 * h, 2 * w):
        y, x = (Y + 0.5) / 2 - 0.5, (X + 0.5) / 2 - 0.5
        for j, i in itertools.product(
            range(math.floor(y) - 1, math.floor(y) + 3), range(math.floor(x) - 1, math.floor(x) + 3)
        ):
            high[Y, X] += cubic(y - j) * cubic(x - i) * source[min(max(j, 0), h - 1), min(max(i, 0), w - 1)]
    return high


def reflect(index, size):
    return (size - 1) - abs(size - 1 - abs(index))


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_reference_is_the_explicit_loop(radius):
    source = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    kernel = random_kernel(1, 3, 2, radius, torch.float64)
    high, n = slow_bicubic2x(source[0, 0]), 2 * radius + 1
    expected = torch.zeros_like(high)
    for Y, X, a, b in np.ndindex(6, 4, n, n):
        tap = high[reflect(Y + a - radius, 6), reflect(X + b - radius, 4)]
        expected[Y, X] += kernel[0, a * n + b, Y, X] * tap
    torch.testing.assert_close(jbu_reference.adaptive_conv_upsample2x(source, kernel)[0, 0], expected)


def test_bilateral_reference_is_the_explicit_loop():
    guidance = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    kernel = jbu_reference.bilateral_kernel(guidance, 1.3, 0.2, radius=1)
    for Y, X in np.ndindex(4, 5):
        weights = []
        for a, b in itertools.product((-1, 0, 1), repeat=2):
            colour = guidance[0, :, Y, X] - guidance[0, :, reflect(Y + a, 4), reflect(X + b, 5)]
            weights.append(math.exp(-(a * a + b * b) / (2 * 1.3**2) - colour.square().sum().item() / (2 * 0.2**2)))
        expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        torch.testing.assert_close(kernel[0, :, Y, X], expected)


def test_reference_has_right_gradients():
    reference = {"implementation": "reference"}
    source = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    kernel = random_kernel(1, 2, 3, 1, torch.float64).requires_grad_()
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda s, k: adaptive_conv_upsample2x(s, k, **reference), (source, kernel))
    guidance = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: bilateral_kernel(g, 1.0, 0.5, 1, **reference), (guidance,))
    stage = random_stage(4, 1).double()
    assert gradcheck(lambda g, *_: learned_kernel(g, stage, **reference), (guidance, *stage.parameters()))


def test_the_tables_of_bicubic_are_its_cubic():
    for high in range(8):
        first, place = int(first_source_pixel(np.array(high))), (high + 0.5) / 2 - 0.5
        expected = [cubic(place - low) for low in range(first, first + 4)]
        np.testing.assert_allclose(WEIGHTS[high % 2], expected, rtol=0, atol=1e-15)

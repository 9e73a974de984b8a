"""The CPU implementation, backward."""

from functools import partial

import pytest
import torch

from kernels import jbu
from kernels.jbu import cpu as jbu_cpu
from kernels.jbu import operators as jbu_operators
from kernels.jbu import reference as jbu_reference
from tests.helpers.jbu import random_kernel, random_stage
from tests.helpers.rounding import assert_close

# Of the largest expected value, against the reference in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CPU = {"implementation": "cpu"}
gradcheck = partial(torch.autograd.gradcheck, atol=1e-7)


@pytest.mark.parametrize(("C", "h", "w", "radius"), [(2, 2, 3, 1), (1, 3, 2, 2), (9, 2, 2, 3)])
def test_adaptive_conv_has_right_gradients(C, h, w, radius):
    source = torch.randn(1, C, h, w, dtype=torch.float64, requires_grad=True)
    kernel = random_kernel(1, h, w, radius, torch.float64).requires_grad_()
    assert gradcheck(partial(jbu.adaptive_conv_upsample2x, **CPU), (source, kernel), fast_mode=radius > 1)


@pytest.mark.parametrize(("D", "H", "W", "radius"), [(3, 2, 3, 1), (2, 5, 3, 2), (1, 4, 5, 3)])
def test_range_products_have_right_gradients(D, H, W, radius):
    keys = torch.randn(2, D, H, W, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda keys: jbu_operators.range_products(keys, radius, "cpu"), (keys,))


def test_learned_kernel_has_right_gradients():
    stage = random_stage(4, 1).double()
    guidance = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = guidance, *stage.parameters()
    assert gradcheck(lambda guidance, *_: jbu.learned_kernel(guidance, stage, **CPU), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients(dtype):
    """Against autograd of the reference in float64, on what one vector or strip does not hold."""
    for C, h, w, radius, layout in [(3, 5, 9, 3, 0), (17, 9, 4, 2, 1), (65, 4, 5, 4, 1), (70, 3, 17, 1, 0)]:
        source = torch.randn(2, C, h, w).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        kernel = random_kernel(2, h, w, radius, dtype)
        gradient = torch.randn(2, C, 2 * h, 2 * w).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        gradients = jbu_cpu.adaptive_conv_upsample2x_backward(gradient, source, kernel, True, True)
        wide = [tensor.double().requires_grad_() for tensor in (source, kernel)]
        expected = torch.autograd.grad(jbu_reference.adaptive_conv_upsample2x(*wide), wide, gradient.double())
        keys, gradient = torch.randn(2, C, h, 2 * w + 3).to(dtype), torch.randn(2, (2 * radius + 1) ** 2, h, 2 * w + 3)
        if h > radius:
            gradients = *gradients, jbu_cpu.range_products_backward(gradient.to(dtype), keys, radius)
            wide = keys.double().requires_grad_()
            products = jbu_reference.range_products(wide, radius)
            expected = *expected, *torch.autograd.grad(products, wide, gradient.to(dtype).double())
        for actual, wanted in zip(gradients, expected, strict=True):
            assert actual.dtype == dtype
            assert actual.is_contiguous()
            assert_close(actual, wanted, 2 * TOLERANCE[dtype])

"""The CPU implementation, forward: what it shares with the others is in test_jbu.py."""

import math

import pytest
import torch

from kernels import jbu
from kernels.jbu import cpu as jbu_cpu
from kernels.jbu import operators as jbu_operators
from kernels.jbu import reference as jbu_reference
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Quantization, quantized
from tests.helpers.jbu import random_copy, random_kernel, random_stage
from tests.helpers.rounding import assert_close

# Of the largest expected value, against the reference in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CPU = {"implementation": "cpu"}


# --- Forward, against the reference in float64 ---


@pytest.mark.parametrize("radius", [1, 2, 3, 4])
@pytest.mark.parametrize("C", [1, 3, 16, 17, 63, 64, 65, 130])
def test_adaptive_conv(C, radius):
    for number, (h, w) in enumerate([(5, 4), (3, 17)]):
        source, kernel = torch.randn(2, C, h, w), random_kernel(2, h, w, radius)
        expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double())
        source = source.contiguous(memory_format=LAYOUTS[number % 2])
        kernel = kernel.contiguous(memory_format=LAYOUTS[number // 2])
        assert_close(jbu.adaptive_conv_upsample2x(source, kernel, **CPU), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_all_operations_in_all_dtypes(dtype):
    for C, radius, layout in [(3, 1, LAYOUTS[0]), (24, 3, LAYOUTS[1])]:
        source = torch.randn(2, C, 6, 9).to(dtype).contiguous(memory_format=layout)
        guidance = torch.rand(2, 3, 12, 18).to(dtype).contiguous(memory_format=layout)
        stage, keys = random_stage(20, radius).to(dtype), torch.randn(2, 10, 7, 9).to(dtype)
        kernel = random_kernel(2, 6, 9, radius).to(dtype)
        wide, wide_guidance = source.double(), guidance.double()
        parameters = StageParameters.of(random_copy(stage).double())
        bilateral = guidance, 1.5, 0.1, radius
        for output, expected in [
            (
                jbu.adaptive_conv_upsample2x(source, kernel, **CPU),
                jbu_reference.adaptive_conv_upsample2x(wide, kernel.double()),
            ),
            (jbu_operators.range_products(keys, radius, "cpu"), jbu_reference.range_products(keys.double(), radius)),
            (jbu.bilateral_kernel(*bilateral, **CPU), jbu_reference.bilateral_kernel(wide_guidance, *bilateral[1:])),
            (jbu.learned_kernel(guidance, stage, **CPU), jbu_reference.learned_kernel(wide_guidance, parameters)),
            (
                jbu.bilateral_stage(source, *bilateral, **CPU),
                jbu_reference.bilateral_stage(wide, wide_guidance, *bilateral[1:]),
            ),
            (
                jbu.learned_stage(source, guidance, stage, **CPU),
                jbu_reference.learned_stage(wide, wide_guidance, parameters),
            ),
        ]:
            assert output.dtype == dtype
            assert_close(output, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("sigma_range", [1e-30, 1e-3, 0.1, 1e30])
def test_bilateral_kernel(sigma_range):
    for radius, G, H, W in [(1, 1, 2, 5), (2, 3, 7, 18), (3, 3, 9, 33), (4, 2, 16, 16)]:
        guidance = torch.rand(2, G, H, W)
        expected = jbu_reference.bilateral_kernel(guidance.double(), 1.5, sigma_range, radius)
        assert_close(jbu.bilateral_kernel(guidance, 1.5, sigma_range, radius, **CPU), expected, 2e-6)


@pytest.mark.parametrize("temperature", [-20.0, 0.3])  # the first is below the clamp
@torch.no_grad()
def test_learned_kernel(temperature):
    for radius, key_dim, H, W in [(1, 5, 3, 2), (2, 8, 7, 18), (3, 32, 9, 33), (4, 17, 16, 16)]:
        stage, guidance = random_stage(key_dim, radius), torch.randn(2, 3, H, W)
        stage.range_temp.fill_(temperature)
        output = jbu.learned_kernel(guidance, stage, **CPU)
        expected = jbu_reference.learned_kernel(guidance.double(), StageParameters.of(stage.double()))
        assert_close(output, expected, 2e-5)


@torch.no_grad()
def test_a_narrow_gaussian_meets_the_clamp_of_its_sum():
    stage, guidance = random_stage(8, 1), 3 * torch.randn(1, 3, 9, 8)
    stage.range_temp.fill_(1.0)
    stage.sigma_spatial.fill_(0.05)  # only the pixel itself counts, whose softmax weight can be anything
    output = jbu.learned_kernel(guidance, stage, **CPU)
    expected = jbu_reference.learned_kernel(guidance.double(), StageParameters.of(stage.double()))
    assert_close(output, expected, 2e-5)


def test_weights_that_count_for_nothing_do_so_in_every_column():
    kernel, source = torch.full((1, 9, 16, 18), 1e-31), torch.full((1, 2, 8, 9), 1e31)
    assert (jbu.adaptive_conv_upsample2x(source, kernel, **CPU) == 0).all()


@pytest.mark.parametrize("radius", [1, 2, 3, 4])
def test_nan_features_stay_nan_in_their_neighbourhood(radius):
    source = torch.randn(2, 18, 12, 13)
    source[0, 2, 4, 6] = math.nan
    output = jbu.bilateral_stage(source, torch.rand(2, 3, 24, 26), 1.5, 0.1, radius, **CPU)
    bad = output.isnan()
    assert bad[0, 2, 8:10, 12:14].all()
    reach = radius // 2 + 2  # of an output pixel on the low-res grid
    bad[0, 2, 2 * (4 - reach) : 2 * (5 + reach), 2 * max(6 - reach, 0) : 2 * (7 + reach)] = False
    assert not bad.any()


def test_strided_views_are_taken():
    source = torch.randn(1, 20, 10, 3).permute(0, 3, 2, 1)[:, :, ::2, ::4]
    kernel, guidance = random_kernel(1, 5, 20, 3)[..., ::4], torch.rand(10, 10, 3, 2).permute(3, 2, 0, 1)[::2]
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double())
    assert_close(jbu.adaptive_conv_upsample2x(source, kernel, **CPU), expected, 2e-6)
    expected = jbu_reference.bilateral_stage(source.double(), guidance.double(), 1.5, 0.1, 2)
    assert_close(jbu.bilateral_stage(source, guidance, 1.5, 0.1, 2, **CPU), expected, 2e-6)
    expanded = torch.randn(1, 1, 5, 5).expand(2, 16, 5, 5)
    gradient = torch.ones(1).expand(2, 16, 10, 10)
    kernel = random_kernel(2, 5, 5, 1)
    of_source, _ = jbu_cpu.adaptive_conv_upsample2x_backward(gradient, expanded, kernel, True, False)
    wide = expanded.double().requires_grad_()
    expected = torch.autograd.grad(jbu_reference.adaptive_conv_upsample2x(wide, kernel.double()).sum(), wide)[0]
    assert_close(of_source, expected, 2e-6)


# --- Codes ---


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_codes_are_the_quantized_output(dtype):
    for C, h, w in [(3, 5, 4), (32, 6, 16), (70, 9, 11)]:
        source, guidance = torch.randn(2, C, h, w).to(dtype), torch.rand(2, 3, 2 * h, 2 * w)
        source[0, 1, 2, 2], source[1] = math.nan, 100 * source[1]
        step = 2.0 ** torch.randint(-6, -3, (C,))  # so that many values lie on halves
        quantization = Quantization(step, (torch.randn(C) / step).round() * step)
        stage = random_stage()
        for features, codes in [
            (
                jbu.bilateral_stage(source, guidance, 1.5, 1e9, **CPU),
                jbu.bilateral_codes(source, guidance, 1.5, 1e9, 3, quantization, **CPU),
            ),
            (
                jbu.learned_stage(source, guidance, stage, **CPU),
                jbu.learned_codes(source, guidance, stage, quantization, **CPU),
            ),
        ]:
            expected = quantized(features, quantization)
            assert expected.not_finite[0] > 0
            assert expected.clipped[1] > 0
            assert all(torch.equal(*pair) for pair in zip(codes, expected, strict=True))

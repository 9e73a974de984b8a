"""What is particular to the CPU implementation; what it shares with the others is in test_jbu.py."""

import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import jbu
from kernels.compilation import compiled
from kernels.jbu import JBUStage
from kernels.jbu import cpu as jbu_cpu
from kernels.jbu import operators as jbu_operators
from kernels.jbu import reference as jbu_reference
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Quantization, quantized
from kernels.simd.functions import exp2, gelu
from kernels.simd.memory import lanes, load, store
from kernels.simd.threads import _pool, in_threads
from tests.helpers.rounding import assert_close

ROOT = Path(__file__).parents[2]
# Of the largest expected value, against the reference in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CPU = {"implementation": "cpu"}
gradcheck = partial(torch.autograd.gradcheck, atol=1e-7)


def random_kernel(B, h, w, radius, dtype=torch.float32):
    """Signed, and not summing to 1, as learned kernels are."""
    return torch.randn(B, (2 * radius + 1) ** 2, 2 * h, 2 * w, dtype=dtype)


def random_stage(radius=3, key_dim=32):
    stage = JBUStage(key_dim=key_dim, radius=radius)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.1)
    return stage


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
        stage, keys = random_stage(radius, 20).to(dtype), torch.randn(2, 10, 7, 9).to(dtype)
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


def random_copy(stage):
    copy = JBUStage(key_dim=len(stage.range_proj[3].bias), radius=stage.radius)
    copy.load_state_dict(stage.state_dict())
    return copy


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
        stage, guidance = random_stage(radius, key_dim), torch.randn(2, 3, H, W)
        stage.range_temp.fill_(temperature)
        output = jbu.learned_kernel(guidance, stage, **CPU)
        expected = jbu_reference.learned_kernel(guidance.double(), StageParameters.of(stage.double()))
        assert_close(output, expected, 2e-5)


@torch.no_grad()
def test_a_narrow_gaussian_meets_the_clamp_of_its_sum():
    stage, guidance = random_stage(1, 8), 3 * torch.randn(1, 3, 9, 8)
    stage.range_temp.fill_(1.0)
    stage.sigma_spatial.fill_(0.05)  # only the pixel itself counts, whose softmax weight can be anything
    output = jbu.learned_kernel(guidance, stage, **CPU)
    expected = jbu_reference.learned_kernel(guidance.double(), StageParameters.of(stage.double()))
    assert_close(output, expected, 2e-5)


@compiled
def exp2_and_gelu(x, output):
    for k in range(0, x.size, lanes(x)):
        store(output, (0, k), exp2(load(x, (k,))))
        store(output, (1, k), gelu(load(x, (k,))))


def test_functions_of_float32():
    x = np.linspace(-130, 127, 64_000, dtype=np.float32)
    x[:16] = math.nan
    output = np.empty((2, x.size), np.float32)
    exp2_and_gelu(x, output)
    assert np.isnan(output[:, :16]).all()
    wide, (powers, gelus) = torch.from_numpy(x[16:]).double(), torch.from_numpy(output[:, 16:]).double()
    expected = torch.exp2(wide) * (wide >= -64)
    two_roundings = 2 * 2.0**-23  # one where the processor multiplies and adds in one operation
    assert ((powers - expected).abs() <= two_roundings * expected).all()
    assert ((gelus - F.gelu(wide)).abs() <= 2.4e-7 * wide.abs().clamp_min(1)).all()


# --- Backward ---


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
    stage = random_stage(1, 4).double()
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


# --- What results must not depend on ---


@torch.no_grad()
def everything(source, guidance, stage, gradient):
    """Results of all that is compiled."""
    quantization = Quantization(torch.full((source.shape[1],), 0.01), torch.zeros(source.shape[1]))
    kernel = jbu.learned_kernel(guidance, stage, **CPU)
    return [
        kernel,
        jbu.adaptive_conv_upsample2x(source, kernel, **CPU),
        *jbu_cpu.adaptive_conv_upsample2x_backward(gradient, source, kernel, True, True),
        jbu_cpu.range_products(source, 3),
        jbu_cpu.range_products_backward(kernel[:, :, ::2, ::2], source, 3),
        jbu.bilateral_stage(source, guidance, 1.5, 0.1, **CPU),
        *jbu.bilateral_codes(source, guidance, 1.5, 0.1, 3, quantization, **CPU),
        *jbu.learned_codes(source, guidance, stage, quantization, **CPU),
    ]


def random_case(B=2, C=17, h=21, w=35):  # enough for several threads
    return torch.randn(B, C, h, w), torch.rand(B, 3, 2 * h, 2 * w), random_stage(), torch.randn(B, C, 2 * h, 2 * w)


def test_results_do_not_depend_on_threads(threads):
    case, results = random_case(), []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything(*case))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_images_of_a_batch_do_not_depend_on_each_other():
    source, guidance, stage, gradient = random_case(3)
    source[1, 4, 5, 6] = math.inf
    whole = [result.nan_to_num() for result in everything(source, guidance, stage, gradient)]
    for image in range(3):
        only = slice(image, image + 1)
        alone = everything(source[only], guidance[only], stage, gradient[only])
        assert all(torch.equal(one.nan_to_num(), every[only]) for one, every in zip(alone, whole, strict=True))


def test_two_threads_at_once(threads):
    threads(2)
    cases = [random_case() for _ in range(6)]
    alone = [everything(*case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for together, expected in zip(pool.map(lambda case: everything(*case), cases), alone, strict=True):
            assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_works_after_a_fork(threads):
    threads(2)
    source, guidance = random_case()[:2]
    expected = jbu_cpu.bilateral_stage(source, guidance, 1.5, 0.1, 3).numpy()
    process = os.fork()
    if process == 0:  # has no thread but this one: its parent's pool is of no use to it, nor are torch's threads
        signal.alarm(60)
        output = jbu_cpu.bilateral_stage(source, guidance, 1.5, 0.1, 3).numpy()
        os._exit(0 if np.array_equal(output, expected) else 1)
    assert os.waitpid(process, 0)[1] == 0


BROKEN = """
import torch
from kernels.jbu import bilateral_stage, explain
from kernels.dispatch import kind
source, guidance = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
bilateral_stage(source, guidance, 1.0, 0.1)
print(explain(kind(source)))
"""


def in_another_python(root, **environment):
    command = [sys.executable, "-c", BROKEN]
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_without_compilation_the_reference_runs():
    done = in_another_python(ROOT, NUMBA_DISABLE_JIT="1")
    assert "reference (not cpu: it cannot be imported: ImportError: NUMBA_DISABLE_JIT is set" in done.stdout


def test_one_pool_serves_all_numbers_of_threads(threads):
    _pool.cache_clear()
    for count in (2, 5, 3, 2):
        threads(count)
        in_threads(range(100), lambda: lambda job: None, count)
    assert _pool.cache_info().misses == 1


def test_weights_that_count_for_nothing_do_so_in_every_column():
    kernel, source = torch.full((1, 9, 16, 18), 1e-31), torch.full((1, 2, 8, 9), 1e31)
    assert (jbu.adaptive_conv_upsample2x(source, kernel, **CPU) == 0).all()


def test_an_error_in_one_thread_is_raised(threads):
    threads(2)

    def do(job):
        if job == 3:
            raise IndexError(job)

    with pytest.raises(IndexError, match="3"):
        in_threads(range(100), lambda: do, 2)


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

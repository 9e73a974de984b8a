"""Every implementation of joint bilateral upsampling, forward: against FeatUp's results and the reference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.jbu import (
    JBUStage,
    adaptive_conv_upsample2x,
    bilateral_codes,
    bilateral_kernel,
    bilateral_stage,
    learned_codes,
    learned_kernel,
    learned_stage,
)
from kernels.jbu import reference as jbu_reference
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Quantization, quantized
from tests.helpers.jbu import ALL, COMPILED, TRITON, device_of, random_copy, random_kernel, random_stage
from tests.helpers.rounding import assert_close

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "featup_jbu_stack.npz"


# --- Against FeatUp's own results ---


# Triton's interpreter takes a minute for it; other tests compare that with the others, on small maps.
@pytest.mark.parametrize("implementation", [pytest.param(TRITON, marks=pytest.mark.slow), "cpu", "reference"])
@torch.no_grad()
def test_every_stage_agrees_with_featup(implementation):
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    device = device_of(implementation)
    golden = {name: torch.from_numpy(np.asarray(array)).to(device) for name, array in np.load(GOLDEN).items()}
    source = golden["source"]
    for number in range(1, 5):
        prefix = f"state/up{number}."
        stage = JBUStage().to(device)
        stage.load_state_dict({n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)})
        guidance = F.adaptive_avg_pool2d(golden["guidance"], (2 * source.shape[2], 2 * source.shape[3]))
        kernel = learned_kernel(guidance, stage, implementation=implementation)
        parts = adaptive_conv_upsample2x(source, kernel, implementation=implementation)
        whole = learned_stage(source, guidance, stage, implementation=implementation)
        for output in (parts, whole):
            assert_close(output, golden[f"stage{number}"], 1e-4)
        source = golden[f"stage{number}"]  # not our own: each stage is judged alone


# --- What every implementation owes, against the reference in float64 ---

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("C", "h", "w", "radius"), [(1, 2, 2, 3), (3, 5, 4, 1), (17, 3, 9, 2), (64, 7, 6, 3)])
@pytest.mark.parametrize("implementation", COMPILED)
def test_adaptive_conv(implementation, C, h, w, radius, dtype):
    device = device_of(implementation)
    kernel = random_kernel(2, h, w, radius).to(device, dtype)
    source = torch.randn(2, C, h, w).to(device, dtype)
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        output = adaptive_conv_upsample2x(
            source.contiguous(memory_format=layout), kernel, implementation=implementation
        )
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_close(output, expected, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    radius=st.integers(1, 6),
    C=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("implementation", COMPILED)
def test_adaptive_conv_wherever_reflection_allows(implementation, h, w, radius, C, seed):
    torch.manual_seed(seed)
    device = device_of(implementation)
    source, kernel = torch.randn(1, C, h, w, device=device), random_kernel(1, h, w, radius).to(device)
    if 2 * min(h, w) <= radius:
        with pytest.raises(ValueError, match="border is reflected"):
            adaptive_conv_upsample2x(source, kernel)
        return
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double())
    size = source.abs().max() * kernel.abs().sum(1, keepdim=True)
    assert_close(adaptive_conv_upsample2x(source, kernel, implementation=implementation), expected, 2e-6, size)


@pytest.mark.parametrize("sigma_range", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("G", "radius"), [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize("implementation", COMPILED)
def test_bilateral_kernel(implementation, G, radius, sigma_range):
    guidance = torch.rand(2, G, 7, 18, device=device_of(implementation))
    expected = jbu_reference.bilateral_kernel(guidance.double(), 1.5, sigma_range, radius)
    assert_close(bilateral_kernel(guidance, 1.5, sigma_range, radius, implementation=implementation), expected, 1e-5)


@pytest.mark.parametrize("temperature", [-20.0, 0.3, 1.5])  # the first is below the clamp
@pytest.mark.parametrize(("radius", "key_dim"), [(1, 5), (2, 32), (3, 32)])
@pytest.mark.parametrize("implementation", COMPILED)
@torch.no_grad()
def test_learned_kernel(implementation, radius, key_dim, temperature):
    device = device_of(implementation)
    stage = random_stage(key_dim, radius).to(device)
    stage.range_temp.fill_(temperature)
    guidance = torch.randn(2, 3, 9, 13, device=device)
    output = learned_kernel(guidance, stage, implementation=implementation)
    in_float32 = learned_kernel(guidance, stage, implementation="reference")
    expected = jbu_reference.learned_kernel(guidance.double(), StageParameters.of(stage.double()))
    # Exponents in the hundreds cost any float32 its digits: as exact as the reference in float32, within a factor.
    own_error = ((in_float32 - expected).abs().max() / expected.abs().max()).item()
    assert_close(output, expected, max(1e-5, 5 * own_error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("implementation", ALL)
@torch.no_grad()
def test_a_stage_is_its_parts(implementation, dtype):
    device = device_of(implementation)
    source, guidance = torch.randn(2, 19, 5, 7).to(device, dtype), torch.rand(2, 3, 10, 14, device=device)
    stage = random_stage().to(device)
    wide, wide_guidance = source.double(), guidance.double()
    expected = jbu_reference.bilateral_stage(wide, wide_guidance, 1.5, 0.1, 3)
    assert_close(bilateral_stage(source, guidance, 1.5, 0.1, implementation=implementation), expected, TOLERANCE[dtype])
    expected = jbu_reference.learned_stage(wide, wide_guidance, StageParameters.of(random_copy(stage).double()))
    output = learned_stage(source, guidance, stage, implementation=implementation)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ALL)
@torch.no_grad()
def test_codes_are_the_quantized_stage(implementation):
    device = device_of(implementation)
    source, guidance = torch.randn(3, 19, 5, 7, device=device), torch.rand(3, 3, 10, 14, device=device)
    source[1, 4, 2, 3], source[2] = math.nan, 200 * source[2]
    stage = random_stage().to(device)
    quantization = Quantization((torch.rand(19) + 0.5).to(device) / 20, torch.randn(19).to(device))
    chosen = {"implementation": implementation}
    for features, codes in [
        (
            bilateral_stage(source, guidance, 1.5, 0.1, 3, **chosen),
            bilateral_codes(source, guidance, 1.5, 0.1, 3, quantization, **chosen),
        ),
        (
            learned_stage(source, guidance, stage, **chosen),
            learned_codes(source, guidance, stage, quantization, **chosen),
        ),
    ]:
        expected = quantized(features, quantization)
        assert codes.codes.is_contiguous()
        assert codes.codes.dtype == torch.int8
        assert expected.not_finite[1] > 0
        assert expected.clipped[2] > 0
        for actual, wanted in zip(codes, expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("implementation", COMPILED)
def test_strided_views_are_taken(implementation):
    source = torch.randn(1, 20, 10, 3, device=device_of(implementation)).permute(0, 3, 2, 1)[:, :, ::2, ::4]
    kernel = random_kernel(1, 5, 20, 3).to(source.device)[..., ::4]
    expected = jbu_reference.adaptive_conv_upsample2x(source, kernel)
    assert_close(adaptive_conv_upsample2x(source, kernel, implementation=implementation), expected, 1e-5)


@pytest.mark.parametrize("implementation", COMPILED)
def test_nan_features_stay_nan_and_in_their_image(implementation):
    source = torch.randn(2, 8, 6, 6, device=device_of(implementation))
    source[0, 2, 3, 3] = math.nan
    guidance = torch.rand(2, 3, 12, 12, device=source.device)
    output = bilateral_stage(source, guidance, 1.5, 0.1, implementation=implementation)
    assert output[0, 2, 6, 6].isnan()
    assert output[0, [0, 1, 3]].isfinite().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("implementation", COMPILED)
def test_images_of_a_batch_do_not_depend_on_each_other(implementation):
    device = device_of(implementation)
    source, guidance = torch.randn(3, 5, 6, 7, device=device), torch.rand(3, 3, 12, 14, device=device)
    whole = bilateral_stage(source, guidance, 1.5, 0.1, implementation=implementation)
    for row in range(3):
        alone = bilateral_stage(source[row : row + 1], guidance[row : row + 1], 1.5, 0.1, implementation=implementation)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("implementation", ALL)
def test_constants_stay_constant(implementation):
    device = device_of(implementation)
    kernel = bilateral_kernel(torch.rand(1, 3, 10, 14, device=device), 1.5, 0.1, implementation=implementation)
    assert (kernel >= 0).all()
    constant = torch.full((1, 2, 5, 7), 3.5, device=device)
    output = adaptive_conv_upsample2x(constant, kernel, implementation=implementation)
    torch.testing.assert_close(output, torch.full_like(output, 3.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    kernel = bilateral_kernel(torch.rand(1, 3, 8, 8).to(dtype), 1.5, 0.1)
    output = adaptive_conv_upsample2x(torch.ones(1, 2, 4, 4, dtype=dtype), kernel)
    assert kernel.dtype == output.dtype == dtype
    assert_close(output.double(), torch.ones(1, 2, 8, 8).double(), 3e-2)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # Triton's interpreter: to −∞, as is meant
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("sigma_spatial", [1e-30, 0.7, 1e30])
@pytest.mark.parametrize("sigma_range", [1e-30, 0.2, 1e30])
def test_any_sigma(implementation, sigma_spatial, sigma_range):
    guidance = torch.rand(1, 3, 9, 10, dtype=torch.float64)
    guidance[0, :, 3, 3:6] = guidance[0, :, 3, 3:4]
    offsets = torch.arange(-2, 3).square().double()
    logits = -(offsets[:, None] + offsets).flatten()[:, None, None] / 2 / sigma_spatial**2
    taps = F.unfold(F.pad(guidance, [2] * 4, mode="reflect"), 5).view(1, 3, 25, 9, 10)
    logits = logits - (taps - guidance[:, :, None]).square().sum(1) / 2 / sigma_range**2
    guidance = guidance.float().to(device_of(implementation))
    kernel = bilateral_kernel(guidance, sigma_spatial, sigma_range, 2, implementation=implementation)
    # Where the logits are as large as 1e58, a difference that float32 does not see decides.
    assert_close(kernel, logits.softmax(1), 1e-5)

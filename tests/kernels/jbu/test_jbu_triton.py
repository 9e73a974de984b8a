"""What is particular to the Triton kernels: tiles, matrix units, half precision. The common contract: test_jbu.py."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.rounding import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels.dispatch import Kind
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
from kernels.jbu import triton as jbu_triton
from kernels.jbu.parameters import StageParameters
from kernels.jbu.triton.geometry import Geometry, axis_tables
from kernels.jbu.triton.taps import gelu
from kernels.quantization import Quantization, quantized

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1 (tests/conftest.py sets it)", allow_module_level=True)
if CUDA:
    pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "featup_jbu_stack.npz"
TRITON = {"implementation": "triton"}
# Three roundings on the way to the output, each half a unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def random_stage(key_dim=32, radius=3, guidance_dim=3):
    stage = JBUStage(guidance_dim, key_dim, radius)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.1)
    return stage.to(DEVICE)


def wide(stage):
    """A stage's parameters in float64."""
    return StageParameters(*(tensor.detach().double() for tensor in StageParameters.of(stage)))


# --- Tiles ---


@pytest.mark.parametrize(
    ("radius", "h", "w", "C"),
    [
        (1, 13, 41, 1),  # as many tiles as share a table of the middle, both ways; partial ones at the end
        (2, 12, 9, 130),  # more channels than a block
        (3, 14, 40, 3),
        (3, 3, 17, 64),
        (4, 11, 6, 5),
        (7, 4, 13, 2),  # all but the middle column reflects
    ],
)
def test_tiles_are_seamless(radius, h, w, C):
    source, kernel = randn(1, C, h, w), randn(1, (2 * radius + 1) ** 2, 2 * h, 2 * w)
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double())
    assert_close(adaptive_conv_upsample2x(source, kernel, **TRITON), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("radius", range(1, 8))
def test_tables_of_any_size_hold_every_weight(radius):
    """Bicubic weights sum to 1, so with every tap a kernel of ones must get n from each axis, wherever the pixel."""
    geometry = Geometry(radius)
    parts = 16 // geometry.axis
    for h, w in [(math.ceil((radius + 1) / 2), 30), (9, 64), (31, 33)]:
        tables = axis_tables(geometry, h, w, torch.float64, torch.device("cpu"))
        for table, size, tile in zip(tables, (h, w), geometry.tile, strict=True):
            sums = table.sum((2, 3)).flatten() / parts  # [kinds * tile]
            left_out = -(-2 * size // tile) * tile - 2 * size
            inside = sums[: sums.numel() - left_out]
            torch.testing.assert_close(inside, torch.full_like(inside, geometry.width))
            assert (sums[sums.numel() - left_out :] == 0).all()


@pytest.mark.parametrize("radius", [1, 3, 7])
def test_kernels_made_and_applied(radius):
    source, guidance, stage = randn(1, 20, 5, 9), torch.rand(1, 3, 10, 18).to(DEVICE), random_stage(radius=radius)
    expected = jbu_reference.bilateral_kernel(guidance.double(), 1.5, 0.1, radius)
    assert_close(bilateral_kernel(guidance, 1.5, 0.1, radius, **TRITON), expected, 1e-5)
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), expected)
    assert_close(bilateral_stage(source, guidance, 1.5, 0.1, radius, **TRITON), expected, 1e-5)
    with torch.no_grad():
        expected = jbu_reference.learned_kernel(guidance.double(), wide(stage))
        assert_close(learned_kernel(guidance, stage, **TRITON), expected, 1e-5)
        expected = jbu_reference.adaptive_conv_upsample2x(source.double(), expected)
        assert_close(learned_stage(source, guidance, stage, **TRITON), expected, 1e-5)


@pytest.mark.parametrize(("guidance_dim", "key_dim"), [(1, 3), (5, 40), (17, 16)])
@torch.no_grad()
def test_any_number_of_channels(guidance_dim, key_dim):
    guidance, stage = randn(1, guidance_dim, 9, 17), random_stage(key_dim, 2, guidance_dim)
    expected = jbu_reference.learned_kernel(guidance.double(), wide(stage))
    assert_close(learned_kernel(guidance, stage, **TRITON), expected, 1e-5)
    expected = jbu_reference.bilateral_kernel(guidance.double(), 1.5, 3.0, 2)
    assert_close(bilateral_kernel(guidance, 1.5, 3.0, 2, **TRITON), expected, 1e-5)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3, 10.0])
@torch.no_grad()
def test_spatial_gaussians_that_leave_hardly_anything(sigma):
    """Where a pixel's own weight is small, those of its neighbours vanish: FeatUp's sum is clamped to 1e-7 or more."""
    stage, guidance = random_stage(), 3 * randn(1, 3, 8, 9)
    stage.sigma_spatial.fill_(sigma)
    stage.range_proj[0].weight.mul_(20)  # a pixel's own key is often not the nearest
    in_float32 = learned_kernel(guidance, stage, implementation="reference")
    expected = jbu_reference.learned_kernel(guidance.double(), wide(stage))
    # Exponents in the hundreds cost any float32 its digits.
    own_error = ((in_float32 - expected).abs().max() / expected.abs().max()).item()
    assert_close(learned_kernel(guidance, stage, **TRITON), expected, max(1e-5, 5 * own_error))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "every other", "expanded"])
@torch.no_grad()
def test_any_layout(layout):
    lay = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
        "expanded": lambda t: t[:, :1].expand(t.shape),
    }[layout]
    source, guidance, stage = lay(randn(2, 6, 5, 4)), lay(randn(2, 3, 10, 8)), random_stage(radius=1)
    kernel = lay(randn(2, 9, 10, 8))
    plain = adaptive_conv_upsample2x(source.contiguous(), kernel.contiguous(), **TRITON)
    assert torch.equal(adaptive_conv_upsample2x(source, kernel, **TRITON), plain)
    plain = learned_stage(source.contiguous(), guidance.contiguous(), stage, **TRITON)
    assert torch.equal(learned_stage(source, guidance, stage, **TRITON), plain)
    assert plain.is_contiguous(memory_format=torch.channels_last)


# --- Half precision ---


@torch.no_grad()
def test_half_agrees_with_featup():
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    golden = {name: torch.from_numpy(np.asarray(array)).to(DEVICE) for name, array in np.load(GOLDEN).items()}
    source = golden["source"]
    for number in range(1, 4):
        prefix = f"state/up{number}."
        stage = JBUStage().to(DEVICE)
        stage.load_state_dict({n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)})
        guidance = F.adaptive_avg_pool2d(golden["guidance"], (2 * source.shape[2], 2 * source.shape[3]))
        output = learned_stage(source.half(), guidance.half(), stage.half(), **TRITON)
        assert_close(output, golden[f"stage{number}"], TOLERANCE[torch.float16])
        source = golden[f"stage{number}"]


@pytest.mark.parametrize("guidance_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_stages(dtype, guidance_dtype):
    guidance_dtype = guidance_dtype or dtype
    source, guidance = randn(1, 19, 5, 7, dtype=dtype), torch.rand(1, 3, 10, 14).to(DEVICE, guidance_dtype)
    stage = random_stage().to(guidance_dtype)
    expected = jbu_reference.learned_stage(source.double(), guidance.double(), wide(stage))
    # Keys are rounded before their products are exponents: so much for bfloat16.
    tolerance = TOLERANCE[dtype] * (8 if guidance_dtype == torch.bfloat16 else 1)
    assert_close(learned_stage(source, guidance, stage, **TRITON), expected, tolerance)
    expected = jbu_reference.bilateral_stage(source.double(), guidance.double(), 1.5, 0.1, 3)
    assert_close(bilateral_stage(source, guidance, 1.5, 0.1, **TRITON), expected, TOLERANCE[dtype])


@triton.jit
def run_gelu(x, y, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y + place, gelu(tl.load(x + place), False))


def test_gelu_of_half_is_gelu():
    x = torch.linspace(-30, 30, 4096, device=DEVICE)
    y = torch.empty_like(x)
    run_gelu[(1,)](x, y, x.numel(), enable_fp_fusion=True)
    torch.testing.assert_close(y, F.gelu(x), rtol=0, atol=1e-4)


# --- Codes ---


@torch.no_grad()
def test_codes_of_half_are_within_one():
    source, guidance, stage = (
        randn(2, 19, 5, 9).half(),
        torch.rand(2, 3, 10, 18).to(DEVICE).half(),
        random_stage().half(),
    )
    quantization = Quantization(torch.rand(19).to(DEVICE) / 20 + 0.01, randn(19) / 3)
    for features, codes in [
        (
            learned_stage(source, guidance, stage, **TRITON),
            learned_codes(source, guidance, stage, quantization, **TRITON),
        ),
        (
            bilateral_stage(source, guidance, 1.5, 0.1, **TRITON),
            bilateral_codes(source, guidance, 1.5, 0.1, 3, quantization, **TRITON),
        ),
    ]:
        expected = quantized(features, quantization)
        assert (codes.codes.int() - expected.codes.int()).abs().max() <= 1
        assert (codes.clipped - expected.clipped).abs().max() <= 3
        assert expected.clipped.min() > 10
        assert not codes.not_finite.any()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
def test_features_that_are_not_finite_are_counted_and_stay_in_their_image():
    source = randn(3, 4, 9, 17)
    source[1, 2, 4, 8], source[2, 0, 0, 0] = math.inf, math.nan
    kernel = randn(3, 49, 18, 34)
    output = adaptive_conv_upsample2x(source, kernel, **TRITON)
    expected = jbu_reference.adaptive_conv_upsample2x(source, kernel)
    assert (output.isfinite() <= expected.isfinite()).all()  # a tile may spread it, but not lose it
    assert output[0].isfinite().all()
    assert output[1, [0, 1, 3]].isfinite().all()
    assert output[2, 1:].isfinite().all()
    assert output[2, :, 12:].isfinite().all()
    quantization, guidance = Quantization(torch.ones(4, device=DEVICE), randn(4)), torch.rand(3, 3, 18, 34).to(DEVICE)
    features = bilateral_stage(source, guidance, 1.5, 0.1, **TRITON)
    codes = bilateral_codes(source, guidance, 1.5, 0.1, 3, quantization, **TRITON)
    for actual, wanted in zip(codes, quantized(features, quantization), strict=True):
        assert torch.equal(actual, wanted)
    assert (codes.not_finite > 0).tolist() == [False, True, True]


# --- Gradients ---


@pytest.mark.parametrize(
    ("radius", "h", "w", "C"),
    [(1, 9, 11, 3), (2, 3, 20, 70), (3, 13, 19, 2), (5, 6, 7, 2)],  # low-res blocks of 8 × 16 pixels, and the rest
)
def test_gradients_of_adaptive_conv(radius, h, w, C):
    source, kernel = randn(1, C, h, w).requires_grad_(), randn(1, (2 * radius + 1) ** 2, 2 * h, 2 * w).requires_grad_()
    weight = randn(1, C, 2 * h, 2 * w)
    actual = torch.autograd.grad((weight * adaptive_conv_upsample2x(source, kernel, **TRITON)).sum(), (source, kernel))
    doubles = [tensor.detach().double().requires_grad_() for tensor in (source, kernel)]
    expected = torch.autograd.grad((weight * jbu_reference.adaptive_conv_upsample2x(*doubles)).sum(), doubles)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.is_contiguous()
        assert_close(mine, theirs, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("radius", "key_dim", "H", "W"), [(1, 3, 4, 20), (3, 32, 9, 13), (5, 20, 6, 6)])
def test_gradients_of_range_products(radius, key_dim, H, W):
    keys, gradient = randn(2, key_dim, H, W), randn(2, (2 * radius + 1) ** 2, H, W)
    assert_close(jbu_triton.range_products(keys, radius), jbu_reference.range_products(keys.double(), radius), 2e-6)
    doubles = keys.double().requires_grad_()
    expected = torch.autograd.grad((gradient * jbu_reference.range_products(doubles, radius)).sum(), doubles)[0]
    actual = jbu_triton.range_products_backward(gradient, keys, radius)
    assert actual.is_contiguous()
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half(dtype):
    source, kernel, weight = (randn(*shape, dtype=dtype) for shape in ((1, 9, 5, 6), (1, 49, 10, 12), (1, 9, 10, 12)))
    actual = jbu_triton.adaptive_conv_upsample2x_backward(weight, source, kernel, True, True)
    doubles = [tensor.double().requires_grad_() for tensor in (source, kernel)]
    expected = torch.autograd.grad((weight * jbu_reference.adaptive_conv_upsample2x(*doubles)).sum(), doubles)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
def test_products_beyond_the_radius_may_overflow():
    keys = torch.zeros(1, 16, 4, 12, device=DEVICE, dtype=torch.float16)
    keys[:, 0, :, 0], keys[:, 0, :, 6] = 30000, 10  # their product is no float16
    expected = jbu_reference.range_products(keys, 2)
    assert torch.equal(jbu_triton.range_products(keys, 2)[..., 1:], expected[..., 1:])


# --- What can be relied on ---


@torch.no_grad()
def test_same_bits_every_time_and_in_any_batch():
    source, guidance, stage = (
        randn(3, 17, 5, 9).half(),
        torch.rand(3, 3, 10, 18).to(DEVICE).half(),
        random_stage().half(),
    )
    whole = learned_stage(source, guidance, stage, **TRITON)
    assert torch.equal(learned_stage(source, guidance, stage, **TRITON), whole)
    for row in range(3):
        alone = learned_stage(source[row : row + 1], guidance[row : row + 1], stage, **TRITON)
        assert torch.equal(alone[0], whole[row])
    kernel, weight = randn(2, 49, 10, 18).half(), randn(2, 17, 10, 18).half()
    first, second = (
        jbu_triton.adaptive_conv_upsample2x_backward(weight, source[:2], kernel, True, True) for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_every_reason_is_given():
    here = Kind(DEVICE, torch.float16)
    assert jbu_triton.reasons_not([here, Kind(DEVICE, torch.float32)]) == []
    meta = Kind(torch.device("meta"), torch.float64)
    reasons = jbu_triton.reasons_not([here, meta, Kind(torch.device("meta"), torch.int8)])
    assert len(reasons) == 2
    assert "inputs are torch.float64, torch.int8" in reasons[0]
    assert "inputs are on meta" in reasons[1]


def test_too_large_a_radius():
    with pytest.raises(ValueError, match="radius up to 7, not 8"):
        bilateral_kernel(torch.rand(1, 3, 10, 10, device=DEVICE), 1.0, 0.1, 8, **TRITON)
    with pytest.raises(ValueError, match=r"radius: got 8, implementation 'triton' goes up to 7\. Use"):
        jbu_triton.range_products(randn(1, 4, 10, 10), 8)


def test_too_large_a_batch():
    with pytest.raises(ValueError, match=r"got 65536 images of 8 × 8, need at most 65535 .* Split the batch"):
        Geometry(3).grid(65536, 8, 8)

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dispatch as jbu_dispatch
from kernels.dispatch import Kind, kind
from kernels.jbu import (
    JBUStack,
    JBUStage,
    adaptive_conv_upsample2x,
    bilateral_codes,
    bilateral_kernel,
    bilateral_stage,
    explain,
    learned_codes,
    learned_kernel,
    learned_stage,
)
from kernels.jbu import operators as jbu_operators
from kernels.jbu import reference as jbu_reference
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Quantization, quantized
from tests.helpers.rounding import assert_close, term_sizes

GOLDEN = Path(__file__).parents[3] / "shared" / "reference" / "featup_jbu_stack.npz"
CUDA = torch.cuda.is_available()
# Without a GPU, Triton's kernels run in its interpreter (tests/conftest.py).
TRITON = pytest.param("triton", marks=pytest.mark.gpu if CUDA else ())
COMPILED = ["cpu", TRITON]
ALL = [*COMPILED, "reference"]


def device_of(implementation):
    return "cuda" if implementation == "triton" and CUDA else "cpu"


def random_kernel(B, h, w, radius, dtype=torch.float32):
    """Signed, and not summing to 1, as learned kernels are."""
    return torch.randn(B, (2 * radius + 1) ** 2, 2 * h, 2 * w, dtype=dtype)


def random_stage(key_dim=32, radius=3):
    """Parameters as large as trained ones: every part has a say in the kernel."""
    stage = JBUStage(key_dim=key_dim, radius=radius)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.1)
    return stage


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- Against FeatUp's own results ---


@pytest.mark.parametrize("implementation", ALL)
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


# --- The reference, against what the words say ---


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


def random_copy(stage):
    copy = JBUStage(radius=stage.radius).to(stage.range_temp.device)
    copy.load_state_dict(stage.state_dict())
    return copy


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


@pytest.mark.parametrize(("C", "h", "w", "radius"), [(2, 3, 4, 1), (21, 6, 5, 3)])
@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_of_adaptive_conv(implementation, C, h, w, radius):
    device = device_of(implementation)
    source = torch.randn(2, C, h, w, device=device, requires_grad=True)
    kernel = random_kernel(2, h, w, radius).to(device).requires_grad_()
    weight = torch.randn(2, C, 2 * h, 2 * w, device=device)
    gradients = torch.autograd.grad(
        (weight * adaptive_conv_upsample2x(source, kernel, implementation=implementation)).sum(), (source, kernel)
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (source, kernel)]
    expected = torch.autograd.grad((weight * jbu_reference.adaptive_conv_upsample2x(*wide)).sum(), wide)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("needed", ["source", "kernel"])
@pytest.mark.parametrize("implementation", COMPILED)
def test_only_the_gradient_that_is_needed(implementation, needed):
    device = device_of(implementation)
    tensors = {"source": torch.randn(1, 2, 4, 5), "kernel": random_kernel(1, 4, 5, 2)}
    tensors = {name: tensor.to(device).requires_grad_(name == needed) for name, tensor in tensors.items()}
    output = adaptive_conv_upsample2x(**tensors, implementation=implementation)
    output.sum().backward()
    expected = torch.autograd.grad(jbu_reference.adaptive_conv_upsample2x(**tensors).sum(), tensors[needed])[0]
    assert_close(tensors.pop(needed).grad, expected, 1e-5)
    assert next(iter(tensors.values())).grad is None


@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_of_a_learned_stage(implementation):
    device = device_of(implementation)
    stage, source = random_stage().to(device), torch.randn(2, 5, 6, 4, device=device)
    guidance = torch.randn(2, 3, 12, 8, device=device, requires_grad=True)
    weight = torch.randn(2, 5, 12, 8, device=device)
    output = learned_stage(source, guidance, stage, implementation=implementation)
    gradients = torch.autograd.grad((weight * output).sum(), (guidance, *stage.parameters()))

    def reference(weight, source, *wanted):
        guidance, wide = wanted[0].detach().requires_grad_(), random_copy(stage).double()
        for parameter, value in zip(wide.parameters(), wanted[1:], strict=True):
            parameter.data = value.data
        output = jbu_reference.learned_stage(source, guidance, StageParameters.of(wide))
        return torch.autograd.grad((weight * output).sum(), (guidance, *wide.parameters()))

    inputs = [tensor.double() for tensor in (weight, source, guidance, *stage.parameters())]
    for actual, wanted, size in zip(gradients, reference(*inputs), term_sizes(reference, *inputs), strict=True):
        assert_close(actual, wanted, 1e-5, size)


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


# --- As operators of torch ---

torch_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck reads it itself


@torch_warns
@pytest.mark.parametrize("implementation", COMPILED)
def test_operators_are_what_torch_expects(implementation):
    device = device_of(implementation)
    source, guidance = torch.randn(1, 3, 4, 5, device=device), torch.rand(1, 3, 8, 10, device=device)
    kernel, keys = random_kernel(1, 4, 5, 1).to(device), torch.randn(1, 4, 8, 10, device=device)
    stage = [tensor.detach() for tensor in StageParameters.of(random_stage(4, 1).to(device))]
    gradient, scale = torch.randn(1, 3, 8, 10, device=device), [torch.ones(3, device=device)] * 2
    for operator, arguments in {
        "adaptive_conv_upsample2x": (source.requires_grad_(), kernel.requires_grad_()),
        "adaptive_conv_upsample2x_backward": (gradient, source.detach(), kernel.detach(), True, False),
        "range_products": (keys.requires_grad_(), 1),
        "range_products_backward": (torch.randn(1, 9, 8, 10, device=device), keys.detach(), 1),
        "bilateral_kernel": (guidance, 1.5, 0.1, 1),
        "learned_kernel": (guidance, stage),
        "bilateral_stage": (source.detach(), guidance, 1.5, 0.1, 1),
        "learned_stage": (source.detach(), guidance, stage),
        "bilateral_codes": (source.detach(), guidance, 1.5, 0.1, 1, *scale),
        "learned_codes": (source.detach(), guidance, stage, *scale),
    }.items():
        torch.library.opcheck(getattr(jbu_operators, operator), (*arguments, implementation))


@pytest.mark.parametrize("implementation", ALL)
def test_compiles_without_a_break(implementation):
    device = device_of(implementation)
    source = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    guidance, stage = torch.randn(2, 3, 8, 10, device=device), random_stage(4, 1).to(device)

    def run(source, guidance):
        return 2 * learned_stage(source, guidance, stage, implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (compiled, run):  # fills .grad twice: the second time it must double
        function(source, guidance).sum().backward()
    torch.testing.assert_close(source.grad, 2 * torch.autograd.grad(run(source, guidance).sum(), source)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(source, guidance), run(source, guidance))


# --- Dispatch and errors ---


CPU32 = Kind(torch.device("cpu"), torch.float32)


def test_float32_runs_compiled():
    choice = explain(CPU32, CPU32)
    assert choice.chosen == "cpu"
    assert choice.reasons_not["cpu"] == choice.reasons_not["reference"] == []
    assert str(choice).startswith("cpu")


def test_all_reasons_are_given():
    choice = explain(Kind(torch.device("meta"), torch.int32), CPU32)
    assert choice.chosen == "reference"
    text = "; ".join(choice.reasons_not["cpu"])
    assert len(choice.reasons_not["cpu"]) == 2
    assert all(word in text for word in ("meta", "int32"))
    assert "not cpu: " in str(choice)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_on_a_gpu_triton_runs():
    choice = explain(Kind(torch.device("cuda", 0), torch.float16))
    assert choice.chosen == "triton"
    assert "cuda" in "; ".join(choice.reasons_not["cpu"])
    assert explain(Kind(torch.device("cuda", 0), torch.float16), radius=8).chosen == "reference"


def test_forcing_an_implementation_that_cannot():
    source, kernel = torch.zeros(1, 1, 4, 4, device="meta"), torch.zeros(1, 9, 8, 8, device="meta")
    with pytest.raises(ValueError, match=r"'cpu' cannot take these inputs: .*meta"):
        adaptive_conv_upsample2x(source, kernel, implementation="cpu")


def test_an_implementation_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(jbu_dispatch.IMPLEMENTATIONS, "absent", "kernels.not_there")
    guidance = torch.rand(1, 3, 8, 8)
    assert explain(kind(guidance)).reasons_not["absent"] == [
        "it cannot be imported: ModuleNotFoundError: No module named 'kernels.not_there'"
    ]
    with pytest.raises(ValueError, match=r"cannot be imported.*not_there"):
        bilateral_kernel(guidance, 1.0, 0.1, implementation="absent")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    kernel = bilateral_kernel(torch.rand(1, 3, 8, 8).to(dtype), 1.5, 0.1)
    output = adaptive_conv_upsample2x(torch.ones(1, 2, 4, 4, dtype=dtype), kernel)
    assert kernel.dtype == output.dtype == dtype
    assert_close(output.double(), torch.ones(1, 2, 8, 8).double(), 3e-2)


SOURCE = torch.zeros(1, 2, 4, 5)


@pytest.mark.parametrize(
    ("source", "kernel", "message"),
    [
        (SOURCE[0], torch.zeros(1, 9, 8, 10), r"source: got shape \(2, 4, 5\)"),
        (SOURCE.int(), torch.zeros(1, 9, 8, 10), r"source: .*int32.* need four dimensions"),
        (SOURCE[:0], torch.zeros(0, 9, 8, 10), r"source: .*none of size 0"),
        (SOURCE, torch.zeros(1, 10, 8, 10), r"kernel: got 10 channels, need n\*n taps"),
        (SOURCE, torch.zeros(1, 16, 8, 10), r"kernel: got 16 channels"),
        (SOURCE, torch.zeros(1, 9, 8, 8), r"kernel: got shape \(1, 9, 8, 8\), need \(1, 9, 8, 10\)"),
        (SOURCE, torch.zeros(2, 9, 8, 10), r"kernel: got shape \(2, 9, 8, 10\)"),
        (SOURCE, torch.zeros(1, 9, 8, 10).double(), r"kernel: got torch.float64 on cpu, need source's torch.float32"),
        (SOURCE, torch.zeros(1, 17 * 17, 8, 10), r"source: got twice its size = 8×10, need more than the radius 8"),
    ],
)
def test_conv_errors(source, kernel, message):
    with pytest.raises(ValueError, match=message):
        adaptive_conv_upsample2x(source, kernel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_spatial": 0.0}, "sigma_spatial: got 0.0, need a number from 1e-30 to 1e[+]30"),
        ({"sigma_spatial": "1"}, "sigma_spatial: got '1', need a number"),
        ({"sigma_range": 1e31}, "sigma_range: got 1e[+]31"),
        ({"sigma_range": math.nan}, "sigma_range: got nan"),
        ({"radius": 0}, "radius: got 0, need an integer, at least 1"),
        ({"radius": 3.0}, "radius: got 3.0, need an integer"),
        ({"guidance": "photo.jpg"}, "guidance: got str, need a tensor"),
        ({"guidance": torch.zeros(1, 3, 6, 8).to(torch.float8_e5m2)}, "guidance: got .*float8.*, need .* float16"),
        ({"guidance": torch.zeros(1, 3, 6, 8).to_sparse()}, "guidance: got .*sparse.*, need .* dense"),
        ({"radius": 6}, "guidance: got its size = 6×8, need more than the radius 6"),
        ({"guidance": torch.zeros(3, 6, 8)}, r"guidance: got shape \(3, 6, 8\)"),
        ({"implementation": "gpu"}, "implementation: got 'gpu', need one of cpu, triton, reference"),
    ],
)
def test_bilateral_errors(arguments, message):
    valid = {"guidance": torch.zeros(1, 3, 6, 8), "sigma_spatial": 1.0, "sigma_range": 0.1}
    with pytest.raises(ValueError, match=message):
        bilateral_kernel(**(valid | arguments))


def test_learned_kernel_errors():
    stage = JBUStage()
    with pytest.raises(ValueError, match="guidance: got 4 channels, need the stage's 3"):
        learned_kernel(torch.zeros(1, 4, 8, 8), stage)
    with pytest.raises(ValueError, match=r"stage: got torch\.float32 on cpu, need guidance's torch\.float64"):
        learned_kernel(torch.zeros(1, 3, 8, 8).double(), stage)
    with pytest.raises(ValueError, match="guidance: got its size = 3×8"):
        learned_kernel(torch.zeros(1, 3, 3, 8), stage)
    with pytest.raises(ValueError, match="stage: got JBUStack, need a JBUStage"):
        learned_kernel(torch.zeros(1, 3, 8, 8), JBUStack(None))
    partly = JBUStage()
    partly.fixup_proj.half()
    with pytest.raises(ValueError, match=r"stage: got torch\.float16 on cpu, need guidance's torch\.float32"):
        learned_kernel(torch.zeros(1, 3, 8, 8), partly)


@pytest.mark.parametrize("argument", ["guidance_dim", "key_dim", "radius"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_stage_of_no_size(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got {value}, need an integer"):
        JBUStage(**{argument: value})


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at its first use
def test_forward_mode_derivatives_are_the_references():
    """Operators have none, and torch would take them for 0."""
    source, kernel, guidance = torch.randn(1, 3, 5, 6), random_kernel(1, 5, 6, 2), torch.rand(1, 3, 10, 12)
    output, tangent = torch.func.jvp(lambda s: adaptive_conv_upsample2x(s, kernel), (source,), (source,))
    assert_close(tangent, output, 1e-6)
    output, tangent = torch.func.jvp(lambda s: bilateral_stage(s, guidance, 1.5, 0.1), (source,), (source,))
    assert_close(tangent, output, 1e-6)
    with pytest.raises(ValueError, match="'cpu' has no forward-mode derivatives"):
        torch.func.jvp(lambda s: adaptive_conv_upsample2x(s, kernel, implementation="cpu"), (source,), (source,))


@pytest.mark.parametrize(
    ("source", "guidance", "message"),
    [
        (SOURCE, torch.zeros(1, 3, 8, 8), r"guidance: got shape \(1, 3, 8, 8\), need \[1, 3, 8, 10\]"),
        (SOURCE, torch.zeros(2, 3, 8, 10), r"guidance: got shape \(2, 3, 8, 10\), need \[1, 3, 8, 10\]"),
        (SOURCE, torch.zeros(1, 3, 8, 10).double(), r"guidance: got torch.float64 on cpu, need source's torch.float32"),
        (SOURCE.int(), torch.zeros(1, 3, 8, 10), r"source: .*int32"),
    ],
)
def test_stage_errors(source, guidance, message):
    with pytest.raises(ValueError, match=message):
        bilateral_stage(source, guidance, 1.5, 0.1)
    with pytest.raises(ValueError, match=message):
        learned_stage(source, guidance, JBUStage().to(guidance.dtype))


@pytest.mark.parametrize(
    ("step", "offset", "message"),
    [
        (torch.ones(3), torch.zeros(2), r"quantization.step: got shape \(3,\), .* need \[2\]"),
        (torch.ones(2), torch.zeros(2).double(), r"quantization.offset: got shape \(2,\), torch.float64"),
    ],
)
def test_quantization_errors(step, offset, message):
    guidance = torch.zeros(1, 3, 8, 10)
    with pytest.raises(ValueError, match=message):
        bilateral_codes(SOURCE, guidance, 1.5, 0.1, 3, Quantization(step, offset))
    with pytest.raises(ValueError, match=message):
        learned_codes(SOURCE, guidance, JBUStage(), Quantization(step, offset))
    with pytest.raises(ValueError, match="quantization: got tuple, need a Quantization"):
        learned_codes(SOURCE, guidance, JBUStage(), (step, offset))


def test_published_names():
    projections = [f"{p}.{i}.{q}" for p in ("range_proj", "fixup_proj") for i in (0, 3) for q in ("weight", "bias")]
    assert set(JBUStage().state_dict()) == {"range_temp", "sigma_spatial", *projections}

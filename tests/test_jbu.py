import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import jbu, jbu_cpu, jbu_reference
from kernels.jbu import JBUStage, adaptive_conv_upsample2x, bilateral_kernel, explain, learned_kernel

GOLDEN = Path(__file__).parents[2] / "shared" / "reference" / "featup_jbu_stack.npz"
ON_CPU = ["cpu", "reference"]


def random_kernel(B, h, w, radius, dtype=torch.float32):
    """Signed, and not summing to 1, as learned kernels are."""
    return torch.randn(B, (2 * radius + 1) ** 2, 2 * h, 2 * w, dtype=dtype)


def assert_close(actual, expected, rtol):
    """Within rtol of the largest expected value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- Against FeatUp's own results ---


@pytest.mark.parametrize("implementation", ON_CPU)
@torch.no_grad()
def test_every_stage_agrees_with_featup(implementation):
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}
    source = golden["source"]
    for number in range(1, 5):
        prefix = f"state/up{number}."
        stage = JBUStage()
        stage.load_state_dict({n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)})
        guidance = F.adaptive_avg_pool2d(golden["guidance"], (2 * source.shape[2], 2 * source.shape[3]))
        kernel = learned_kernel(guidance, stage, implementation=implementation)
        output = adaptive_conv_upsample2x(source, kernel, implementation=implementation)
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
    source = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    kernel = random_kernel(1, 2, 3, 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(adaptive_conv_upsample2x, (source, kernel))
    guidance = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: bilateral_kernel(g, 1.0, 0.5, 1), (guidance,))
    stage = JBUStage(key_dim=4, radius=1).double()
    assert torch.autograd.gradcheck(lambda g, *_: learned_kernel(g, stage), (guidance, *stage.parameters()))


# --- The CPU implementation, against the reference ---


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("radius", [1, 2, 3, 4])
@pytest.mark.parametrize("C", [1, 3, 17, 64])
def test_cpu_agrees_with_reference(C, radius, B, channels_last):
    for h, w in [(5, 4), (3, 11), (9, 9), (14, 8)]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        source = torch.randn(B, C, h, w).contiguous(memory_format=memory_format)
        kernel = random_kernel(B, h, w, radius).contiguous(memory_format=memory_format)
        expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double()).float()
        output = adaptive_conv_upsample2x(source, kernel, implementation="cpu")
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_close(output, expected, 2e-6)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    radius=st.integers(1, 6),
    C=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_cpu_agrees_wherever_reflection_allows(h, w, radius, C, seed):
    torch.manual_seed(seed)
    source, kernel = torch.randn(1, C, h, w), random_kernel(1, h, w, radius)
    if 2 * min(h, w) <= radius:
        with pytest.raises(ValueError, match="border is reflected"):
            adaptive_conv_upsample2x(source, kernel)
        return
    expected = jbu_reference.adaptive_conv_upsample2x(source.double(), kernel.double()).float()
    assert_close(adaptive_conv_upsample2x(source, kernel, implementation="cpu"), expected, 2e-6)


@pytest.mark.parametrize("sigma_range", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("radius", [1, 2, 3, 4])
@pytest.mark.parametrize("G", [1, 3])
def test_cpu_bilateral_kernel_agrees(G, radius, sigma_range):
    guidance = torch.rand(2, G, 7, 18)
    expected = jbu_reference.bilateral_kernel(guidance.double(), 1.5, sigma_range, radius).float()
    assert_close(bilateral_kernel(guidance, 1.5, sigma_range, radius, implementation="cpu"), expected, 2e-6)


@pytest.mark.parametrize("temperature", [-20.0, 0.3, 3.0])  # the first is below the clamp
@pytest.mark.parametrize(("radius", "key_dim"), [(1, 5), (2, 32), (3, 32)])
@torch.no_grad()
def test_cpu_learned_kernel_agrees(radius, key_dim, temperature):
    stage = JBUStage(key_dim=key_dim, radius=radius)
    stage.range_temp.fill_(temperature)
    guidance = torch.randn(2, 3, 9, 13)
    output = learned_kernel(guidance, stage, implementation="cpu")
    expected = jbu_reference.learned_kernel(guidance.double(), stage.double()).float()
    assert_close(output, expected, 2e-5)


def test_strided_views_are_taken():
    source = torch.randn(1, 20, 10, 3).permute(0, 3, 2, 1)[:, :, ::2, ::4]
    kernel = random_kernel(1, 5, 20, 3)[..., ::4]
    expected = jbu_reference.adaptive_conv_upsample2x(source, kernel)
    assert_close(adaptive_conv_upsample2x(source, kernel, implementation="cpu"), expected, 2e-6)


def test_nan_features_stay_nan():
    source = torch.randn(1, 8, 6, 6)
    source[0, 2, 3, 3] = math.nan
    output = adaptive_conv_upsample2x(source, bilateral_kernel(torch.rand(1, 3, 12, 12), 1.5, 0.1))
    assert output[0, 2, 6, 6].isnan()
    assert output[0, [0, 1, 3]].isfinite().all()


def test_results_do_not_depend_on_threads(threads):
    source, guidance = torch.randn(2, 17, 13, 9), torch.rand(2, 3, 26, 18)
    results = []
    for count in (1, 2, 5):
        threads(count)
        kernel = bilateral_kernel(guidance, 1.5, 0.1, implementation="cpu")
        results.append((kernel, adaptive_conv_upsample2x(source, kernel, implementation="cpu")))
    for kernel, output in results[1:]:
        assert torch.equal(kernel, results[0][0])
        assert torch.equal(output, results[0][1])


def test_rows_of_a_batch_do_not_depend_on_each_other():
    source, guidance = torch.randn(3, 5, 6, 7), torch.rand(3, 3, 12, 14)
    whole = adaptive_conv_upsample2x(source, bilateral_kernel(guidance, 1.5, 0.1))
    for row in range(3):
        alone = adaptive_conv_upsample2x(source[row : row + 1], bilateral_kernel(guidance[row : row + 1], 1.5, 0.1))
        assert torch.equal(alone[0], whole[row])


def test_two_threads_at_once():
    cases = [(torch.randn(1, 8, 20, 15), torch.rand(1, 3, 40, 30)) for _ in range(8)]

    def run(case):
        return adaptive_conv_upsample2x(case[0], bilateral_kernel(case[1], 1.5, 0.1))

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for together, expected in zip(pool.map(run, cases), alone, strict=True):
            assert torch.equal(together, expected)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_constants_stay_constant(implementation):
    kernel = bilateral_kernel(torch.rand(1, 3, 10, 14), 1.5, 0.1, implementation=implementation)
    assert (kernel >= 0).all()
    output = adaptive_conv_upsample2x(torch.full((1, 2, 5, 7), 3.5), kernel, implementation=implementation)
    torch.testing.assert_close(output, torch.full_like(output, 3.5), rtol=1e-6, atol=0)


# --- Dispatch and errors ---


def test_float32_inference_runs_compiled():
    choice = explain(torch.zeros(1, 1, 4, 4), torch.zeros(1, 9, 8, 8))
    assert choice.chosen == "cpu"
    assert choice.reasons_not == {"cpu": [], "reference": []}


def test_all_reasons_are_given():
    source = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    choice = explain(source, torch.zeros(1, 9, 8, 8, device="meta"))
    assert choice.chosen == "reference"
    text = "; ".join(choice.reasons_not["cpu"])
    assert len(choice.reasons_not["cpu"]) == 3
    assert all(word in text for word in ("meta", "float64", "gradient"))


@torch.no_grad()
def test_no_grad_lifts_the_gradient_reason():
    assert jbu_cpu.reasons_not(torch.zeros(1, requires_grad=True)) == []


def test_forcing_an_implementation_that_cannot():
    source, kernel = torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 9, 8, 8).double()
    with pytest.raises(ValueError, match=r"'cpu' cannot take these inputs: it computes in float32.*float64"):
        adaptive_conv_upsample2x(source, kernel, implementation="cpu")


def test_an_implementation_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(jbu.IMPLEMENTATIONS, "absent", "kernels.not_there")
    guidance = torch.rand(1, 3, 8, 8)
    assert explain(guidance).reasons_not["absent"] == ["it cannot be imported: No module named 'kernels.not_there'"]
    with pytest.raises(ValueError, match=r"cannot be imported.*not_there"):
        bilateral_kernel(guidance, 1.0, 0.1, implementation="absent")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_run_the_reference_and_keep_their_dtype(dtype):
    kernel = bilateral_kernel(torch.rand(1, 3, 8, 8).to(dtype), 1.5, 0.1)
    output = adaptive_conv_upsample2x(torch.ones(1, 2, 4, 4, dtype=dtype), kernel)
    assert kernel.dtype == output.dtype == dtype
    assert_close(output.double(), torch.ones(1, 2, 8, 8).double(), 3e-2)


SOURCE = torch.zeros(1, 2, 4, 5)


@pytest.mark.parametrize(
    ("source", "kernel", "message"),
    [
        (SOURCE[0], torch.zeros(1, 9, 8, 10), r"source: got shape \(2, 4, 5\)"),
        (SOURCE.int(), torch.zeros(1, 9, 8, 10), r"source: .*int32, need four dimensions"),
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
        ({"sigma_spatial": 0.0}, "sigma_spatial: got 0.0, need a finite number greater than 0"),
        ({"sigma_range": math.nan}, "sigma_range: got nan"),
        ({"radius": 0}, "radius: got 0, need at least 1"),
        ({"radius": 6}, "guidance: got its size = 6×8, need more than the radius 6"),
        ({"guidance": torch.zeros(3, 6, 8)}, r"guidance: got shape \(3, 6, 8\)"),
        ({"implementation": "gpu"}, "implementation: got 'gpu', need one of cpu, reference"),
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


def test_published_names():
    projections = [f"{p}.{i}.{q}" for p in ("range_proj", "fixup_proj") for i in (0, 3) for q in ("weight", "bias")]
    assert set(JBUStage().state_dict()) == {"range_temp", "sigma_spatial", *projections}

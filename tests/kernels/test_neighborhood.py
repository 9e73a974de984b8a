"""Neighbourhood attention across scales: the reference, and every implementation against it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Kind
from kernels.quantization import Quantization, quantized
from kernels.window.neighborhood import cpu, explain, neighborhood_attention, neighborhood_codes, operators
from kernels.window.neighborhood.reference import neighborhood_attention as literal
from kernels.window.neighborhood.reference import window_places
from tests.helpers.jbu import COMPILED, TRITON, device_of
from tests.helpers.rounding import assert_close


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # as in workers: tiles are small, threads would only wait for each other


def random_inputs(B=1, low=(4, 5), scale=(2, 3), heads=2, d=6, K=4, dtype=torch.float32, device="cpu"):
    high = (low[0] * scale[0], low[1] * scale[1])
    queries, keys = (torch.randn(B, *size, heads, d) for size in (high, low))
    tensors = 2 * queries, keys, torch.randn(B, K, *low)
    return tuple(tensor.to(device, dtype) for tensor in tensors)


def in_float64(queries, keys, values, window=9, sum_heads=False):
    return literal(queries.double(), keys.double(), values.double(), window, sum_heads)


# --- The reference, against what the words say ---


def test_reference_is_the_explicit_loop():
    queries, keys, values = random_inputs(B=2, low=(5, 4), scale=(2, 3), dtype=torch.float64)
    expected = torch.zeros(2, 4, 10, 12, dtype=torch.float64)
    for image, y, x, head in np.ndindex(2, 10, 12, 2):
        top, left = min(max(y // 2 - 1, 0), 2), min(max(x // 3 - 1, 0), 1)
        cells = [(i, j) for i in range(top, top + 3) for j in range(left, left + 3)]
        scores = torch.stack([queries[image, y, x, head] @ keys[image, i, j, head] for i, j in cells]) / math.sqrt(6)
        for weight, (i, j) in zip(torch.softmax(scores, 0), cells, strict=True):
            expected[image, 2 * head : 2 * head + 2, y, x] += weight * values[image, 2 * head : 2 * head + 2, i, j]
    torch.testing.assert_close(literal(queries, keys, values, 3, False), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([1, 3, 9]))
def test_windows_are_dilated_neighbours(low, more, window):
    high = low + more - 1
    places, dilation = window_places(low, high, window), high // low
    assert places.shape == (min(window, low), high)
    assert places.min() >= 0
    assert places.max() < high
    assert (places.diff(dim=0) == dilation).all()
    position = torch.arange(high)
    assert (places % dilation == position % dilation).all()
    assert (places == position).any(0).all()  # each sees itself


@pytest.mark.parametrize(("low", "scale"), [(12, 3), (9, 2), (30, 7), (5, 4)])
def test_windows_of_multiples_are_cells_around_the_own(low, scale):
    cells = window_places(low, low * scale, 9) // scale
    own, side = torch.arange(low * scale) // scale, min(9, low)
    assert torch.equal(cells[0], (own - 4).clamp(0, low - side))
    assert torch.equal(cells, cells[0] + torch.arange(side)[:, None])


# --- Implementations ---

SIZES = [
    ((11, 3), (3, 2)),
    ((2, 10), (1, 4)),
    ((10, 3), (1, 5)),  # fewer columns than the window has
    ((2, 5), (4, 3)),
    ((1, 1), (5, 7)),
    ((1, 12), (1, 1)),
]


@pytest.mark.parametrize("sum_heads", [False, True])
@pytest.mark.parametrize(("low", "scale"), SIZES)
@pytest.mark.parametrize("implementation", COMPILED)
def test_agrees_with_the_reference(implementation, low, scale, sum_heads):
    inputs = random_inputs(low=low, scale=scale, device=device_of(implementation))
    output = neighborhood_attention(*inputs, sum_heads=sum_heads, implementation=implementation)
    expected = in_float64(*inputs, sum_heads=sum_heads)
    assert_close(output, expected, 1e-5, size=inputs[2].abs().max() * (2 if sum_heads else 1))


@pytest.mark.parametrize("window", [1, 3, 5, 9, 21])
@pytest.mark.parametrize("implementation", COMPILED)
def test_windows_of_any_size(implementation, window):
    inputs = random_inputs(low=(7, 4), scale=(2, 2), device=device_of(implementation))
    output = neighborhood_attention(*inputs, window, implementation=implementation)
    assert_close(output, in_float64(*inputs, window), 1e-5)


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *(("cpu", dtype) for dtype in TOLERANCES),
        *(pytest.param(*TRITON.values, dtype, marks=TRITON.marks) for dtype in list(TOLERANCES)[1:]),
        ("reference", torch.float16),
        ("reference", torch.bfloat16),
    ],
)
def test_dtypes(implementation, dtype):
    inputs = random_inputs(low=(10, 2), d=16, K=6, dtype=dtype, device=device_of(implementation))
    output = neighborhood_attention(*inputs, implementation=implementation)
    assert output.dtype == dtype
    assert_close(output, in_float64(*inputs), TOLERANCES[dtype])


@pytest.mark.parametrize("implementation", [*COMPILED, "reference"])
def test_values_may_have_another_dtype(implementation):
    queries, keys, values = random_inputs(device=device_of(implementation))
    output = neighborhood_attention(queries.half(), keys.half(), values, implementation=implementation)
    assert output.dtype == torch.float32
    assert_close(output, in_float64(queries.half(), keys.half(), values), 5e-3)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "every other", "expanded"])
@pytest.mark.parametrize("implementation", COMPILED)
def test_any_layout(implementation, layout):
    lay = {
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
        "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    inputs = random_inputs(B=2, low=(2, 3), scale=(2, 2), device=device_of(implementation))
    strided = [lay(tensor) for tensor in inputs]
    assert not all(tensor.is_contiguous() for tensor in strided)
    plain = neighborhood_attention(*(t.contiguous() for t in strided), implementation=implementation)
    assert torch.equal(neighborhood_attention(*strided, implementation=implementation), plain)


@pytest.mark.parametrize("implementation", COMPILED)
def test_rows_of_a_batch_do_not_depend_on_each_other(implementation):
    inputs = random_inputs(B=3, low=(2, 3), scale=(2, 2), device=device_of(implementation))
    whole = neighborhood_attention(*inputs, sum_heads=True, implementation=implementation)
    for row in range(3):
        alone = neighborhood_attention(
            *(t[row : row + 1] for t in inputs), sum_heads=True, implementation=implementation
        )
        assert torch.equal(alone[0], whole[row])


def test_a_map_of_all_channels_can_be_applied_first():
    """PCA: each head's channels are mapped by its part of the matrix, and the heads are added."""
    queries, keys, values = random_inputs(low=(10, 5), heads=4, K=12, dtype=torch.float64)
    matrix = torch.randn(5, 12, dtype=torch.float64)
    expected = torch.einsum("kc,bcyx->bkyx", matrix, neighborhood_attention(queries, keys, values))
    parts = [torch.einsum("kc,bcij->bkij", matrix[:, c : c + 3], values[:, c : c + 3]) for c in range(0, 12, 3)]
    output = neighborhood_attention(queries, keys, torch.cat(parts, 1), sum_heads=True)
    assert output.shape == (1, 5, 20, 15)
    assert_close(output, expected, 1e-13)


@pytest.mark.parametrize("implementation", COMPILED)
def test_outputs_are_means_of_values_nearby(implementation):
    queries, keys, values = random_inputs(low=(2, 12), scale=(2, 2), device=device_of(implementation))
    flat = neighborhood_attention(queries, keys, torch.full_like(values, 3.5), implementation=implementation)
    assert_close(flat, torch.full_like(flat, 3.5), 1e-6)
    changed = values.clone()
    changed[..., 9:] = torch.nan  # the windows of the first five columns of cells are the first nine
    output = neighborhood_attention(queries, keys, changed, implementation=implementation)
    expected = neighborhood_attention(queries, keys, values, implementation=implementation)
    assert torch.equal(output[..., :10], expected[..., :10])
    assert output[..., 10:].isnan().all()


# --- Tiles of the CPU ---


@pytest.mark.parametrize("tile_bytes", [1, 2000, 20_000])
@pytest.mark.parametrize("sum_heads", [False, True])
def test_tiles_of_any_size(tile_bytes, sum_heads, monkeypatch):
    inputs = random_inputs(low=(10, 11), scale=(5, 3), dtype=torch.float64)
    whole = neighborhood_attention(*inputs, sum_heads=sum_heads)
    seen = torch.zeros(50, 33)
    monkeypatch.setattr(cpu, "_TILE_BYTES", tile_bytes)
    for rows, columns, _ in cpu._tiles(*(t[0] for t in inputs), 9, sum_heads):
        seen[rows, columns] += 1
    assert (seen == 1).all()
    assert_close(neighborhood_attention(*inputs, sum_heads=sum_heads), whole, 1e-14)


@pytest.mark.parametrize("scale", [(6, 6), (40, 60)])
def test_memory_does_not_grow_with_the_output(scale, monkeypatch):
    tile = 1 << 16
    monkeypatch.setattr(cpu, "_TILE_BYTES", tile)
    made = []
    compute = cpu._tile
    monkeypatch.setattr(cpu, "_tile", lambda queries, *rest: made.append(queries) or compute(queries, *rest))
    neighborhood_attention(*random_inputs(low=(9, 10), scale=scale), sum_heads=True)
    scores = [2 * 81 * queries.shape[0] * queries.shape[1] * 4 for queries in made]
    assert max(scores) <= max(tile, 2 * 81 * scale[1] * 4)
    assert max(scores) > tile / 4


# --- Codes ---


@pytest.mark.parametrize("sum_heads", [False, True])
@pytest.mark.parametrize("implementation", [*COMPILED, "reference"])
def test_codes_are_the_quantized_output(implementation, sum_heads):
    device = device_of(implementation)
    queries, keys, values = random_inputs(B=2, low=(2, 10), K=6, device=device)
    values[1, 2, 1, 3] = torch.nan
    channels = 3 if sum_heads else 6
    quantization = Quantization(torch.rand(channels, device=device) / 100 + 0.003, torch.randn(channels, device=device))
    inputs, options = (queries, keys, values), {"sum_heads": sum_heads, "implementation": implementation}
    codes = neighborhood_codes(*inputs, quantization, **options)
    expected = quantized(neighborhood_attention(*inputs, **options), quantization)
    assert expected.clipped.min() > 10
    assert (expected.not_finite > 0).tolist() == [False, True]
    for actual, wanted in zip(codes, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert codes.codes.is_contiguous()


# --- Gradients, operators, choice ---


@pytest.mark.parametrize("sum_heads", [False, True])
def test_gradients_of_the_reference(sum_heads):
    inputs = [t.requires_grad_() for t in random_inputs(low=(3, 2), scale=(2, 1), d=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: literal(*tensors, 3, sum_heads), inputs)


@pytest.mark.parametrize("tile_bytes", [2000, 1 << 20])
@pytest.mark.parametrize("sum_heads", [False, True])
@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients(implementation, sum_heads, tile_bytes, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE_BYTES", tile_bytes)
    inputs = [t.requires_grad_() for t in random_inputs(B=2, low=(10, 11), device=device_of(implementation))]
    output = neighborhood_attention(*inputs, sum_heads=sum_heads, implementation=implementation)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = literal(*wide, 9, sum_heads)
    assert_close(output, expected, 1e-5)
    weight = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, weight)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, wide, weight.double()), strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at its first use
def test_forward_mode():
    queries, keys, values = random_inputs(dtype=torch.float64)
    change = torch.randn_like(values)
    _, along = torch.func.jvp(lambda v: neighborhood_attention(queries, keys, v), (values,), (change,))
    assert_close(along, neighborhood_attention(queries, keys, change), 1e-13)  # it is linear in the values


@pytest.mark.parametrize("implementation", [TRITON])
def test_operators_are_as_torch_asks(implementation):
    inputs = random_inputs(low=(2, 3), scale=(2, 1), K=2, device=device_of(implementation))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.attention, (*inputs, 9, False), test_utils=tests)
    scale = torch.ones(1, device=inputs[0].device), torch.zeros(1, device=inputs[0].device)
    torch.library.opcheck(operators.codes, (*inputs, 9, True, *scale), test_utils=tests)


def test_what_runs_is_said():
    on_cpu = explain(Kind(torch.device("cpu"), torch.float32))
    assert on_cpu.chosen == "cpu"
    assert "inputs are torch.float64" in str(explain(Kind(torch.device("cpu"), torch.float64)).reasons_not["triton"])
    assert explain(Kind(torch.device("meta"), torch.float32)).chosen == "reference"


# --- Errors ---

QUERIES, KEYS, VALUES = (torch.zeros(1, 4, 9, 2, 3), torch.zeros(1, 2, 3, 2, 3), torch.zeros(1, 6, 2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: QUERIES[0]}, r"queries: got shape \(4, 9, 2, 3\)"),
        ({0: QUERIES.int()}, r"queries: .*int32.*in torch\.float16"),
        ({0: QUERIES[:0]}, "queries: .*not empty"),
        ({0: QUERIES[:, :3]}, "queries: got a size of 3×9, need whole multiples of the keys' 2×3"),
        ({0: QUERIES[:, :, :8]}, "queries: got a size of 4×8"),
        ({1: KEYS[..., :2]}, r"keys: got shape \(1, 2, 3, 2, 2\), need \[1, h, w, 2, 3\]"),
        ({1: KEYS[:, :0]}, "keys: .*not empty"),
        ({1: KEYS.double()}, r"keys: got torch\.float64 on cpu, need queries' torch\.float32"),
        ({2: VALUES[..., :2]}, r"values: got shape \(1, 6, 2, 2\), need \[1, K, 2, 3\]"),
        ({2: VALUES[:, :5]}, "values: got 5 channels, need a multiple of the 2 heads"),
        ({2: VALUES.int()}, r"values: got torch\.int32"),
        ({3: 4}, "window: got 4, need an odd integer"),
        ({3: 0}, "window: got 0"),
        ({3: 9.0}, r"window: got 9\.0"),
    ],
)
def test_errors(changed, message):
    arguments = [QUERIES, KEYS, VALUES, 9]
    for position, value in changed.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*arguments)
    *tensors, window = arguments
    with pytest.raises(ValueError, match=message):
        neighborhood_codes(*tensors, Quantization(torch.ones(6), torch.zeros(6)), window)


@pytest.mark.parametrize(
    ("quantization", "sum_heads", "message"),
    [
        (Quantization(torch.ones(6), torch.zeros(6)), True, r"quantization\.step: got shape \(6,\).*need \[3\]"),
        (Quantization(torch.ones(6), torch.zeros(5)), False, r"quantization\.offset: got shape \(5,\)"),
        (Quantization(torch.ones(6).double(), torch.zeros(6)), False, r"quantization\.step: .*float64"),
        (0.1, False, "quantization: got float"),
    ],
)
def test_errors_of_quantization(quantization, sum_heads, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_codes(QUERIES, KEYS, VALUES, quantization, sum_heads=sum_heads)

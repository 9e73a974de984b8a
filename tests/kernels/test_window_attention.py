import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.window.attention import tiled, windowed_attention
from kernels.window.attention.reference import window_bounds
from kernels.window.attention.reference import windowed_attention as full_attention
from tests.helpers.rounding import assert_close

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def random_inputs(B=2, high=(9, 13), low=(4, 5), heads=2, d=3, k=4, dtype=torch.float64):
    queries, keys = (torch.randn(B, *size, heads, d, dtype=dtype) for size in (high, low))
    return 2 * queries, keys, torch.randn(B, k, *low, dtype=dtype)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation made."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


# --- The reference, against what the words say ---


def test_reference_is_the_explicit_loop():
    queries, keys, values = random_inputs(B=1, high=(5, 7), low=(3, 4))
    heads, d = queries.shape[3:]
    expected = torch.zeros(1, 4, 5, 7, dtype=torch.float64)
    for y, x in np.ndindex(5, 7):
        cells = [
            (i, j)
            for i, j in np.ndindex(3, 4)
            if math.floor(max((y + 0.5) / 5 - 0.3, 0) * 3) <= i < math.ceil(min((y + 0.5) / 5 + 0.3, 1) * 3)
            and math.floor(max((x + 0.5) / 7 - 0.3, 0) * 4) <= j < math.ceil(min((x + 0.5) / 7 + 0.3, 1) * 4)
        ]
        for head in range(heads):
            scores = torch.stack([queries[0, y, x, head] @ keys[0, i, j, head] for i, j in cells]) / math.sqrt(d)
            for weight, (i, j) in zip(torch.softmax(scores, 0), cells, strict=True):
                expected[0, :, y, x] += weight / heads * values[0, :, i, j]
    torch.testing.assert_close(full_attention(queries, keys, values, 0.3), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.floats(1e-3, 1.5))
def test_windows_are_never_empty_and_hold_their_centre(low, high, ratio):
    starts, stops = window_bounds(low, high, ratio)
    assert (stops > starts).all()
    assert (starts.diff() >= 0).all()
    assert (stops.diff() >= 0).all()
    assert starts.min() >= 0
    assert stops.max() <= low
    cells = ((torch.arange(high) + 0.5) / high * low).floor()
    assert ((starts <= cells) & (cells < stops)).all()


def test_windows_at_the_published_ratio():
    starts, stops = window_bounds(16, 224, 0.1)
    assert starts[[0, 21, 22, 112, 223]].tolist() == [0, 0, 0, 6, 14]
    assert stops[[0, 21, 22, 112, 223]].tolist() == [2, 4, 4, 10, 16]


# --- The operation, against the reference ---

SIZES = [
    ((9, 13), (4, 5)),
    ((28, 28), (2, 2)),
    ((5, 6), (5, 6)),
    ((4, 3), (9, 8)),  # downsampling
    ((33, 7), (1, 1)),
    ((1, 1), (6, 7)),
    ((50, 50), (5, 5)),
    ((16, 41), (7, 40)),
]


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.37, 3.0])
@pytest.mark.parametrize(("high", "low"), SIZES)
def test_agrees_with_the_full_matrix(high, low, ratio):
    inputs = random_inputs(high=high, low=low)
    size = inputs[2].abs().max()  # outputs are means of the values
    assert_close(windowed_attention(*inputs, ratio), full_attention(*inputs, ratio), 1e-14, size)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)]
)
def test_dtypes(dtype, rtol):
    inputs = [t.to(dtype) for t in random_inputs(high=(19, 30), low=(6, 7), d=8)]
    output = windowed_attention(*inputs, 0.2)
    assert output.dtype == dtype
    assert_close(output.double(), full_attention(*(t.double() for t in inputs), 0.2), rtol)


def test_values_may_have_another_dtype():
    queries, keys, values = random_inputs()
    output = windowed_attention(queries.half(), keys.half(), values, 0.2)
    assert output.dtype == torch.float64
    assert_close(output, full_attention(queries, keys, values, 0.2), 5e-3)


@pytest.mark.parametrize("tile_bytes", [1, 3000, 20_000])
def test_tiles_of_any_size(tile_bytes, monkeypatch):
    inputs = random_inputs(high=(31, 44), low=(6, 9))
    whole = windowed_attention(*inputs, 0.1)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", tile_bytes)
    assert_close(windowed_attention(*inputs, 0.1), whole, 1e-14)


@pytest.mark.parametrize(("high", "low"), SIZES)
def test_gradients(high, low, monkeypatch):
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 5000)
    inputs = [t.requires_grad_() for t in random_inputs(high=high, low=low)]
    output, expected = (attention(*inputs, 0.2) for attention in (windowed_attention, full_attention))
    assert_close(output, expected, 1e-14, inputs[2].detach().abs().max())
    weights = torch.randn_like(output)
    for actual, wanted in zip(*(torch.autograd.grad(t, inputs, weights) for t in (output, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_outputs_are_means_of_values():
    queries, keys, values = random_inputs(dtype=torch.float32)
    flat = windowed_attention(queries, keys, torch.full_like(values, 3.5), 0.1)
    assert_close(flat, torch.full_like(flat, 3.5), 1e-6)
    output = windowed_attention(queries, keys, values, 0.1)
    assert (output.amax((2, 3)) <= values.amax((2, 3)) + 1e-6).all()


def test_far_values_do_not_matter():
    queries, keys, values = random_inputs(high=(40, 40), low=(10, 10))
    changed = values.clone()
    changed[:, :, :, 5:] = torch.nan
    output = windowed_attention(queries, keys, values, 0.1)
    # Cell 5 begins at column 20, windows reach 4 columns, a run of columns is 4 wide: before column 12 no NaN is read.
    assert torch.equal(windowed_attention(queries, keys, changed, 0.1)[..., :12], output[..., :12])


def test_rows_of_a_batch_do_not_depend_on_each_other():
    inputs = random_inputs(B=3, high=(30, 20), low=(5, 4), dtype=torch.float32)
    whole = windowed_attention(*inputs, 0.1)
    for row in range(3):
        alone = windowed_attention(*(t[row : row + 1] for t in inputs), 0.1)
        assert torch.equal(alone[0], whole[row])


def test_strided_inputs():
    queries, keys, values = random_inputs()
    expected = windowed_attention(queries, keys, values, 0.2)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (queries, keys)]
    assert_close(windowed_attention(*strided, values.to(memory_format=torch.channels_last), 0.2), expected, 1e-14)


@pytest.mark.parametrize("high", [(64, 64), (200, 150)])
def test_memory_does_not_grow_with_the_output(high, monkeypatch):
    tile = 1 << 18
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", tile)
    queries, keys, values = random_inputs(B=1, high=high, low=(16, 16), heads=4, d=8, k=8, dtype=torch.float32)
    with torch.no_grad(), Allocations(queries, keys, values) as allocations:
        output = windowed_attention(queries, keys, values, 0.1)
    intermediate = [size for size in allocations.sizes if size != output.nbytes]
    assert max(intermediate) <= tile
    assert 4 * math.prod(high) * 256 * 4 > 16 * tile  # what the full matrix takes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float16, 5e-3)])
def test_gpu(dtype, rtol):
    inputs = random_inputs(B=3, high=(61, 47), low=(9, 8), heads=4, d=32)
    output = windowed_attention(*(t.cuda().to(dtype) for t in inputs), 0.1)
    assert_close(output.cpu().double(), full_attention(*inputs, 0.1), rtol)


# --- Errors ---

QUERIES, KEYS, VALUES = (torch.zeros(1, 4, 5, 2, 3), torch.zeros(1, 2, 3, 2, 3), torch.zeros(1, 6, 2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: QUERIES[0]}, r"queries: got shape \(4, 5, 2, 3\)"),
        ({0: QUERIES.int()}, r"queries: .*int32.*floating"),
        ({0: QUERIES[:0]}, "queries: .*not empty"),
        ({1: KEYS[..., :2]}, r"keys: got shape \(1, 2, 3, 2, 2\), need \[1, h, w, 2, 3\]"),
        ({1: KEYS[:, :0]}, "keys: .*not empty"),
        ({1: KEYS.double()}, r"keys: got torch\.float64 on cpu, need queries' torch\.float32"),
        ({2: VALUES[..., :2]}, r"values: got shape \(1, 6, 2, 2\), need \[1, k, 2, 3\]"),
        ({2: VALUES.int()}, r"values: got torch\.int32"),
        ({2: VALUES.expand(2, -1, -1, -1)}, r"values: got shape \(2, 6, 2, 3\)"),
        ({3: 0.0}, "window_ratio: got 0.0, need a finite number greater than 0"),
        ({3: math.nan}, "window_ratio: got nan"),
    ],
)
def test_errors(changed, message):
    arguments = [QUERIES, KEYS, VALUES, 0.1]
    for position, value in changed.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        windowed_attention(*arguments)


def test_every_pixel_is_written_once():
    for (high, low), ratio in itertools.product(SIZES, (0.05, 0.5)):
        seen = torch.zeros(high)
        for rows, columns, tile in tiled._tiles(*random_inputs(high=high, low=low), ratio):
            seen[rows, columns] += 1
            assert tile.shape[2:] == seen[rows, columns].shape
        assert (seen == 1).all()

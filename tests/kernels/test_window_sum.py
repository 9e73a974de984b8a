import pytest
import torch

from kernels.window.sum import window_sum
from kernels.window.sum.reference import window_sum as reference_window_sum
from tests.helpers.rounding import assert_close


def inputs(N=2, M=7, size=(11, 9), window=(4, 5), c=6, dtype=torch.float32):
    torch.manual_seed(0)
    maps = torch.randn(N, *size, c, dtype=dtype, requires_grad=True)
    weights = torch.randn(N, M, *window, dtype=dtype, requires_grad=True)
    rows, columns = (torch.randint(0, length - side + 1, (M,)) for length, side in zip(size, window, strict=True))
    return maps, weights, rows, columns


@pytest.mark.parametrize(("window", "c"), [((4, 5), 6), ((1, 1), 1), ((11, 9), 65)])
def test_the_same_as_cutting_windows_out(window, c):
    maps, weights, rows, columns = inputs(window=window, c=c)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    cut = torch.stack([maps[:, i : i + window[0], j : j + window[1]] for i, j in places], 1)  # [N, M, S, S', c]
    expected = (weights[..., None] * cut).sum((2, 3))
    given = torch.randn_like(expected)

    def results(output, maps, weights, given):
        return [output, *torch.autograd.grad(output, (maps, weights), given)]

    wanted = results(expected, maps, weights, given)
    absolute = [tensor.detach().abs().requires_grad_() for tensor in (maps, weights)]
    sizes = results(reference_window_sum(*absolute, rows, columns), *absolute, given.abs())
    for function in (window_sum, reference_window_sum):
        got = results(function(maps, weights, rows, columns), maps, weights, given)
        for one, two, size in zip(got, wanted, sizes, strict=True):
            assert_close(one, two, 2e-6, size)


def test_float64_is_the_reference():
    arguments = inputs(dtype=torch.float64)
    assert torch.equal(window_sum(*arguments), reference_window_sum(*arguments))


@torch.inference_mode()
def test_maps_do_not_touch_each_other():
    maps, weights, rows, columns = inputs()
    alone = window_sum(maps[1:].clone(), weights[1:], rows, columns)
    spoiled = maps.clone()
    spoiled[0] = torch.nan
    assert torch.equal(window_sum(spoiled, weights, rows, columns)[1:], alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: torch.zeros(2, 7, 4, 5).double()}, "weights: .*float64"),
        ({1: torch.zeros(3, 7, 4, 5)}, "weights"),
        ({2: torch.zeros(6, dtype=torch.int64)}, r"rows: got \[6\]"),
        ({2: torch.full((7,), 8)}, "rows: got 8 to 8, need 0 to 7"),
        ({3: torch.full((7,), -1)}, "columns: got -1 to -1"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = [changed.get(i, argument) for i, argument in enumerate(inputs())]
    with pytest.raises(ValueError, match=message):
        window_sum(*arguments)

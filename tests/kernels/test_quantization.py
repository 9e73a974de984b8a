import pytest
import torch

from kernels.quantization import Encoding, Quantization, quantized

UNIT, FLOAT16 = Encoding(torch.ones(2)), Encoding(None)


def test_outliers_are_clipped_and_counted() -> None:
    x = torch.zeros(2, 2, 3, 3)
    x[1, 0, 0, 0], x[1, 1, 1, 1] = 1e6, -1e6
    codes, not_finite, clipped = UNIT.encode(x)
    assert clipped.tolist() == [0, 2]
    assert not_finite.tolist() == [0, 0]
    assert (codes.min(), codes.max()) == (-127, 127)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("encoding", [UNIT, FLOAT16])
def test_one_bad_image_is_found_and_spoils_no_other(bad: float, encoding: Encoding) -> None:
    x = torch.randn(3, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    clean = encoding.encode(x).codes
    x[1, 0, 12, 3] = bad
    codes, not_finite, clipped = encoding.encode(x)
    assert not_finite.tolist() == [0, 1, 0]
    assert torch.equal(codes[[0, 2]], clean[[0, 2]])
    assert clipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_codes_are_the_definition(memory_format: torch.memory_format) -> None:
    x = 60 * torch.randn(2, 5, 19, 11, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 2, 9, 1] = torch.nan, torch.inf, 0.5
    quantization = Quantization(torch.rand(5) + 0.5, torch.randn(5))
    encoding = Encoding(quantization.step)
    codes = encoding.encode(x.contiguous(memory_format=memory_format), quantization.offset)
    for actual, expected in zip(codes, quantized(x, quantization), strict=True):
        assert torch.equal(actual, expected)


def test_beyond_float16_is_not_finite() -> None:
    x = torch.ones(2, 1, 2, 2)
    x[1] = 1e6
    assert FLOAT16.encode(x).not_finite.tolist() == [0, 4]


def test_an_encoding_knows_its_dtype_and_what_a_kernel_takes() -> None:
    for encoding, dtype in ((UNIT, torch.int8), (FLOAT16, torch.float16)):
        assert encoding.dtype == encoding.encode(torch.ones(1, 2, 3, 3)).codes.dtype == dtype
    offset, known = torch.tensor([1.0, 2.0]), UNIT.quantization()
    assert FLOAT16.quantization(offset) is None
    assert known is not None
    assert (known.step.tolist(), known.offset.tolist()) == ([1, 1], [0, 0])


def test_float16_adds_the_offset_before_it_rounds() -> None:
    x, offset = torch.randn(2, 3, 19, 5, generator=torch.Generator().manual_seed(0)).half(), torch.randn(3)
    expected = (x.float() + offset[:, None, None]).half()
    assert torch.equal(FLOAT16.encode(x, offset).codes, expected)

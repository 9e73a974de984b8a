"""What is particular to the Triton kernel of neighbourhood attention. The common contract: test_neighborhood.py.

This file is also the program that compiles (``python test_neighborhood_triton.py arch dtype``).
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.triton_compiles import SHARED_MEMORY, compiled, reports_of


def compile_kernels(arch, dtype):
    """Call operations with tensors that have no memory, and compile where they launch. Print what was compiled."""
    from kernels.quantization import Quantization
    from kernels.window.neighborhood import triton as kernels

    reports = []

    def compile_instead(kernel, grid, shared, **arguments):
        reports.append(compiled(kernel, arch, kernels.complete(shared, arguments), kernels.options()))

    kernels.launch = compile_instead
    torch.set_default_device("meta")
    queries, keys = (torch.empty(2, n, n, 4, 64, dtype=dtype) for n in (224, 16))
    for K, sum_heads in ((256, True), (384, False)):
        values, channels = torch.empty(2, K, 16, 16, dtype=dtype), K // 4 if sum_heads else K
        kernels.neighborhood_attention(queries, keys, values, 9, sum_heads)
        scale = Quantization(torch.empty(channels), torch.empty(channels))
        kernels.neighborhood_codes(queries, keys, values, 9, sum_heads, scale)
    json.dump(reports, sys.stdout)


def check(cache, arch, dtype):
    reports = reports_of(__file__, cache, arch, dtype)
    assert len(reports) == 4
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[arch], report
        assert report["stack"] <= 64, report  # next to nothing is spilled
        assert report["matrix_units"], report


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiles(arch, tmp_path):
    check(tmp_path, arch, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_everything_compiles(arch, dtype, tmp_path):
    check(tmp_path, arch, dtype)


def inputs(low=(3, 4), scale=(2, 2), heads=2, d=16, K=4, dtype=torch.float32):
    from tests.helpers.jbu import device_of

    high = (low[0] * scale[0], low[1] * scale[1])
    queries, keys = (torch.randn(1, *size, heads, d) for size in (high, low))
    return [tensor.to(device_of("triton"), dtype) for tensor in (queries, keys, torch.randn(1, K, *low))]


@pytest.mark.parametrize(
    ("shapes", "sum_heads"),
    [
        ({"low": (2, 1), "scale": (9, 17)}, True),  # several tiles in a cell
        ({"K": 2 * 70}, False),  # more channels than a block
        ({"K": 2 * 130}, True),
        ({"heads": 3, "d": 20, "K": 9}, False),  # no powers of two
        ({"heads": 1, "d": 70, "K": 5}, True),
    ],
)
def test_tiles_and_blocks_are_seamless(shapes, sum_heads):
    from kernels.window.neighborhood import neighborhood_attention
    from tests.helpers.rounding import assert_close

    tensors = inputs(**shapes)
    output = neighborhood_attention(*tensors, sum_heads=sum_heads, implementation="triton")
    wide = [tensor.double() for tensor in tensors]
    expected = neighborhood_attention(*wide, sum_heads=sum_heads, implementation="reference")
    assert_close(output, expected, 1e-5)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_codes_of_half_are_within_one():
    from kernels.quantization import Quantization, quantized
    from kernels.window.neighborhood import neighborhood_attention, neighborhood_codes

    tensors = inputs(low=(4, 9), K=8, dtype=torch.float16)
    quantization = Quantization(*(t.to(tensors[0].device) for t in (torch.rand(4) / 20 + 0.01, torch.randn(4))))
    options = {"sum_heads": True, "implementation": "triton"}
    codes = neighborhood_codes(*tensors, quantization, **options)
    expected = quantized(neighborhood_attention(*tensors, **options), quantization)
    assert (codes.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (codes.clipped - expected.clipped).abs().max() <= 3
    assert not codes.not_finite.any()


def test_too_large_a_batch():
    from kernels.window.neighborhood.triton import geometry

    many = [SimpleNamespace(shape=shape) for shape in ((65536, 4, 4, 2, 16), (65536, 2, 2, 2, 16), (65536, 4, 2, 2))]
    with pytest.raises(ValueError, match=r"got 65536 images, need at most 65535 .*Split the batch"):
        geometry(*many, 9, False)


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]), getattr(torch, sys.argv[2]))

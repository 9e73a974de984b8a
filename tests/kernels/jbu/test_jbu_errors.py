"""What the operations of joint bilateral upsampling refuse, and say."""

import math

import pytest
import torch

from kernels.jbu import (
    JBUStack,
    JBUStage,
    adaptive_conv_upsample2x,
    bilateral_codes,
    bilateral_kernel,
    bilateral_stage,
    learned_codes,
    learned_kernel,
    learned_stage,
)
from kernels.quantization import Quantization

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

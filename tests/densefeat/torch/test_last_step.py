"""The last step of compact stores is that of the pipeline's upsamplers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densefeat.torch import LastStep
from densefeat.torch import bilateral as reference
from densefeat.torch.bilateral import StageSettings
from pipeline.upsamplers.bilinear import Bilinear
from pipeline.upsamplers.jbu import JBU

STAGE = {"radius": 3, "sigma_spatial": 1.5, "sigma_range": 0.1}
JBU_STEP = {"name": "jbu", **STAGE}


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photo(batch: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(batch, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    k=st.integers(1, 5),
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    size=st.tuples(st.integers(2, 50), st.integers(2, 50)),
)
def test_it_is_the_step_of_the_upsamplers(batch: int, k: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    low, images = made(batch, k, *grid), photo(batch, 40, 31)
    for upsampler in (JBU(), Bilinear()):
        description = upsampler.last_step()
        assert description is not None
        step = LastStep.of({"size": list(size), "last_step": description})
        expected = upsampler(low, images, size)
        got = step(low, images if step.guided else None)
        assert got.shape == (batch, k, *size)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_its_settings_are_those_of_the_store() -> None:
    low, images = made(1, 4, 6, 6), photo(1, 24, 24)
    wide = LastStep.of({"size": [24, 24], "last_step": {**JBU_STEP, "sigma_range": 5.0, "radius": 2}})
    expected = low
    for side in (12, 24):
        guidance = torch.nn.functional.adaptive_avg_pool2d(images / 255, side)
        expected = reference.bilateral_stage(expected, guidance, 1.5, 5.0, 2)
    assert torch.equal(wide(low, images), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_keeps_the_dtype(dtype: torch.dtype) -> None:
    step = LastStep.of({"size": [20, 30], "last_step": JBU_STEP})
    low, images = made(2, 3, 5, 8), photo(2, 20, 30)
    got = step(low.to(dtype), images)
    assert got.dtype == dtype
    assert (got.double() - step(low.double(), images)).abs().max() < (1e-5 if dtype.itemsize > 2 else 0.1)


def test_it_propagates_gradients_and_can_be_compiled_to_a_graph() -> None:
    step = LastStep.of({"size": [20, 30], "last_step": JBU_STEP})
    low, images = made(1, 3, 5, 8).double().requires_grad_(), photo(1, 20, 30)
    assert torch.autograd.gradcheck(lambda x: step(x, images)[..., ::7, ::9], low)
    exported = torch.export.export(step, (low.detach(), images))
    assert torch.allclose(exported.module()(low.detach(), images), step(low, images))


def test_each_stage_has_its_settings() -> None:
    first, second = {**STAGE, "radius": 5}, {**STAGE, "sigma_range": 0.3}
    step = LastStep.of({"size": [40, 64], "last_step": {"name": "jbu", "stages": [first, second]}})
    low, images = made(1, 3, 5, 8), photo(1, 40, 64)
    expected = low
    for stage in (first, second, second):
        guidance = torch.nn.functional.adaptive_avg_pool2d(images / 255, [2 * n for n in expected.shape[2:]])
        expected = reference.bilateral_stage(expected, guidance, **stage)
    assert torch.allclose(step(low, images), expected)


def test_in_a_small_image_the_radius_is_what_its_border_allows() -> None:
    step = LastStep.of({"size": [4, 4], "last_step": {"name": "jbu", "stages": [{**STAGE, "radius": 7}]}})
    low, images = made(1, 3, 2, 2), photo(1, 4, 4)
    guidance = images / 255
    assert torch.allclose(step(low, images), reference.bilateral_stage(low, guidance, **STAGE))
    assert step(low[..., :1, :1], images).shape == (1, 3, 4, 4)


def test_arrays_of_one_image() -> None:
    step = LastStep.of({"size": [20, 30], "last_step": JBU_STEP})
    low, images = made(1, 3, 5, 8), photo(1, 20, 30)
    high = step.on_arrays(low[0].numpy(), images[0].permute(1, 2, 0).numpy())
    assert high.dtype == np.float32
    assert high.flags.c_contiguous
    assert np.array_equal(high, step(low, images)[0].numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_it_is_the_same(dtype: torch.dtype) -> None:
    step = LastStep.of({"size": [224, 224], "last_step": JBU_STEP})
    low, images = made(4, 16, 16, 16).to(dtype), photo(4, 224, 224)
    got = step(low.cuda(), images.cuda()).cpu().float()
    assert (got - step(low.float(), images)).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"size": [4, 4]}, "damaged: KeyError: 'last_step'"),
        ({"size": [4], "last_step": JBU_STEP}, "not enough values"),
        ({"size": [4, 4], "last_step": {"name": "jbu"}}, "damaged: KeyError: 'radius'"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "colour": "lab"}}, "unknown settings colour: upgrade densefeat"),
        ({"size": [4, 4], "last_step": {"name": "jbu", "stages": []}}, r"damaged: TypeError: stages are \[\]"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "stages": []}}, r"damaged: TypeError: stages are \[\]"),
        ({"size": [4, 4], "last_step": {"name": "jbu", "stages": [3]}}, r"damaged: TypeError: stages are \[3\]"),
        ({"size": [4, 4], "last_step": {"name": "jbu", "stages": "ab"}}, "damaged: TypeError: stages are 'ab'"),
        ({"size": [4, 4], "last_step": {"name": "jbu", "stages": [{**STAGE, "colour": "lab"}]}}, "settings colour: up"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "stages": [STAGE]}}, "unknown settings radius, sigma_range, sigma"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "radius": 0}}, "damaged: a stage has .*radius=0"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "sigma_range": 0}}, "damaged: a stage has .*sigma_range=0"),
        ({"size": [4, 4], "last_step": {**JBU_STEP, "sigma_spatial": math.nan}}, "damaged: a stage has .*=nan"),
        ({"size": [4, 4], "last_step": {"name": "naf"}}, "'naf' is unknown to this version of densefeat: upgrade"),
    ],
)
def test_unknown_steps_are_refused(description: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LastStep.of(description)


@pytest.mark.parametrize(("method", "stages"), [("jbu", []), ("bilinear", [StageSettings(3, 1.5, 0.1)])])
def test_only_jbu_has_stages(method: str, stages: list[StageSettings]) -> None:
    with pytest.raises(ValueError, match=f"stages: got {len(stages)} for the step '{method}'"):
        LastStep((4, 4), method, stages)


def test_guidance_is_needed() -> None:
    with pytest.raises(ValueError, match=r"guidance: got None, the step 'jbu' needs images \[B, 3, H, W\]"):
        LastStep.of({"size": [4, 4], "last_step": JBU_STEP})(made(1, 1, 2, 2))

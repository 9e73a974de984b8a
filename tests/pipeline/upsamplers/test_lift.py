import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import JobError
from pipeline.upsamplers.lift.network import LiFT
from tests.helpers.rounding import assert_close

REFERENCE = Path(__file__).parents[4] / "shared" / "reference"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_lift(num_chs=6, patch=8, iterations=1, dtype=torch.float64):
    lift = LiFT(num_chs, patch, iterations)
    for module in lift.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.uniform_(-0.2, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return lift.to(dtype).eval()


def random_inputs(grid=(3, 4), image=(24, 32), num_chs=6, B=2, dtype=torch.float64):
    return torch.randn(B, num_chs, *grid, dtype=dtype), torch.randn(B, 3, *image, dtype=dtype)


# --- Against LiFT's own results ---


@pytest.mark.parametrize("patch", [8, 16])
@torch.inference_mode()
def test_golden(patch):
    path = REFERENCE / f"lift_patch{patch}.npz"
    if not path.exists():
        pytest.skip(f"reference case {path} is not beside the checkout")
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(path).items()}
    state = {name.removeprefix("state/"): t for name, t in golden.items() if name.startswith("state/")}
    lift = LiFT.from_state(state, patch=patch, num_chs=24)
    assert_close(lift(golden["source"], golden["image"]), golden["output"], 1e-5)


# --- Sizes and repeated application ---


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(
    ("patch", "grid", "image"),
    [
        (14, (16, 16), (224, 224)),
        (14, (3, 5), (42, 70)),
        (14, (7, 3), (98, 42)),
        (14, (4, 3), (61, 77)),  # no multiple of anything
        (8, (5, 1), (40, 8)),
        (16, (2, 3), (100, 20)),
        (4, (3, 3), (12, 12)),  # the image branch is coarser than the grid
    ],
)
@torch.inference_mode()
def test_any_patch_grid_and_image(patch, grid, image, iterations):
    lift = random_lift(patch=patch, iterations=iterations, dtype=torch.float32)
    output = lift(*random_inputs(grid, image, dtype=torch.float32))
    assert output.shape == (2, 6, grid[0] << iterations, grid[1] << iterations)
    assert output.isfinite().all()


@torch.inference_mode()
def test_the_second_application_sees_the_image_at_twice_the_size():
    features, image = random_inputs(grid=(3, 4), image=(42, 56))
    large = F.interpolate(image, (84, 112), mode="bilinear", antialias=True)
    twice = random_lift(patch=14, iterations=2)
    once = LiFT(6, 14).double().eval()
    once.load_state_dict(twice.state_dict())
    assert_close(twice(features, image), once(once(features, image), large), 1e-12)


@torch.inference_mode()
def test_a_larger_image_serves_later_applications():
    lift = random_lift(patch=8, iterations=2)
    features, large = random_inputs(image=(48, 64))
    small = F.interpolate(large, (24, 32), mode="bilinear", antialias=True)
    assert not torch.allclose(lift(features, large), lift(features, small), atol=1e-6)


@torch.inference_mode()
def test_rows_of_a_batch_do_not_depend_on_each_other():
    lift = random_lift()
    features, image = random_inputs(B=3)
    whole = lift(features, image)
    for row in range(3):
        assert_close(lift(features[row : row + 1], image[row : row + 1])[0], whole[row], 1e-12)


# --- Folding ---


@pytest.mark.parametrize("iterations", [1, 2, 3])
@torch.inference_mode()
def test_folding_a_basis_is_projecting_the_output(iterations):
    lift = random_lift(patch=14, iterations=iterations)
    features, image = random_inputs(image=(42, 56))
    mean, components = torch.randn(6).double(), torch.randn(4, 6).double()
    full = lift(features, image) - mean[:, None, None]
    folded = lift.folded(mean, components)
    assert (lift.out_chs, folded.out_chs) == (6, 4)
    assert_close(folded(features, image), torch.einsum("kc,bchw->bkhw", components, full), 1e-13)
    assert lift(features, image).shape[1] == 6  # left as it was


@torch.inference_mode()
def test_folding_in_float32_rounds_only():
    lift = random_lift(num_chs=24, dtype=torch.float32)
    features, image = random_inputs(num_chs=24, dtype=torch.float32)
    mean, components = torch.randn(24), torch.linalg.qr(torch.randn(24, 24))[0][:8]
    expected = torch.einsum("kc,bchw->bkhw", components, lift(features, image) - mean[:, None, None])
    assert_close(lift.folded(mean, components)(features, image), expected, 1e-6)


def test_what_folding_refuses():
    lift = random_lift()
    with pytest.raises(ValueError, match=r"components: got mean \(5,\).*the weights' C = 6"):
        lift.folded(torch.zeros(5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"components: got .* components \(2, 5\)"):
        lift.folded(torch.zeros(6), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="makes 2 components already"):
        lift.folded(torch.zeros(6), torch.zeros(2, 6)).folded(torch.zeros(6), torch.zeros(2, 6))


# --- Precision and training ---


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@torch.inference_mode()
def test_half_precision(dtype, rtol):
    lift = random_lift(patch=14, iterations=2)
    features, image = random_inputs(image=(40, 60))
    expected = lift(features, image)
    output = lift.to(dtype)(features.to(dtype), image.to(dtype))
    assert output.dtype == dtype
    assert_close(output.double(), expected, rtol)


def test_training_reaches_every_parameter():
    lift = random_lift(patch=14, iterations=2, dtype=torch.float32).train()
    before = lift.up1.conv_1.double_conv[1].running_mean.clone()
    features, image = random_inputs(image=(42, 56), dtype=torch.float32)
    features.requires_grad_()
    (1 - F.cosine_similarity(lift(features, image), torch.randn(2, 6, 12, 16))).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lift.parameters())
    assert features.grad.abs().sum() > 0
    assert not torch.equal(lift.up1.conv_1.double_conv[1].running_mean, before)


# --- Checkpoints and errors ---


@torch.inference_mode()
def test_a_checkpoint_loads_with_and_without_its_prefix():
    lift, inputs = random_lift(dtype=torch.float32), random_inputs(dtype=torch.float32)
    state = lift.state_dict()
    for prefix in ("", "module."):
        loaded = LiFT.from_state({prefix + name: t for name, t in state.items()}, patch=8)
        assert not loaded.training
        assert_close(loaded(*inputs), lift(*inputs), 1e-6)


@pytest.mark.parametrize(
    ("spoil", "num_chs", "words"),
    [
        (lambda state: None, 384, "for features of 6 channels, the backbone outputs 384"),
        (lambda state: state.pop("outc.bias"), None, "outc.bias"),
        (lambda state: state.pop("outc.weight"), None, "got nothing for outc.weight"),
        (lambda state: state.pop("image_convs_1.4.running_var"), None, "image_convs_1.4.running_var"),
        (lambda state: state.update({"up1.extra": torch.zeros(1)}), None, "up1.extra"),
        (lambda state: state.update({"up1.up.bias": torch.zeros(3)}), None, "up1.up.bias"),
        (lambda state: state.clear(), None, "got nothing for outc.weight"),
        (lambda state: state.update({"outc.weight": torch.zeros(())}), None, "outc.weight"),
        (lambda state: state.update({"outc.weight": torch.zeros(7, 3, 1, 1)}), None, "outc.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(spoil, num_chs, words):
    state = random_lift(dtype=torch.float32).state_dict()
    spoil(state)
    with pytest.raises(JobError, match=re.escape(words)):
        LiFT.from_state(state, patch=8, num_chs=num_chs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 8), "num_chs: got 7, need an even number"),
        ((6, 0), "patch: got 0"),
        ((6, 8, 0), "iterations: got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiFT(*arguments)


@pytest.mark.parametrize(
    ("features", "image", "message"),
    [
        (torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 24, 32), r"features: got \(2, 5, 3, 4\).*need \[B, 6, h, w\]"),
        (torch.zeros(6, 3, 4), torch.zeros(2, 3, 24, 32), "features"),
        (torch.zeros(2, 6, 0, 4), torch.zeros(2, 3, 24, 32), "features: .*not empty"),
        (torch.zeros(2, 6, 3, 4).half(), torch.zeros(2, 3, 24, 32), r"features: .*float16, need .*float32"),
        (torch.zeros(2, 6, 3, 4), torch.zeros(1, 3, 24, 32), r"image: got \(1, 3, 24, 32\).*need \[2, 3, H, W\]"),
        (torch.zeros(2, 6, 3, 4), torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "image: .*uint8"),
    ],
)
def test_bad_inputs_are_named(features, image, message):
    with pytest.raises(ValueError, match=message):
        random_lift(dtype=torch.float32)(features, image)

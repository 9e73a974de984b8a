"""Downsamplers: the published one, and against torch's own operations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.views.downsample import AttentionDownsampler, SimpleDownsampler, blur_matrix, mean_matrix
from pipeline.views.jitter import apply_matrices
from tests.helpers.rounding import assert_close
from tests.helpers.stores import SHARED

GOLDEN = SHARED / "reference" / "featup_implicit.npz"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference case {GOLDEN} is not beside the checkout")
def test_published_simple_downsampler() -> None:
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}
    downsampler = SimpleDownsampler(len(golden["down_kernel"]))
    downsampler.load_state_dict({"kernel": golden["down_kernel"]})
    with torch.no_grad():
        low = downsampler(golden["views"], (5, 5))
    assert_close(low, golden["low"], 1e-6, size=golden["views"].abs().max())


def test_the_simple_downsampler_begins_as_a_mean_and_takes_grids_that_are_not_square() -> None:
    maps = torch.randn(2, 3, 12, 20)
    assert_close(SimpleDownsampler(4)(maps, (3, 5)), F.avg_pool2d(maps, 4), 1e-6, size=maps.abs().max())
    assert SimpleDownsampler(4)(torch.randn(2, 3, 13, 23), (3, 5)).shape == (2, 3, 3, 5)
    assert SimpleDownsampler(4)(torch.randn(1, 1, 4, 8), (1, 2)).shape == (1, 1, 1, 2)


def test_attention_over_each_cell() -> None:
    """On a few directions of feature space, against all channels and a loop over the cells."""
    C, k, h, w, cell = 7, 3, 2, 4, 5
    downsampler = AttentionDownsampler(C, cell).double()
    features = torch.randn(2, C, h * cell, w * cell, dtype=torch.float64)
    projection = torch.randn(2, C, k, dtype=torch.float64)
    kept_channels = torch.tensor([[1.0] * C, [0.0, 1.25, 1.25, 0.0, 1.25, 1.25, 1.25]], dtype=torch.float64)
    kept_cells = torch.ones(2, h, w, dtype=torch.float64)
    kept_cells[0, 1, 2] = 0
    expected = torch.zeros(2, k, h, w, dtype=torch.float64)
    for b in range(2):
        for i in range(h):
            for j in range(w):
                patch = features[b, :, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
                saliency = downsampler.saliency((kept_channels[b, :, None, None] * patch).permute(1, 2, 0))[..., 0]
                logits = saliency * kept_cells[b, i, j] * downsampler.weight + downsampler.bias
                pooled = (patch * logits.flatten().softmax(0).view(cell, cell)).sum((1, 2))
                expected[b, :, i, j] = pooled @ projection[b]
    directions = torch.cat([projection, downsampler.direction(kept_channels)], -1)
    on_directions = torch.einsum("bchw,bck->bkhw", features, directions)
    low = downsampler(on_directions[:, :-1], on_directions[:, -1:], kept_cells)
    torch.testing.assert_close(low, expected)
    low.sum().backward()
    for name, parameter in downsampler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_blur_and_mean_as_matrices() -> None:
    maps = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    kernel = torch.exp(-torch.arange(-2.0, 3.0, dtype=torch.float64).square() / 2)
    kernel = kernel / kernel.sum()
    square = (kernel[:, None] * kernel[None]).expand(3, 1, 5, 5)
    expected = F.conv2d(F.pad(maps, [2] * 4, mode="reflect"), square, groups=3)
    blurred = apply_matrices(maps, blur_matrix(12).expand(2, -1, -1), blur_matrix(20).expand(2, -1, -1))
    torch.testing.assert_close(blurred, expected)
    pooled = apply_matrices(maps, mean_matrix(3, 12).expand(2, -1, -1), mean_matrix(5, 20).expand(2, -1, -1))
    torch.testing.assert_close(pooled, F.avg_pool2d(maps, 4))
    with pytest.raises(ValueError, match="multiple of 5"):
        mean_matrix(5, 12)

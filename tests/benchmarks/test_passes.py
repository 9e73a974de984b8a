"""The controls of multiview, on a backbone that averages pixels, so that the right answers are known."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.upsamplers.passes import enlarged, mean_of_views, strided

CELL, SIZE = 8, (48, 64)
BASIS = (torch.zeros(3), torch.eye(3))


class Averaging:
    """A backbone whose features are the mean colours of its cells."""

    size, reduction, num_chs = SIZE, CELL, 3
    grid = (SIZE[0] // CELL, SIZE[1] // CELL)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images.float(), CELL)


def photographs(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(("steps", "offsets"), [(1, [0]), (2, [-2, 2]), (4, [-3, -1, 1, 3])])
def test_strided_features_are_those_of_shifted_cells(steps: int, offsets: list[int]) -> None:
    backbone: Any = Averaging()
    images = photographs(2)
    high = strided(backbone, BASIS, steps)(images)
    assert high.shape == (2, 3, steps * backbone.grid[0], steps * backbone.grid[1])
    for row, column in ((1, 2), (3, 5)):  # away from the border, which is reflected
        for i, down in enumerate(offsets):
            for j, right in enumerate(offsets):
                top, left = CELL * row + down, CELL * column + right
                expected = images[:, :, top : top + CELL, left : left + CELL].float().mean((2, 3))
                torch.testing.assert_close(high[:, :, steps * row + i, steps * column + j], expected)


def test_the_mean_of_views_keeps_constants_and_places() -> None:
    backbone: Any = Averaging()
    images = photographs(1) // 8
    images[:, :, :, :32] += 120
    high = mean_of_views(backbone, BASIS, 9, (12, 16), 3.0)(images)
    assert high.shape == (1, 3, 12, 16)
    assert (high[..., :6] > 110).all()
    assert (high[..., 10:] < 40).all()
    constant = torch.full_like(images, 77)
    torch.testing.assert_close(
        mean_of_views(backbone, BASIS, 5, (12, 16), 3.0)(constant), torch.full((1, 3, 12, 16), 77.0)
    )


def test_enlarged_keeps_the_image() -> None:
    images = F.interpolate(torch.rand(1, 3, 4, 5) * 255, SIZE, mode="bilinear").to(torch.uint8)
    larger = enlarged(images, 2)
    assert larger.shape == (1, 3, 96, 128)
    assert (F.avg_pool2d(larger.float(), 2) - images.float()).abs().max() < 6

"""The common grid: labels and features of sides with different geometries meet at the same points of the image."""

import numpy as np
import pytest
import torch

from densefeat.align import RowGeometry, align
from pipeline.evaluate.data.grid import Grid

WHOLE = RowGeometry((40, 60), (20, 30), (0.5, 0.5), (0.0, 0.0), (0, 0, 20, 30))
CROP = RowGeometry((40, 60), (20, 20), (0.5, 0.5), (0.0, -5.0), (0, 0, 20, 20))  # columns 10 … 50 of the original
PADDED = RowGeometry((40, 60), (60, 60), (1.0, 1.0), (0.0, 0.0), (0, 0, 40, 60))


def coordinates(geometry: RowGeometry) -> torch.Tensor:
    """Features that are their own place in the original: [2 (y, x), H, W]; 1000 in the padding."""
    places = [
        (np.arange(size) + 0.5 - shift) / scale
        for size, shift, scale in zip(geometry.feature_size, geometry.shift, geometry.scale, strict=True)
    ]
    features = np.full((2, *geometry.feature_size), 1000.0, np.float32)
    y0, x0, y1, x1 = geometry.valid_box
    features[:, y0:y1, x0:x1] = np.stack(np.meshgrid(*places, indexing="ij"))[:, y0:y1, x0:x1]
    return torch.from_numpy(features)


def test_one_geometry_gives_its_own_pixels() -> None:
    grid = Grid.common([CROP, CROP])
    assert grid.shape == (20, 20)
    assert grid.box == (0, 0, 20, 20)
    features = torch.randn(3, 20, 20)
    assert torch.equal(grid.features(features, CROP), features)
    mask = np.random.default_rng(0).integers(0, 9, (40, 60))
    assert np.array_equal(grid.nearest(mask), align(mask, CROP))


def test_padding_is_left_out() -> None:
    grid = Grid.common([PADDED])
    assert grid.shape == (40, 60)
    assert float(grid.features(coordinates(PADDED), PADDED).max()) < 1000


@pytest.mark.parametrize("sides", [[WHOLE, CROP], [CROP, PADDED], [PADDED, WHOLE, CROP]])
def test_sides_meet_at_the_same_points(sides: list[RowGeometry]) -> None:
    """At the border of a coarse side, its outermost value is taken: half a feature pixel at most."""
    grid = Grid.common(sides)
    if CROP in sides:
        assert 10 <= grid.xs[0] < grid.xs[-1] <= 50
    for side in sides:
        places = grid.features(coordinates(side), side).numpy()
        ys, xs = np.meshgrid(grid.ys, grid.xs, indexing="ij")
        assert np.abs(places - np.stack([ys, xs]))[:, 2:-2, 2:-2].max() < 1e-4
        assert np.abs(places - np.stack([ys, xs])).max() <= 0.5 / side.scale[0] + 1e-4


def test_points_of_the_image_become_pixels_of_the_grid() -> None:
    grid = Grid.common([CROP])
    assert grid.points(np.array([[10.0, 0.0], [11.0, 1.0], [50.0, 40.0]])).tolist() == [[0, 0], [0.5, 0.5], [20, 20]]


def test_different_images_and_disjoint_crops_are_refused() -> None:
    other = RowGeometry((41, 60), (20, 30), (0.5, 0.5), (0.0, 0.0), (0, 0, 20, 30))
    with pytest.raises(ValueError, match=r"40×60 and 41×60 pixels.*one image on all sides"):
        Grid.common([WHOLE, other])
    left = RowGeometry((40, 60), (20, 10), (0.5, 0.5), (0.0, 0.0), (0, 0, 20, 10))
    right = RowGeometry((40, 60), (20, 10), (0.5, 0.5), (0.0, -20.0), (0, 0, 20, 10))
    with pytest.raises(ValueError, match="no part of it is visible on all sides"):
        Grid.common([left, right])
    with pytest.raises(ValueError, match=r"has 20×30 pixels, expected 40×60"):
        Grid.common([WHOLE]).nearest(np.zeros((20, 30)))

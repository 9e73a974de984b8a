"""Views of images and feature maps: the published ones, as torch's own operations make them, as matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.views.jitter import Jitter, apply_matrices, sample_jitter, view_images, view_matrices
from tests.helpers.stores import SHARED

GOLDEN = SHARED / "reference" / "featup_implicit.npz"
SIZES = [(48, 48), (31, 52), (57, 24)]


def view(maps: torch.Tensor, jitters: list[Jitter]) -> torch.Tensor:
    rows, columns = (matrix.to(maps) for matrix in view_matrices(jitters, (maps.shape[2], maps.shape[3])))
    return apply_matrices(maps, rows, columns)


def step_by_step(maps: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    """The definition, in the words of FeatUp's paper: pad, zoom, crop, flip."""
    padded = F.pad(maps, [jitter.pad_px] * 4, mode="reflect")
    if jitter.zoom > 1:
        padded = F.interpolate(padded, scale_factor=jitter.zoom, mode="bilinear", align_corners=False)
    cropped = padded[..., jitter.row_px :, jitter.column_px :][..., : maps.shape[2], : maps.shape[3]]
    return cropped.flip(3) if jitter.flip else cropped


def draw(count: int, size: tuple[int, int], seed: int = 0) -> list[Jitter]:
    rng = np.random.default_rng(seed)
    return [sample_jitter(rng, size, max_pad_px=9, max_zoom=2) for _ in range(count)]


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference case {GOLDEN} is not beside the checkout")
def test_published_views() -> None:
    golden = np.load(GOLDEN)
    maps = torch.from_numpy(golden["output"])
    names = ("t_zoom", "t_x", "t_y", "t_flip")
    jitters = [
        Jitter((48, 48), int(golden["pad"]), float(zoom), int(row), int(column), bool(flip))
        for zoom, row, column, flip in zip(*(golden[name] for name in names), strict=True)
    ]
    views = view(maps.expand(len(jitters), -1, -1, -1), jitters)
    torch.testing.assert_close(views, torch.from_numpy(golden["views"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_view_is_padding_enlarging_cropping_and_flipping(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    jitters = draw(20, size)
    maps = torch.randn(len(jitters), 3, *size, dtype=torch.float64)
    expected = torch.cat([step_by_step(maps[i : i + 1], jitter) for i, jitter in enumerate(jitters)])
    torch.testing.assert_close(view(maps, jitters), expected, rtol=0, atol=1e-9)


def test_views_are_drawn_over_all_there_are() -> None:
    jitters = draw(2000, (31, 52))
    assert jitters == draw(2000, (31, 52))
    assert jitters != draw(2000, (31, 52), seed=1)
    assert 0.45 < np.mean([jitter.flip for jitter in jitters]) < 0.55
    enlarged = [jitter.zoom for jitter in jitters if jitter.zoom > 1]
    assert 900 < len(enlarged) < 1100
    assert min(enlarged) < 1.01
    assert 1.99 < max(enlarged) <= 2
    plain = [jitter for jitter in jitters if jitter.zoom == 1]
    assert {jitter.row_px for jitter in plain} == set(range(19))
    assert {jitter.column_px for jitter in plain} == set(range(19))


@pytest.mark.parametrize("grid", [(31, 26), (93, 104), (8, 5)])
def test_maps_on_other_grids_show_what_the_image_shows(grid: tuple[int, int]) -> None:
    """A smooth image, on its own grid and on another: its views are the same picture."""
    size = (62, 52)

    def smooth(height: int, width: int) -> torch.Tensor:
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
        return torch.sin(2 * y[:, None] + 1.5 * x[None])[None, None]

    for jitter in draw(10, size):
        on_grid = view(smooth(*grid), [jitter])
        of_image = F.interpolate(view(smooth(*size), [jitter]), grid, mode="bilinear", antialias=True)
        # The picture changes by up to 2 over the image: by 2 / cells from one cell to the next.
        assert (on_grid - of_image).abs().mean() < 0.1 / min(*grid, *size)
        for matrix in jitter.matrices(grid):
            torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))


def test_views_of_images_are_rounded_pixels() -> None:
    images = torch.randint(0, 256, (4, 3, 31, 52), dtype=torch.uint8)
    jitters = draw(4, (31, 52))
    views = view_images(images, jitters)
    assert views.dtype == torch.uint8
    assert (views.double() - view(images.double(), jitters)).abs().max() <= 0.501
    whole = Jitter((31, 52), 0, 1.0, 0, 0, False)
    assert torch.equal(view_images(images, [whole] * 4), images)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pad_px": 31}, "pad_px: got 31"),
        ({"zoom": 0.5}, "zoom: got 0.5"),
        ({"zoom": float("nan")}, "zoom"),
        ({"row_px": 11}, "row_px: got 11, need 0 to 10"),
        ({"column_px": -1}, "column_px"),
    ],
)
def test_views_beside_the_image_are_refused(changed: dict[str, float], words: str) -> None:
    values = {"size": (31, 52), "pad_px": 5, "zoom": 1.0, "row_px": 0, "column_px": 0, "flip": False}
    with pytest.raises(ValueError, match=words):
        Jitter(**{**values, **changed})

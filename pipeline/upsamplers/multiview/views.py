"""The views that the multiview solver fits: a fixed sequence per image size, and the backbone's pooling of them.

Views cover their parameter space evenly (Roberts' additive recurrence R3, "The unreasonable effectiveness of
quasirandom sequences", 2018). With few views, the error on held-out views was lower than with equally many random ones
(ViT-S/14, 5 photos: .250 against .260 with 9, .229 against .237 with 21); with 41 it was the same.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.multiview import ViewMatrices
from pipeline.views.jitter import Jitter, view_matrices

__all__ = ["MOST_VIEWS", "ViewOrder", "held_out_views", "solver_grid", "solver_views", "start_at", "view_operators"]

ViewOrder = Literal["sequence", "chosen"]

MOST_VIEWS = 256  # limit for a fit; held-out views come later in the sequence
_PAD_SHARE = 30 / 224  # as in FeatUp's implicit fit (arXiv 2403.10516): 30 pixels at 224
_MOST_ZOOM = 1.8
# The first views, chosen one after the other so that the error on other views falls most: mean over EfficientNet-Lite0,
# ViT-Ti/16 and ViT-S/14, 5 photographs each, out of views 1 to 40.
_CHOSEN = (0, 2, 20, 7, 35, 36, 34, 32, 27)
_PLASTIC = 1.2207440846057596  # the root of x⁴ = x + 1
# Weights below this share of the matrix's maximum become zero: float32 denormals in the kernel's tails made products
# ten times slower, and rows of finite support can be cut into bands.
_LEAST_WEIGHT = 1e-5


def solver_views(size: tuple[int, int], count: int, order: ViewOrder = "chosen") -> list[Jitter]:
    """The first ``count`` views of images of ``size`` (H, W) in pixels; the very first is the image itself.

    Args:
        size: (H, W) of the images.
        count: 2 … `MOST_VIEWS`.
        order: of the views: that of the sequence, or the chosen ones before all others.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 2 <= count <= MOST_VIEWS:
        raise ValueError(f"count: got {count} views, need 2 to {MOST_VIEWS}")
    chosen = _CHOSEN if order == "chosen" else (0,)
    numbers = itertools.chain(chosen, (number for number in range(MOST_VIEWS) if number not in chosen))
    return [_view(size, number) for number in itertools.islice(numbers, count)]


def held_out_views(size: tuple[int, int], count: int) -> list[Jitter]:
    """``count`` views of the same sequence that no fit uses, independent of the number of views fitted."""
    # In a small image, views at whole pixels repeat; enlarged views never do, so this terminates.
    fitted = set(solver_views(size, MOST_VIEWS))
    later = (_view(size, number) for number in itertools.count(MOST_VIEWS))
    return list(itertools.islice((view for view in later if view not in fitted), count))


def solver_grid(size: tuple[int, int], stride_px: int) -> tuple[int, int]:
    """(height, width) of the solver's grid: one cell per ``stride_px`` pixels of the image, rounded up."""
    return math.ceil(size[0] / stride_px), math.ceil(size[1] / stride_px)


def view_operators(
    jitters: Sequence[Jitter], low: tuple[int, int], high: tuple[int, int], sigma_px: float
) -> ViewMatrices:
    """Model of the backbone's view of features on a grid: interpolated to pixels, jittered, pooled by a Gaussian.

    Args:
        jitters: V views.
        low: (h, w) of the backbone's features.
        high: (H, W) of the solver's grid; if it equals the image's size, nothing is interpolated.
        sigma_px: standard deviation of the Gaussian in pixels of the image; truncated at the image's border.

    Returns:
        float32 matrices on the CPU; rows sum to 1, so constants are preserved.
    """
    size = jitters[0].size
    rows, columns = view_matrices(jitters, size)
    axes = zip((rows, columns), size, low, high, strict=True)
    return ViewMatrices(
        *(
            _pruned(_pooling(cells, length, sigma_px) @ view @ _interpolation(length, high_cells))
            for view, length, cells, high_cells in axes
        )
    )


def start_at(first: Tensor, grid: tuple[int, int]) -> Tensor:
    """The solver's initial value: the image's own features [B, k, h, w], interpolated to ``grid``.

    Starting from JBU gave the same error on held-out views (.2210 and .2213).
    """
    return F.interpolate(first, grid, mode="bilinear", align_corners=False)


def _view(size: tuple[int, int], number: int) -> Jitter:
    """View ``number`` of the sequence: every other view is enlarged, every other pair is flipped."""
    pad = min(round(min(size) * _PAD_SHARE), min(size) - 1)
    if number == 0:
        return Jitter(size, pad, 1.0, pad, pad, False)
    row, column, zoom = ((0.5 + number / _PLASTIC**power) % 1 for power in (1, 2, 3))
    zoom = 1 + zoom * (_MOST_ZOOM - 1) if number % 2 else 1.0
    row_px, column_px = (
        int(share * (int((length + 2 * pad) * zoom) - length + 1))
        for share, length in zip((row, column), size, strict=True)
    )
    return Jitter(size, pad, zoom, row_px, column_px, bool(number // 2 % 2))


def _pooling(cells: int, length: int, sigma_px: float) -> Tensor:
    """[cells, length] float64: Gaussians around the cells' centres; rows sum to 1."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * (length / cells)
    distance = torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]
    return torch.softmax(-distance.square() / (2 * sigma_px**2), 1)


def _interpolation(length: int, cells: int) -> Tensor:
    """[length, cells] float64: linear interpolation, align_corners=False."""
    eye = torch.eye(cells, dtype=torch.float64)[None]
    return F.interpolate(eye, length, mode="linear", align_corners=False)[0].T.contiguous()


def _pruned(matrices: Tensor) -> Tensor:
    """Zero negligible weights, renormalise rows to sum to 1, and convert to float32."""
    kept = torch.where(matrices > _LEAST_WEIGHT * matrices.max(), matrices, 0.0)
    return (kept / kept.sum(2, keepdim=True)).float()

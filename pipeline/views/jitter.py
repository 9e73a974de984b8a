"""Random views of an image, and the same views of its feature maps: padded, enlarged, cropped, flipped.

The views of FeatUp's multi-view consistency (arXiv 2403.10516, section 3.1). A view is a linear map that is separable:
``rows @ map @ columns.T`` with two small matrices. As matrix products, views are exact at every border, have
reproducible gradients on every device, and can be merged with a blur or a pooling at no cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Jitter", "apply_matrices", "sample_jitter", "view_images", "view_matrices"]


@dataclass(frozen=True)
class Jitter:
    """One view of an image: reflect-pad it, enlarge it bilinearly, crop it to its own size, flip it.

    Padding does not repeat the edge; enlarging matches PyTorch's ``interpolate`` with align_corners=False.

    Attributes:
        size: (H, W) of the image in pixels.
        pad_px: padding on each side, in pixels before enlarging; less than H and W.
        zoom: enlargement factor, at least 1.
        row_px: first row of the crop, in pixels of the padded, enlarged image.
        column_px: first column of the crop, likewise.
        flip: whether left and right are exchanged after cropping.

    Raises:
        ValueError: a value is out of range, or the crop leaves the enlarged image.
    """

    size: tuple[int, int]
    pad_px: int
    zoom: float
    row_px: int
    column_px: int
    flip: bool

    def __post_init__(self) -> None:
        if not 0 <= self.pad_px < min(self.size):
            raise ValueError(f"pad_px: got {self.pad_px}, need 0 to {min(self.size) - 1} for an image of {self.size}")
        if not self.zoom >= 1:
            raise ValueError(f"zoom: got {self.zoom}, need at least 1")
        for name, offset, length in zip(("row_px", "column_px"), (self.row_px, self.column_px), self.size, strict=True):
            most = _offsets(length, self.pad_px, self.zoom)
            if not 0 <= offset <= most:
                raise ValueError(f"{name}: got {offset}, need 0 to {most} for {length} pixels at zoom {self.zoom}")

    def matrices(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The view of a map that covers the image, as matrices: ``rows @ map @ columns.T``.

        Args:
            grid: (h, w) of the map: the image's own size, or any other.

        Returns:
            rows [h, h] and columns [w, w], float64 on the CPU; rows sum to 1. On the image's own grid this is exactly
            the view; on another grid, positions are scaled, and reflected where the image is.
        """
        rows = _axis(grid[0], self.size[0], self.pad_px, self.zoom, self.row_px)
        columns = _axis(grid[1], self.size[1], self.pad_px, self.zoom, self.column_px)
        return rows, columns.flip(0) if self.flip else columns


def sample_jitter(rng: np.random.Generator, size: tuple[int, int], *, max_pad_px: int, max_zoom: float) -> Jitter:
    """Draw a view: flipped with probability ½, enlarged with probability ½ by 1 to ``max_zoom``, cropped anywhere.

    Args:
        rng: source of random numbers; how many are drawn depends on the view.
        size: (H, W) of the image in pixels.
        max_pad_px: padding around the image that the crop may include.
        max_zoom: largest enlargement factor, at least 1.
    """
    flip, enlarged = rng.random(2) > 0.5
    zoom = 1 + rng.random() * (max_zoom - 1) if enlarged else 1.0
    row, column = (int(rng.integers(_offsets(length, max_pad_px, zoom) + 1)) for length in size)
    return Jitter(size, max_pad_px, float(zoom), row, column, bool(flip))


def view_matrices(jitters: Sequence[Jitter], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`Jitter.matrices` of B views: rows [B, h, h] and columns [B, w, w], float64 on the CPU."""
    rows, columns = zip(*(jitter.matrices(grid) for jitter in jitters), strict=True)
    return torch.stack(rows), torch.stack(columns)


def apply_matrices(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one separable map to each of B feature maps.

    Args:
        maps: [B, C, H, W], floating.
        rows: [B, H', H], in the maps' dtype and on their device.
        columns: [B, W', W], likewise.

    Returns:
        [B, C, H', W'].
    """
    return rows[:, None] @ maps @ columns[:, None].mT


def view_images(images: Tensor, jitters: Sequence[Jitter]) -> Tensor:
    """One view of each image: [B, 3, H, W] uint8 -> same shape and dtype, rounded."""
    rows, columns = view_matrices(jitters, (images.shape[2], images.shape[3]))
    rows, columns = (matrix.to(images.device, torch.float32) for matrix in (rows, columns))
    return apply_matrices(images.float(), rows, columns).round().clamp(0, 255).to(torch.uint8)


def _offsets(length: int, pad: int, zoom: float) -> int:
    """The last offset at which a crop of ``length`` fits."""
    return int((length + 2 * pad) * zoom) - length


def _axis(cells: int, length: int, pad: int, zoom: float, offset: int) -> Tensor:
    """[cells, cells]: for each cell of the view along one axis, the two interpolation weights of its source."""
    centres = torch.arange(cells, dtype=torch.float64) + 0.5
    enlarged = centres * (length / cells) + offset
    padded = (enlarged / zoom - 0.5).clamp(0, length + 2 * pad - 1)  # pixel centres at integers
    pixel = (padded - pad).abs()
    pixel = torch.where(pixel > length - 1, 2 * (length - 1) - pixel, pixel)  # reflected without repeating the edge
    position = ((pixel + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    before = position.floor().clamp(max=max(cells - 2, 0))
    weight = position - before
    matrix = torch.zeros(cells, cells, dtype=torch.float64)
    here = torch.arange(cells)
    matrix[here, before.long()] = 1 - weight
    matrix[here, (before.long() + 1).clamp(max=cells - 1)] += weight
    return matrix

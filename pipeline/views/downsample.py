"""High-res features -> the backbone's grid, for comparison with the features of a view.

FeatUp's learned downsamplers (arXiv 2403.10516, section 3.2), and two fixed linear maps as matrices: a blur and a mean.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.views.published import ATTENTION_NOISE, BLUR_SIGMA_PX, BLUR_TAPS

__all__ = ["AttentionDownsampler", "SimpleDownsampler", "blur_matrix", "mean_matrix"]


class SimpleDownsampler(nn.Module):
    """One learned kernel, made non-negative and normalised, for all channels and positions.

    It moves from the top left by whole pixels, so a remainder at the bottom and at the right is ignored, as published.

    Args:
        kernel_px: side of the kernel in pixels.
    """

    def __init__(self, kernel_px: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(kernel_px, kernel_px))

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Downsample.

        Args:
            maps: [B, C, H, W], at least as large as the kernel and the grid.
            grid: (h, w) of the result.

        Returns:
            [B, C, h, w].
        """
        B, C, H, W = maps.shape
        side = len(self.kernel)
        kernel = self.kernel.abs() / self.kernel.abs().sum()
        stride = [
            (length - side) // (cells - 1) if cells > 1 else length for length, cells in zip((H, W), grid, strict=True)
        ]
        low = F.conv2d(maps.reshape(B * C, 1, H, W), kernel[None, None], stride=stride)
        return low[..., : grid[0], : grid[1]].reshape(B, C, *grid)


class AttentionDownsampler(nn.Module):
    """A weighted mean over the pixels of each cell, with weights from a softmax of their saliency.

    Saliency is linear in the features, so they are not needed with all channels: if the upsampler treats all channels
    alike, saliency is one more direction to project on (`direction`).

    Args:
        num_chs: channels C of the features.
        cell_px: side of a cell in pixels.
    """

    def __init__(self, num_chs: int, cell_px: int) -> None:
        super().__init__()
        self.saliency = nn.Linear(num_chs, 1)
        self.weight = nn.Parameter(1 + ATTENTION_NOISE * torch.randn(cell_px, cell_px))
        self.bias = nn.Parameter(ATTENTION_NOISE * torch.randn(cell_px, cell_px))

    def direction(self, kept: Tensor) -> Tensor:
        """The direction whose projection gives the features' saliency.

        Args:
            kept: [B, C] floating, dropout factors: 0 if a channel is dropped, else the rescaling.

        Returns:
            [B, C, 1].
        """
        return (self.saliency.weight * kept)[:, :, None]

    def forward(self, maps: Tensor, saliency: Tensor, kept: Tensor) -> Tensor:
        """Downsample.

        Args:
            maps: [B, k, h·cell, w·cell], floating.
            saliency: [B, 1, h·cell, w·cell], the features projected on `direction`.
            kept: [B, h, w], 0 for cells whose saliency is dropped (dropout), else 1.

        Returns:
            [B, k, h, w].
        """
        logits = _cells(saliency + self.saliency.bias, len(self.weight))  # [B, 1, h, w, cell·cell]
        logits = logits * kept[:, None, :, :, None] * self.weight.flatten() + self.bias.flatten()
        return (_cells(maps, len(self.weight)) * logits.softmax(-1)).sum(-1)


@functools.lru_cache(8)
def blur_matrix(length: int, *, taps: int = BLUR_TAPS, sigma_px: float = BLUR_SIGMA_PX) -> Tensor:
    """Gaussian blur along an axis, reflected at its ends: [length, length] float64, rows sum to 1.

    Args:
        length: length of the axis in pixels; more than ``taps // 2``.
        taps: number of taps of the kernel, odd.
        sigma_px: standard deviation.
    """
    radius = taps // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.softmax(-offsets.square() / (2 * sigma_px**2), 0)
    padded = F.pad(torch.eye(length, dtype=torch.float64)[None], [radius] * 2, mode="reflect")[0]  # [length, padded]
    return torch.stack([padded[:, i : i + taps] @ kernel for i in range(length)])


def mean_matrix(cells: int, length: int) -> Tensor:
    """The mean over each of ``cells`` equal parts of an axis: [cells, length] float64.

    Raises:
        ValueError: ``length`` is not a multiple of ``cells``.
    """
    if length % cells:
        raise ValueError(f"length: got {length} pixels, need a multiple of {cells} cells")
    return torch.eye(cells, dtype=torch.float64).repeat_interleave(length // cells, 1) * (cells / length)


def _cells(maps: Tensor, side: int) -> Tensor:
    """[B, k, h·side, w·side] -> [B, k, h, w, side·side]."""
    B, k, H, W = maps.shape
    split = maps.reshape(B, k, H // side, side, W // side, side)
    return split.permute(0, 1, 2, 4, 3, 5).flatten(4)

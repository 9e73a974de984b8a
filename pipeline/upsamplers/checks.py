"""Checks of the arguments that all upsamplers share."""

import torch
from torch import Tensor

__all__ = ["check_images", "check_smallest", "checked_basis"]


def check_smallest(grid: tuple[int, int], smallest: int) -> None:
    """Raise ValueError if features on a grid are fewer than ``smallest`` along an axis."""
    if min(grid) < smallest:
        got = f"{grid[0]}×{grid[1]}"
        raise ValueError(f"features: got {got}, need at least {smallest} on both axes: the border is reflected")


def checked_basis(mean: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [C] and components [k, C] in float64; raise ValueError if their shapes disagree."""
    if mean.ndim != 1 or components.ndim != 2 or components.shape[1] != mean.shape[0]:
        raise ValueError(
            f"components: got shape {tuple(components.shape)}, need [k, C] for a mean [C] of {tuple(mean.shape)}"
        )
    return mean.detach().double(), components.detach().double()


def check_images(features: Tensor, images: Tensor, size: tuple[int, int]) -> None:
    """Validate features [B, channels, h, w], images [B, 3, H, W] and the output size, else raise ValueError."""
    if features.ndim != 4 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"features: got {tuple(features.shape)} {features.dtype}, need [B, channels, h, w] of a floating dtype, "
            "not empty"
        )
    if images.ndim != 4 or images.shape[:2] != (features.shape[0], 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images: got {tuple(images.shape)} {images.dtype}, need [{features.shape[0]}, 3, H, W] of uint8 RGB"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: got {size}, need height and width of at least 1")

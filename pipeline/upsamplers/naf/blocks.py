"""Parts of NAF, with the parameter names of its checkpoints."""

import math
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["GROUPS", "Block", "Branch", "Rope", "rotate"]

GROUPS = 8  # published: of the group normalisations


def _conv(in_chs: int, chs: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_chs, chs, kernel_size, padding=kernel_size // 2, padding_mode="reflect")


class Block(nn.Module):
    """Two convolutions, each after a group normalisation and a SiLU. There is no residual connection."""

    def __init__(self, chs: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, chs), nn.GroupNorm(GROUPS, chs)
        self.conv1, self.conv2 = _conv(chs, chs, kernel_size), _conv(chs, chs, kernel_size)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.silu(self.norm1(x)))
        output: Tensor = self.conv2(F.silu(self.norm2(x)))
        return output


class Branch(nn.Sequential):
    """A convolution of the image, and two blocks: [B, 3, H, W] -> [B, chs, H, W]."""

    def __init__(self, chs: int, kernel_size: int) -> None:
        super().__init__(_conv(3, chs, kernel_size), Block(chs, kernel_size), Block(chs, kernel_size))

    @property
    def first(self) -> nn.Conv2d:
        """The convolution of the image."""
        return cast(nn.Conv2d, self[0])

    @property
    def normalised(self) -> list[tuple[nn.GroupNorm, nn.Conv2d]]:
        """The other convolutions, each with the normalisation before it."""
        blocks = cast("list[Block]", list(islice(self, 1, None)))
        return [pair for block in blocks for pair in ((block.norm1, block.conv1), (block.norm2, block.conv2))]


class Rope(nn.Module):
    """Rotary position embedding in two dimensions, with fixed periods.

    Args:
        d: channels of a head, a multiple of 4.
    """

    periods: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("periods", 100.0 ** torch.linspace(0, 1, d // 4 + 1)[:-1])

    def angles(self, size: tuple[int, int], rows: slice, dtype: torch.dtype) -> Tensor:
        """Angles of some rows of an output of this size: [rows, W, 1, d/2] radians, rows' before columns'."""
        periods = self.periods.to(dtype)
        y, x = ((2 * torch.arange(n, dtype=dtype, device=periods.device) + 1) / n - 1 for n in size)
        y, x = (2 * math.pi * coordinate[:, None] / periods for coordinate in (y[rows], x))
        return torch.cat([y[:, None].expand(-1, len(x), -1), x.expand(len(y), -1, -1)], 2)[:, :, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of channels c and c + d/2 of [..., d] by angles [..., d/2]."""
    first, second = x.chunk(2, -1)
    cosines, sines = angles.cos(), angles.sin()
    rotated = [
        torch.addcmul(first * cosines, second, sines, value=-1),
        torch.addcmul(second * cosines, first, sines),
    ]
    return torch.cat(rotated, -1)

"""Moments of images that are gathered tile by tile, for group normalisation in bounded memory."""

import torch
from torch import Tensor, nn

__all__ = ["Moments"]


class Moments:
    """Means and squared deviations per channel and image, merged tile by tile (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, tile: Tensor) -> None:
        """Add pixels [B, n, chs]."""
        tile = tile.to(torch.promote_types(tile.dtype, torch.float32))
        mean = tile.mean(1)
        squares = (tile - mean[:, None]).square_().sum(1).double()
        count, mean = tile.shape[1], mean.double()
        if self.count:
            share = count / (self.count + count)
            delta = mean - self.mean
            squares += self.squares + delta.square() * (self.count * share)
            mean = self.mean + delta * share
        self.count, self.mean, self.squares = self.count + count, mean, squares

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The group normalisation as a scale and a shift per channel: [B, 1, chs] each."""
        B, chs = self.mean.shape
        groups = (B, norm.num_groups, chs // norm.num_groups)
        means, squares = self.mean.view(groups), self.squares.view(groups)
        mean = means.mean(2, keepdim=True)
        variance = (squares / self.count + (means - mean).square()).mean(2, keepdim=True)
        scale = norm.weight.double().view(groups[1:]) / (variance + norm.eps).sqrt()
        shift = norm.bias.double().view(groups[1:]) - mean * scale
        scale, shift = (t.reshape(B, 1, chs).to(norm.weight.dtype) for t in (scale, shift))
        return scale, shift

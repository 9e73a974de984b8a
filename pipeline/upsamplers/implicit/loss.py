"""The objective of FeatUp's implicit networks: reconstruct the features of views, subject to a few priors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.views.downsample import blur_matrix
from pipeline.views.published import BLUR_TAPS, DEVIATION_INITIAL, LEAST_DEVIATION

__all__ = ["PUBLISHED_WEIGHTS", "LossWeights", "Uncertainty", "loss_of_images", "magnitude"]

_SMALLEST_SQUARE = 1e-12


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms added to the reconstruction error; defaults are FeatUp's published ones.

    Attributes:
        magnitude: weight of the squared errors of magnitudes.
        variation: weight of the total variation of the high-res magnitude.
        blur: weight of the squared difference between the features and their blur.
    """

    magnitude: float = 0.001
    variation: float = 0.05
    blur: float = 0.1


PUBLISHED_WEIGHTS = LossWeights()


class Uncertainty(nn.Module):
    """N linear predictors, one per image, of how well each location of the low-res features can be explained.

    FeatUp (arXiv 2403.10516, equation 1): a predicted scale s weights squared errors by 1 / 2s² and costs log s.

    Args:
        images: N.
        num_chs: k.
        seed: for the initial values, which are the same for every image.
    """

    def __init__(self, images: int, num_chs: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = DEVIATION_INITIAL * num_chs**-0.5  # a tenth of PyTorch's initialisation
        weight = (2 * torch.rand(num_chs, generator=generator) - 1) * bound
        bias = (2 * torch.rand((), generator=generator) - 1) * bound
        self.weight, self.bias = nn.Parameter(weight.repeat(images, 1)), nn.Parameter(bias.repeat(images))

    def forward(self, targets: Tensor) -> Tensor:
        """[N, V, h, w, k] -> scales [N, V, h, w], positive."""
        logarithms = torch.einsum("nvijc,nc->nvij", targets, self.weight) + self.bias[:, None, None, None]
        return (logarithms + DEVIATION_INITIAL).exp().clamp_min(LEAST_DEVIATION)


def loss_of_images(
    high: Tensor, low: Tensor, targets: Tensor, scales: Tensor, size: tuple[int, int], weights: LossWeights
) -> Tensor:
    """Compute FeatUp's objective for each image.

    Args:
        high: [N, H·W, 1 + k] float32, magnitude and high-res features.
        low: [N, V, h, w, 1 + k], ``high`` downsampled through V views.
        targets: [N, V, h, w, k], the backbone's features of these views.
        scales: [N, V, h, w], predicted by `Uncertainty`.
        size: (H, W).
        weights: weights of the priors.

    Returns:
        [N]: each image's loss, independent of the other images.
    """
    errors = (low[..., 1:] - targets).square().mean(4)
    reconstruction = (errors / (2 * scales.square()) + scales.log()).flatten(1).mean(1)
    wanted = magnitude(targets)
    magnitudes = (low[..., 0] - wanted).square() + (magnitude(low[..., 1:]) - wanted).square()
    maps = high.view(len(high), *size, -1)
    return (
        reconstruction
        + weights.magnitude * magnitudes.flatten(1).mean(1)
        + weights.variation * _total_variation(maps[..., 0])
        + weights.blur * _difference_from_blur(maps[..., 1:])
    )


def magnitude(features: Tensor) -> Tensor:
    """Euclidean norm over the last dimension; its gradient at 0 is 0, where a plain norm's is NaN."""
    return features.square().sum(-1).clamp_min(_SMALLEST_SQUARE).sqrt()


def _total_variation(maps: Tensor) -> Tensor:
    """[N, H, W] -> [N]: sum of squared differences between neighbours, per pixel."""
    down, right = maps.diff(dim=1), maps.diff(dim=2)
    return (down.square().sum((1, 2)) + right.square().sum((1, 2))) / maps[0].numel()


def _difference_from_blur(maps: Tensor) -> Tensor:
    """[N, H, W, k] -> [N]: mean square of the features minus their Gaussian blur, reflected at the border."""
    channels = maps.shape[3]
    length = 2 * BLUR_TAPS  # long enough for its middle row to be the whole kernel
    taps = blur_matrix(length, taps=BLUR_TAPS)[BLUR_TAPS]
    taps = taps[taps > 0].to(maps.device, maps.dtype)
    kernel = -torch.outer(taps, taps)
    kernel[BLUR_TAPS // 2, BLUR_TAPS // 2] += 1
    padded = F.pad(maps.permute(0, 3, 1, 2), [BLUR_TAPS // 2] * 4, mode="reflect")
    rest = F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)
    return rest.square().flatten(1).mean(1)

"""Training losses: FeatUp's likelihood and CRF (arXiv 2403.10516), LiFT's cosine distance (2403.14625)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.views.published import DEVIATION_INITIAL, LEAST_DEVIATION

__all__ = ["Uncertainty", "cosine_distance", "random_projection", "sampled_crf", "uncertain_error"]

# Published values, for squared distances of positions (as shares of height and width) and of colours (of
# ImageNet-normalised images).
_CRF_NEAR_AND_ALIKE, _CRF_NEAR = 10.0, 3.0
_CRF_POSITION, _CRF_COLOUR, _CRF_NEAR_POSITION = 0.1, 0.15, 0.005


class Uncertainty(nn.Module):
    """Predicts the deviation between features of different views; its logarithm is linear in the features.

    Args:
        num_chs: channels C of the features.
    """

    def __init__(self, num_chs: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(num_chs, 1, 1)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(DEVIATION_INITIAL)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] centred features of unit variance -> [B, 1, h, w], at least 1e-4."""
        logarithm: Tensor = self.net(features) + DEVIATION_INITIAL
        return logarithm.exp().clamp_min(LEAST_DEVIATION)


def uncertain_error(predicted: Tensor, target: Tensor, deviation: Tensor) -> Tensor:
    """Negative log-likelihood under a Gaussian, up to a constant: mean of (p − t)² / 2s² + log s.

    FeatUp, equation 2: predicting a large deviation lowers the loss where features cannot be predicted.

    Args:
        predicted: [B, k, h, w].
        target: [B, k, h, w].
        deviation: s, [B, 1, h, w], positive.

    Returns:
        [].
    """
    return ((predicted - target).square() / (2 * deviation.square()) + deviation.log()).mean()


def sampled_crf(features: Tensor, image: Tensor, points: Tensor) -> Tensor:
    """How much features differ where the image does not: a dense CRF's pairwise energy on sampled pixels.

    The energy of Krähenbühl & Koltun (NeurIPS 2011, equation 3), as FeatUp uses it: squared distances of the features
    of all pairs, weighted by how close the two are in position and colour.

    Args:
        features: [B, k, H, W].
        image: [B, 3, H, W], ImageNet-normalised.
        points: [n, 2] int64, rows and columns.

    Returns:
        [], the mean over pairs.
    """
    extent = torch.tensor(image.shape[2:], device=image.device)
    position = _square_distances((points / extent)[None])
    colour = _square_distances(image[:, :, points[:, 0], points[:, 1]].mT)
    likeness = _CRF_NEAR_AND_ALIKE * torch.exp(-position / (2 * _CRF_POSITION) - colour / (2 * _CRF_COLOUR))
    likeness = likeness + _CRF_NEAR * torch.exp(-position / (2 * _CRF_NEAR_POSITION))
    return (likeness * _square_distances(features[:, :, points[:, 0], points[:, 1]].mT)).mean()


def random_projection(batch: int, num_chs: int, directions: int, generator: torch.Generator) -> Tensor:
    """Random unit directions of feature space, as columns.

    Returns:
        [batch, num_chs, directions] float32, on the generator's device.
    """
    return F.normalize(torch.randn(batch, num_chs, directions, generator=generator, device=generator.device), dim=1)


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of 1 − cosine, for two tensors [B, C, h, w] -> []."""
    return (1 - F.cosine_similarity(predicted, target, dim=1)).mean()


def _square_distances(points: Tensor) -> Tensor:
    """[B, n, c] -> [B, n, n], as |a|² + |b|² − 2ab, because storing all differences would take n²·c numbers."""
    points = points - points.mean(1, keepdim=True)  # a common offset would only cost precision
    squares = points.square().sum(-1)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * points @ points.mT
    return distances.clamp_min(0)

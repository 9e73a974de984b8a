"""Other ways to spend several passes of the backbone on an image, as controls for multiview."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.features.backbone import Backbone
from pipeline.upsamplers.multiview.views import solver_views, view_operators
from pipeline.views.features import JitterMatrices, project, view_features
from pipeline.views.jitter import Jitter

__all__ = ["enlarged", "mean_of_views", "strided"]

Basis = tuple[Tensor, Tensor]


def strided(backbone: Backbone, basis: Basis, steps: int) -> Callable[[Tensor], Tensor]:
    """Features at 1/steps of the backbone's stride: those of shifted images, interleaved (FeatUp's "strided" baseline).

    Args:
        backbone: of stride s.
        basis: mean [C] and components [k, C].
        steps: shifts on each axis; steps² passes.

    Returns:
        A function from photographs [B, 3, H, W] to features [B, k, steps·h, steps·w].
    """
    size, cell = backbone.size, backbone.reduction
    offsets = [round(cell * ((step + 0.5) / steps - 0.5)) for step in range(steps)]
    pad = max(map(abs, offsets))
    jitters = [Jitter(size, pad, 1.0, pad + row, pad + column, False) for row in offsets for column in offsets]
    matrices = JitterMatrices.of(jitters, basis[0].device)

    def high(photos: Tensor) -> Tensor:
        seen = view_features(backbone, photos, matrices, basis)  # [B, steps², k, h, w]
        B, _, k, h, w = seen.shape
        return seen.view(B, steps, steps, k, h, w).permute(0, 3, 4, 1, 5, 2).reshape(B, k, steps * h, steps * w)

    return high


def mean_of_views(
    backbone: Backbone, basis: Basis, views: int, grid: tuple[int, int], sigma_px: float
) -> Callable[[Tensor], Tensor]:
    """The mean of all views' features, each carried back to the image: photographs to [B, k, *grid].

    Args:
        backbone: on the device to compute on.
        basis: mean [C] and components [k, C].
        views: number of passes.
        grid: of the result.
        sigma_px: width of the weights with which a feature is spread over the image.
    """
    jitters = solver_views(backbone.size, views)
    operators = view_operators(jitters, backbone.grid, grid, sigma_px).to(basis[0].device)
    matrices = JitterMatrices.of(jitters[1:], basis[0].device)
    spread = torch.einsum("vip,vjq->pq", operators.rows, operators.columns)

    def high(photos: Tensor) -> Tensor:
        own = project(backbone(photos), *basis)[:, None]
        seen = torch.cat([own, view_features(backbone, photos, matrices, basis)], 1)
        return torch.einsum("vip,bvkij,vjq->bkpq", operators.rows, seen, operators.columns) / spread

    return high


def enlarged(photos: Tensor, factor: int) -> Tensor:
    """Photographs [B, 3, H, W] uint8, interpolated bicubically."""
    size = [factor * length for length in photos.shape[2:]]
    return F.interpolate(photos.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)

"""Training joint bilateral upsampling: FeatUp's multi-view consistency (arXiv 2403.10516, section 3).

High-res features, transformed to a random view of the image and downsampled, should equal the backbone's features of
that view. All of a stack except its final convolution treats every channel alike. So instead of C channels, only the
random directions that a step compares are upsampled, plus one for the downsampler's saliency. This gives exactly the
same losses at (30 + 1) / C of the cost, and one upsampling serves all views of a step.

Differences from FeatUp's code: directions are drawn per image and step, not per view; each image of a batch has its own
views; the CRF term compares features with the image they cover, not with another view of it; dropout applies only to
the saliency (to its channels for a whole image, as it is projected), not inside the kernels; kernels start narrow
(--initial-sigma), because with FeatUp's σ = 1 a stack starts as a strong blur, which training must first undo.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kernels.jbu import JBUStack
from pipeline.features.backbone import Backbone
from pipeline.train.data import Draw
from pipeline.train.held_out import rendered_size
from pipeline.train.objectives.base import LOSS, FeatureStatistics
from pipeline.train.objectives.jbu_stack import StackObjective
from pipeline.train.objectives.losses import Uncertainty, random_projection, sampled_crf, uncertain_error
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.views.downsample import AttentionDownsampler, SimpleDownsampler, blur_matrix
from pipeline.views.jitter import apply_matrices, sample_jitter, view_images, view_matrices
from schemas.train_options import TrainConfig

__all__ = ["JBUViewsObjective"]

_CRF_POINTS = 1000  # published
_DROPOUT = 0.2  # published, for the saliency


@dataclass(frozen=True, eq=False)
class _View:
    rows: Tensor  # [B, H, H]
    columns: Tensor  # [B, W, W]
    target: Tensor  # [B, C, h, w], features of the view
    kept_cells: Tensor  # [B, h, w]


@dataclass(frozen=True, eq=False)
class _Prepared:
    turn: int
    images: Tensor  # [B, 3, H, W] uint8
    low: Tensor  # [B, C, h, w]
    projection: Tensor  # [B, C, directions]
    kept_channels: Tensor  # [B, C]
    points: Tensor  # [n, 2]
    views: list[_View]


class _Head(nn.Module):
    """The modules trained for one backbone only, and discarded after training."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: Backbone, statistics: FeatureStatistics, downsampler: str) -> None:
        super().__init__()
        self.register_buffer("mean", statistics.mean[:, None, None])
        self.register_buffer("deviation", statistics.deviation)
        self.size, self.grid = rendered_size(backbone), backbone.grid
        self.uncertainty = Uncertainty(backbone.num_chs)
        self.downsampler = (
            AttentionDownsampler(backbone.num_chs, backbone.reduction)
            if downsampler == "attention"
            else SimpleDownsampler(backbone.reduction)
        )

    def directions(self, prepared: _Prepared) -> Tensor:
        """The directions of feature space to upsample: [B, C, k]."""
        if isinstance(self.downsampler, AttentionDownsampler):
            return torch.cat([prepared.projection, self.downsampler.direction(prepared.kept_channels)], -1)
        return prepared.projection

    def downsample(self, seen: Tensor, kept_cells: Tensor) -> Tensor:
        """Upsampled `directions` in a view [B, k, H, W] -> the random directions on the backbone's grid."""
        if isinstance(self.downsampler, AttentionDownsampler):
            low: Tensor = self.downsampler(seen[:, :-1], seen[:, -1:], kept_cells)
        else:
            low = self.downsampler(seen, self.grid)
        return low

    def forward(self, seen: Tensor, view: _View, projection: Tensor) -> Tensor:
        """The likelihood term of one view: []."""
        deviation = self.uncertainty((view.target - self.mean) / self.deviation)
        target = _projected(view.target / self.deviation, projection)
        return uncertain_error(self.downsample(seen, view.kept_cells), target, deviation)


class JBUViewsObjective(StackObjective):
    """A JBU stack, and for each backbone a downsampler and an uncertainty.

    Args:
        config: the job's options.
        backbones: backbones to train on, on the device.
        statistics: statistics of their features.
    """

    has_heads = True

    def __init__(
        self, config: TrainConfig, backbones: Sequence[Backbone], statistics: Sequence[FeatureStatistics]
    ) -> None:
        stack = JBUStack(backbones[0].num_chs if config.final else None)
        for stage in stack.stages:
            nn.init.constant_(stage.sigma_spatial, config.initial_sigma)
        super().__init__(stack)
        self._config = config
        self._backbones = tuple(backbones)  # a tuple, so that they are not registered: neither trained nor saved
        self.heads = nn.ModuleList(_Head(*both, config.downsampler) for both in zip(backbones, statistics, strict=True))

    @override
    def prepare(self, turn: int, images: Tensor, draw: Draw) -> _Prepared:
        """Compute features of the images and their views, and draw everything random."""
        backbone, config = self._backbones[turn], self._config
        size, (H, W) = (images.shape[2], images.shape[3]), rendered_size(backbone)
        projection = random_projection(len(images), backbone.num_chs, config.projection_chs, draw.torch)
        kept = torch.rand(len(images), backbone.num_chs, generator=draw.torch) > _DROPOUT
        points = [draw.numpy.integers(length, size=_CRF_POINTS) for length in (H, W)]
        low = backbone(images)
        blurs = blur_matrix(H).to(low), blur_matrix(W).to(low)
        views = []
        for _ in range(config.jitters):
            jitters = [
                sample_jitter(draw.numpy, size, max_pad_px=config.max_pad_px, max_zoom=config.max_zoom) for _ in images
            ]
            rows, columns = (matrix.to(low) for matrix in view_matrices(jitters, (H, W)))
            if config.downsampler == "attention":  # it operates on blurred features
                rows, columns = blurs[0] @ rows, blurs[1] @ columns
            kept_cells = torch.rand(len(images), *backbone.grid, generator=draw.torch) > _DROPOUT
            target = backbone(view_images(images, jitters))
            views.append(_View(rows, columns, target, kept_cells.to(low)))
        return _Prepared(
            turn, images, low, projection.to(low), kept.to(low) / (1 - _DROPOUT),
            torch.stack([torch.from_numpy(axis) for axis in points], 1).to(low.device), views,
        )  # fmt: skip

    @override
    def forward(self, prepared: _Prepared) -> dict[str, Tensor]:
        head = self.heads[prepared.turn]
        assert isinstance(head, _Head)
        projection, offset = self.upsampler.through_final(head.directions(prepared))
        low = _projected(prepared.low / head.deviation, projection)
        high = self.upsampler(low, prepared.images, head.size) + (offset / head.deviation)[:, :, None, None]
        compared = high[:, : prepared.projection.shape[-1]]
        image = F.interpolate(imagenet_normalised(prepared.images), head.size, mode="bilinear", antialias=True)
        crf = sampled_crf(compared, image, prepared.points)
        likelihood = torch.stack(
            [head(apply_matrices(high, view.rows, view.columns), view, prepared.projection) for view in prepared.views]
        ).mean()
        return {LOSS: likelihood + self._config.crf_weight * crf, "likelihood": likelihood, "crf": crf}


def _projected(features: Tensor, projection: Tensor) -> Tensor:
    """Project [B, C, h, w] on [B, C, k] -> [B, k, h, w]."""
    return torch.einsum("bchw,bck->bkhw", features, projection)

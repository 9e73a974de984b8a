"""Views of images, computed on the device, and the backbone's features of them, in batches across images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.features.backbone import Backbone
from pipeline.views.jitter import Jitter, apply_matrices, view_matrices

__all__ = ["JitterMatrices", "project", "view_features"]

_VIEWS_AT_ONCE = {"cpu": 8, "cuda": 256}  # in one pass of the backbone, across images


class JitterMatrices(NamedTuple):
    """Views of images as matrices: rows [V, H, H] and columns [V, W, W], float32."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, jitters: Sequence[Jitter], device: torch.device) -> "JitterMatrices":
        """Matrices of V ≥ 1 views of one size, on a device."""
        return cls(*(matrix.to(device, torch.float32) for matrix in view_matrices(jitters, jitters[0].size)))


def view_features(
    backbone: Backbone, images: Tensor, jitters: JitterMatrices, projection: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The backbone's features of V views of each image.

    Args:
        backbone: on the images' device.
        images: [B, 3, H, W] uint8, of the backbone's size.
        jitters: the views.
        projection: mean [C] and components [k, C] to project on, batch by batch, so that C channels of all views
            never exist at once; None keeps all channels.

    Returns:
        [B, V, k, h, w] float32.
    """
    B, V = len(images), len(jitters.rows)
    k = backbone.num_chs if projection is None else len(projection[1])
    features = torch.empty(B, V, k, *backbone.grid, device=images.device)
    flat, at_once = features.flatten(0, 1), _VIEWS_AT_ONCE[images.device.type]
    for first in range(0, B * V, at_once):
        batch = torch.arange(first, min(first + at_once, B * V), device=images.device)
        rows, columns = jitters.rows[batch % V], jitters.columns[batch % V]
        pixels = apply_matrices(images[batch // V].float(), rows, columns).round().clamp(0, 255).to(torch.uint8)
        seen = backbone(pixels)
        flat[batch] = seen if projection is None else project(seen, *projection)
    return features


def project(features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Subtract the mean [C] from [B, C, h, w] and project on the components [k, C]: [B, k, h, w]."""
    return torch.einsum("bchw,kc->bkhw", features - mean[:, None, None], components)

"""Features of training images that come again in every epoch: made in the first, kept in main memory for the others."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.features.backbone import Backbone

__all__ = ["FeatureCache"]


class FeatureCache:
    """All of a dataset's features, or none: a part would save the backbone no pass, as a batch is computed whole.

    Whole batches, so that features are the same with a cache and without, to the last bit.

    Args:
        images: in the dataset.
        backbones: whose features an image has, one of each.
        max_bytes: of main memory; with less than all features take, nothing is kept.

    Attributes:
        bytes: what all features take, float32.
        keeps: whether they are kept.
    """

    def __init__(self, images: int, backbones: Sequence[Backbone], max_bytes: float) -> None:
        values = sum(backbone.num_chs * backbone.grid[0] * backbone.grid[1] for backbone in backbones)
        self.bytes = images * values * torch.float32.itemsize
        self.keeps = self.bytes <= max_bytes
        self._features: dict[bytes, list[Tensor]] = {}

    def features(self, images: Tensor, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Features of a batch, as they were when they were first made.

        Args:
            images: uint8 [B, 3, H, W]; told apart by their pixels.
            make: makes them, [B, C, h, w] of each backbone.

        Returns:
            What ``make`` returned, on the device of ``images``.
        """
        if not self.keeps:
            return make()
        digests = [hashlib.blake2b(image.numpy(), digest_size=16).digest() for image in images.cpu().contiguous()]
        if any(digest not in self._features for digest in digests):
            made = make()
            for digest, own in zip(digests, zip(*(features.cpu() for features in made), strict=True), strict=True):
                # Cloned: a view would keep its whole batch.
                self._features.setdefault(digest, [features.clone() for features in own])
            return made
        kept = zip(*(self._features[digest] for digest in digests), strict=True)
        return [torch.stack(features).to(images.device) for features in kept]

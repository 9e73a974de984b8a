"""Cache of training images' features, computed in the first epoch and kept in main memory for later ones."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["FeatureCache"]


class FeatureCache:
    """Cache of all features of a dataset, or none: batches are computed as a whole, so a partial cache saves no pass.

    Whole batches make features bit-identical with and without the cache.

    Args:
        images: number of images in the dataset.
        values: number of features of an image, of all tensors together.
        max_bytes: limit in main memory; if all features do not fit, nothing is kept.

    Attributes:
        bytes: size of all features in float32.
        keeps: whether features are kept.
    """

    def __init__(self, images: int, values: int, max_bytes: float) -> None:
        self.bytes = images * values * torch.float32.itemsize
        self.keeps = self.bytes <= max_bytes
        self._features: dict[bytes, list[Tensor]] = {}

    def features(self, images: Tensor, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return a batch's features, from the cache if all of them are there.

        Args:
            images: uint8 [B, 3, H, W], identified by their pixels.
            make: computes the features: tensors [B, …].

        Returns:
            What ``make`` returned, on the device of ``images``.
        """
        if not self.keeps:
            return make()
        digests = [hashlib.blake2b(image.numpy(), digest_size=16).digest() for image in images.cpu().contiguous()]
        if any(digest not in self._features for digest in digests):
            computed = make()
            by_image = zip(*(features.cpu() for features in computed), strict=True)
            for digest, own in zip(digests, by_image, strict=True):
                # Cloned, because a view would keep its whole batch in memory.
                self._features.setdefault(digest, [features.clone() for features in own])
            return computed
        kept = zip(*(self._features[digest] for digest in digests), strict=True)
        return [torch.stack(features).to(images.device) for features in kept]
